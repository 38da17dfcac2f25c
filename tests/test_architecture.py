"""The shape of the code: who imports whom, what is imported when, and that every module has its tests."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import flwr
import pytest

from scripts import structure

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tsugiki", "common", "client", "server")
    for path in (ROOT / folder).rglob("*.py")
)

HEAVY = {"torch", "transformers", "peft", "sentence_transformers", "sklearn", "scipy", "matplotlib", "pyarrow", "ray"}
"""What takes long to import. `tsugiki --help` and a refused run file answer without any of them."""

FORBIDDEN = {
    "tsugiki": {"tests"},
    "common": {"tsugiki.client", "tsugiki.server", "tsugiki.cli", "tests"},
    "client": {"tsugiki.server", "tsugiki.cli", "tests"},
    "server": {"tsugiki.client", "tsugiki.cli", "tests"},
}

COMMANDS = ("tsugiki.client.commands", "tsugiki.server.commands")
"""The modules of the two sides that the command line imports at its top."""

LIGHT = [
    module for module in MODULES if module.startswith(("tsugiki/", "common/", "client/commands", "server/commands/"))
]

PUBLIC_IN_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation")
"""The modules that Flower documents. Of these only the names in `__all__` are public."""
UNDOCUMENTED = {"current_arrays", "m_t", "momentum_vector", "v_t"}
"""What Flower's strategies keep between rounds: attributes without an underscore, and in no document."""
USES_FLOWERS_PRIVATE_PARTS = {
    "common/__init__.py",  # switches telemetry off
    "common/wire/flower.py",  # what both sides need
    "client/node/channel.py",
    "client/node/connection.py",
    "client/node/diagnosis.py",
    "server/deploy/bounded_superlink.py",
    "server/deploy/bundle.py",
    "server/deploy/control.py",
    "server/engines/superlink.py",
    "server/run/aggregate.py",  # the memory of strategies
}
"""These files, and no others, have to be read again when Flower is updated."""

ALARM_LINES = 600
"""A module may be as long as its subject; beyond this it is probably two."""

each_module = pytest.mark.parametrize("module", MODULES)


def parsed(module):
    """Return the syntax tree of a module."""
    return ast.parse((ROOT / module).read_text("utf-8"))


def imported(nodes):
    """Return the names of all imports among syntax nodes, shortened."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {short(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {short(f"{node.module}.{alias.name}") for alias in node.names}
    return names


def short(name):
    """Return the first part of a dotted name, and of our own names the first two."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "tsugiki" else parts[0]


def run_at_import(body):
    """Return all statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from run_at_import(node.orelse)
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from run_at_import(getattr(node, name, []))


def test_there_are_modules():
    """Catches: tests below that pass because they loop over nothing."""
    assert len(MODULES) > 30
    assert {module.split("/")[0] for module in MODULES} == set(FORBIDDEN)


@each_module
def test_imports_go_one_way(module):
    """Catches: a common module that knows a side; client and server that know each other, even inside a function."""
    assert not imported(ast.walk(parsed(module))) & FORBIDDEN[module.split("/")[0]]


def test_the_command_line_composes_both_sides():
    """Catches: a server that fetches the client behind the scenes; more of a side imported than its commands."""
    tree = parsed("tsugiki/cli.py")
    assert {"tsugiki.client", "tsugiki.server"} <= imported(ast.walk(tree))
    known = structure.modules()
    at_import = structure.imports("", ast.unparse(ast.Module(list(run_at_import(tree.body)), [])), known)
    sides = {name for name in at_import if name.startswith(("tsugiki.client", "tsugiki.server"))}
    assert sides
    assert all(name.startswith(COMMANDS) for name in sides)


def test_the_commands_are_among_what_is_light():
    """Catches: commands that moved, so that the next test looks past them."""
    assert {"client/commands.py", "server/commands/runs.py", "common/errors.py", "tsugiki/cli.py"} <= set(LIGHT)


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_heavy_is_imported_with_a_module(module):
    """Catches: an `import torch` at the top, which every `tsugiki --help` would wait for."""
    assert not imported(run_at_import(parsed(module).body)) & (HEAVY | {"flwr", "huggingface_hub", "safetensors"})


def test_nothing_heavy_is_imported_by_way_of_others():
    """Catches: a light library that imports a heavy one, or starts to with its next version."""
    known = structure.modules().items()
    wanted = [name for name, path in known if path.relative_to(ROOT).as_posix() in LIGHT and "__main__" not in name]
    assert len(wanted) == len(LIGHT) - 1
    code = f"import sys; from importlib import import_module; list(map(import_module, {wanted!r}));"
    code += f"print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_reading_of_imports_works():
    """Catches: a reader that overlooks an import, with which the tests above would prove nothing."""
    code = """
