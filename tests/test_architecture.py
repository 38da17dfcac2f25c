"""The shape of the code: who imports whom, what is imported when, and that every module has its tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    [
        "tsugiki.py",
        *(
            p.relative_to(ROOT).as_posix()
            for side in ("common", "client", "server")
            for p in (ROOT / side).rglob("*.py")
        ),
    ]
)

HEAVY = {"torch", "transformers", "peft", "sentence_transformers", "sklearn", "scipy", "matplotlib", "pyarrow", "ray"}
"""What takes long to import. `tsugiki --help` and a refused run file answer without any of them."""

FORBIDDEN = {
    "common": {"client", "server", "tsugiki", "tests"},
    "client": {"server", "tsugiki", "tests"},
    "server": {"client", "tsugiki", "tests"},
    "tsugiki.py": {"tests"},
}

WITHOUT_A_TEST_FILE = {
    "client/channel.py": "tests/client/test_connection.py calls it over real gRPC, as a node does",
    "client/job.py": "data alone; tests/client/test_cohort.py and test_vectorised.py build and read it",
    "common/adapters/base.py": "abstract; tests/contract/test_adapters.py tests every class behind it",
    "common/data/demo_test_clauses.py": "prose; tests/common/data/test_demo.py reads it",
    "common/data/demo_training_clauses.py": "prose; tests/common/data/test_demo.py reads it",
    "server/finished.py": "tests/server/test_export.py and test_predict.py open finished and damaged runs with it",
    "server/parts.py": "data alone; tests/server/test_collect.py and test_loop.py build and read it",
}

MOST_LINES = 320
MOST_DECLARATIONS = 400
"""Lines of tsugiki.py, which declares each command with its options, and does nothing else."""

each_module = pytest.mark.parametrize("module", MODULES)


def parsed(module):
    """Return the syntax tree of a module."""
    return ast.parse((ROOT / module).read_text("utf-8"))


def imported(nodes):
    """Return the top-level names of all imports among syntax nodes."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module.split(".")[0])
    return names


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
    """Catches: a server that fetches the client behind the scenes."""
    assert {"client", "server"} <= imported(ast.walk(parsed("tsugiki.py")))
    assert not imported(run_at_import(parsed("tsugiki.py").body)) & {"client", "server", "common"}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(("common/", "tsugiki"))])
def test_nothing_heavy_is_imported_with_a_module(module):
    """Catches: an `import torch` at the top, which every `tsugiki --help` would wait for."""
    assert not imported(run_at_import(parsed(module).body)) & (HEAVY | {"flwr", "huggingface_hub", "safetensors"})


def test_nothing_heavy_is_imported_by_way_of_others():
    """Catches: a light library that imports a heavy one, or starts to with its next version."""
    names = [module.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for module in MODULES]
    wanted = [name for name in names if name.startswith(("common", "tsugiki"))]
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


@pytest.mark.parametrize("module", [module for module in MODULES if not module.endswith("__init__.py")])
def test_every_module_has_its_test_file(module):
    """Catches: a module that nobody thought to test; an exception that is none any more."""
    path = Path(module)
    mirror = ROOT / "tests" / path.parent / f"test_{path.name}"
    assert mirror.is_file() != (module in WITHOUT_A_TEST_FILE), mirror.relative_to(ROOT)


def test_exceptions_exist():
    """Catches: a list of exceptions that outlives its modules."""
    assert set(WITHOUT_A_TEST_FILE) <= set(MODULES)
    assert all(WITHOUT_A_TEST_FILE.values())


@each_module
def test_modules_stay_short(module):
    """Catches: a module that has become two."""
    most = MOST_DECLARATIONS if module == "tsugiki.py" else MOST_LINES
    assert len((ROOT / module).read_text("utf-8").splitlines()) <= most


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