import a.b
if TYPE_CHECKING:
    import c
else:
    import d
try:
    from e.f import g
except ImportError:
    import h
class I:
    import i
    def method(self):
        import j
def function():
    import k
"""
    tree = ast.parse(code)
    assert imported(run_at_import(tree.body)) == {"a", "d", "e", "h", "i"}
    assert imported(ast.walk(tree)) == {"a", "c", "d", "e", "h", "i", "j", "k"}


def test_no_module_imports_itself_by_way_of_others():
    """Catches: modules that cannot be read one after the other; imports inside functions and for annotations count."""
    edges = structure.graph()
    assert len(edges) > 100
    assert [structure.drawn(circle, edges) for circle in structure.circles(edges)] == []


def test_circles_are_found_and_drawn():
    """Catches: a search that overlooks a circle, with which the test above would prove nothing."""
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f"}}
    assert structure.circles(edges) == [["a", "b", "c"], ["f", "g"]]
    assert structure.drawn(["a", "b", "c"], edges) == "a -> b -> c -> a"
    known = {"tsugiki.common", "tsugiki.common.a", "tsugiki.common.b"}
    inside = "if TYPE_CHECKING:\n    from tsugiki.common import a\ndef f():\n    from tsugiki.common.b import g\n"
    assert structure.imports("x", inside, known) == {"tsugiki.common.a", "tsugiki.common.b"}
    assert structure.imports("x", "from tsugiki.common import VERSION", known) == {"tsugiki.common"}


def test_floors_and_arrows_upwards():
    """Catches: a floor that is counted from the top; an arrow upwards that is not seen."""
    arrows = {"roof": {"hall"}, "hall": {"cellar"}, "cellar": set(), "tower": {"hall", "roof"}}
    assert structure.floors(arrows) == {"cellar": 1, "hall": 2, "roof": 3, "tower": 4}
    assert structure.arrows_up(arrows) == []
    assert len(structure.arrows_up({**arrows, "cellar": {"tower"}})) == 1


def test_density_counts_what_it_says():
    """Catches: docstrings counted as code; swaps and marks for tools that count as what they are not."""
    source = '"""Three\nlines\nlong."""\n\na, b = 1, 2  # why\nc = 3 if a else 4  # noqa: X\n(d, e) = f()\n'
    found = structure.density(source)
    assert found == {"lines": 3, "characters": 58, "packed": 1, "conditional": 1, "comments": 1}


SAME_NAME = {
    "app.py": "the Flower app of each side",
    "base.py": "what a plugin of its folder is",
    "files.py": "files on disk; those of a run in `common/config/`",
    "keys.py": "the keys of nodes; the commands about them",
    "ledger.py": "a privacy account; the one of a site",
    "lora.py": "LoRA: the method, and the strategies that know it",
    "messages.py": "what crosses the network; the steps of secure aggregation",
    "secagg.py": "the part of each side in secure aggregation",
    "settings.py": "settings classes; those of [privacy]",
    "spec.py": "the spec of an adapter; how a model gives one",
}
"""File names that occur twice, and the one thing that each of them means."""


def test_no_file_name_means_two_things():
    """Catches: a second file of a name, which a search by name finds in place of the first."""
    names = [Path(module).name for module in MODULES if not module.endswith("__init__.py")]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == set(SAME_NAME)
    assert all(SAME_NAME.values())


def test_every_folder_has_its_tests():
    """Catches: a folder that nobody thought to test; tests that stay behind when their folder moves."""
    folders = {Path(module).parent for module in MODULES if not module.endswith("__init__.py")} - {Path("tsugiki")}
    assert len(folders) > 8
    mirrors = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= mirrors
    sides = {folder for folder in mirrors if folder.parts and folder.parts[0] in ("common", "client", "server")}
    assert sides <= folders


@each_module
def test_modules_are_not_two(module):
    """Catches: a module that has become two."""
    assert len((ROOT / module).read_text("utf-8").splitlines()) <= ALARM_LINES


@each_module
def test_nothing_opens_a_pickle_or_runs_a_models_code(module):
    """Catches: torch.load, pickle, allow_pickle or trust_remote_code on any path."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Call):
            switches = {keyword.arg: keyword.value for keyword in node.keywords}
            for name in ("allow_pickle", "trust_remote_code"):
                assert name not in switches or ast.literal_eval(switches[name]) is False
            assert ast.unparse(node.func) not in {"torch.load", "eval", "exec"}
    assert not imported(ast.walk(parsed(module))) & {"pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve"}


@cache
def private_names_of_flower():
    """Return the attributes with an underscore that Flower's classes have, or keep in dictionaries."""
    package = Path(flwr.__file__).parent
    pattern = re.compile(r"""(?:self\.|")(_[a-z]\w*)\b""")
    return {name for path in package.rglob("*.py") for name in pattern.findall(path.read_text("utf-8"))}


def private_imports(node):
    """Return what an import takes from Flower that is not public."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name.startswith("flwr.")} - set(PUBLIC_IN_FLOWER)
    if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] != "flwr":
        return set()
    names = {alias.name for alias in node.names}
    if node.module in PUBLIC_IN_FLOWER:
        names -= set(importlib.import_module(node.module).__all__)
    return {f"{node.module}.{name}" for name in names}


def private_in_text(text):
    """Return the modules of Flower that a string names and that are not public, as code for another process does."""
    found = re.findall(r"\bflwr\.\w+(?:\.\w+)*", text)
    return {name for name in found if ".".join(name.split(".")[:2]) not in PUBLIC_IN_FLOWER}


def uses_of_private_flower(code):
    """Return all that a module's code uses of Flower's private parts. Its documentation may name them."""
    tree = ast.parse(code)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    private = (private_names_of_flower() - own) | UNDOCUMENTED
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    found = set()
    for node in nodes:
        found |= private_imports(node)
        if isinstance(node, ast.Attribute):
            found |= {node.attr} & private
        elif isinstance(node, ast.keyword):
            found |= {node.arg} & private
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found |= ({node.value} & private) | private_in_text(node.value)
    return found


def test_flowers_private_parts_are_used_in_few_files():
    """Catches: a file that the next version of Flower breaks, and that nobody thought of; a list that has grown old."""
    used = {module for module in MODULES if uses_of_private_flower((ROOT / module).read_text("utf-8"))}
    assert sorted(used) == sorted(USES_FLOWERS_PRIVATE_PARTS)


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("import flwr.proto.node_pb2", {"flwr.proto.node_pb2"}),
        ("def f():\n    from flwr.supercore.run import Run", {"flwr.supercore.run.Run"}),
        ("from flwr import supercore", {"flwr.supercore"}),
        ("from flwr.app import Message\nfrom flwr.app.message import make_message", {"flwr.app.message.make_message"}),
        ("from flwr.app import message", {"flwr.app.message"}),
        ("from flwr.serverapp.strategy import FedAvg\nfrom flwr.simulation import run_simulation", set()),
        ("run([python, '-c', 'from flwr.superlink.cli import flower_superlink'])", {"flwr.superlink.cli"}),
        ('"""As flwr.superlink.cli."""\nimport flwr', set()),
        ('message.metadata.__dict__["_message_id"] = 1', {"_message_id"}),
        ("vars(metadata).update(_message_id=1)", {"_message_id"}),
        ("grid._runtime_client.PullMessages()", {"_runtime_client"}),
        ("strategy.current_arrays = {}\ngetattr(strategy, 'm_t')", {"current_arrays", "m_t"}),
        ("class A:\n    def __init__(self):\n        self._client = 1\n        self._client.close()", set()),
    ],
)
def test_uses_of_flowers_private_parts_are_found(code, used):
    """Catches: a reader that overlooks a use, with which the test above would prove nothing."""
    assert {"_runtime_client", "_message_id"} <= private_names_of_flower()
    assert uses_of_private_flower(code) == used
