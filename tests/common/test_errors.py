"""The tree of errors, as drawn and as written."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from tsugiki.common import errors
from tsugiki.common.errors import ConfigError, Problem, TsugikiError, WireError

ROOT = Path(__file__).resolve().parents[2]

LINE = re.compile(r"^(?P<lead>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: +(?P<status>\d+)  \S.*)?$")


def drawn():
    """Return {class name: (parent's name, exit status)} as the module's docstring draws it."""
    tree, path = {}, []
    for line in errors.__doc__.splitlines():
        if matched := LINE.match(line):
            depth = len(matched["lead"]) // 4
            path[depth:] = [matched["name"]]
            parent, status = (path[depth - 1] if depth else "Exception"), matched["status"] or "1"
            tree[matched["name"]] = (parent, int(status))
    return tree


def written():
    """Return the same of the classes that the module defines."""
    classes = inspect.getmembers(
        errors, lambda member: inspect.isclass(member) and member.__module__ == "tsugiki.common.errors"
    )
    return {name: kind for name, kind in classes if issubclass(kind, Exception)}


def test_the_tree_in_the_docstring_is_the_tree():
    """Catches: a class added, renamed, moved or given another exit status without the drawing; an empty drawing."""
    real = {name: (kind.__bases__[0].__name__, kind.exit_status) for name, kind in written().items()}
    assert len(real) > 10
    assert drawn() == real
    assert all(len(kind.__bases__) == 1 for kind in written().values())


def test_public_names():
    """Catches: a helper that leaks out of the module that everybody imports from."""
    public = {
        name for name, member in vars(errors).items() if getattr(member, "__module__", "") == "tsugiki.common.errors"
    }
    assert {name for name in public if not name.startswith("_")} == {*drawn(), "Problem", "WireCode"}


def test_codes_are_kebab_case_and_statuses_are_sane():
    """Catches: a code that cannot cross the network; an exit status that a shell takes for success or for a signal."""
    from tsugiki.common.wire.messages import _CODE

    kinds = written().values()
    assert all(_CODE.fullmatch(kind.code) for kind in kinds)
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(1 <= kind.exit_status <= 20 or kind.exit_status == 130 for kind in kinds)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("3 rows",), "3 rows."),
        (("3 rows.", "at least 4."), "3 rows. Expected at least 4."),
        (("3 rows", "at least 4", "add rows"), "3 rows. Expected at least 4. Try: add rows."),
        (("3 rows", "", "add rows"), "3 rows. Try: add rows."),
        (("no server", "HOST:PORT"), "No server. Expected HOST:PORT."),
        (("round 3: no reply",), "Round 3: no reply."),
        (("this client's own key", "", "a\n"), "This client's own key. Try: a\n."),
        (("train.momentum = 0.9",), "train.momentum = 0.9."),
        (("clients = 3",), "clients = 3."),
        (("runs/first is locked",), "runs/first is locked."),
        (("clauses.csv: line 3",), "clauses.csv: line 3."),
        (("localhost:9092 cannot be reached",), "localhost:9092 cannot be reached."),
        (("site-1 has gone",), "site-1 has gone."),
        (("`tsugiki keys`",), "`tsugiki keys`."),
        (("'bank' is no name",), "'bank' is no name."),
    ],
)
def test_three_parts_as_sentences(parts, text):
    """Catches: doubled full stops; "Expected" with nothing behind it; a path, key or address with a capital."""
    assert str(TsugikiError(*parts)) == text


def test_code_of_an_instance_is_its_own():
    """Catches: a code set on the class, where the next error would inherit it."""
    assert WireError("x", code="shape").code == "shape"
    assert WireError("x").code == WireError.code == "decode"


@pytest.mark.parametrize(("count", "headline"), [(1, "run.toml: 1 problem"), (3, "run.toml: 3 problems")])
def test_config_error_lists_every_problem(count, headline):
    """Catches: an error that shows the first problem only; a plural of one."""
    problems = [Problem(f"run.key_{n}", str(n), "a name", "rename it" if n else "") for n in range(count)]
    error = ConfigError("run.toml", problems)
    lines = str(error).splitlines()
    assert lines[0] == headline
    assert lines[1:] == [f"  {problem}" for problem in problems]
    assert str(problems[0]) == "run.key_0 = 0: must be a name."
    assert error.problems == tuple(problems)
    if count > 1:
        assert lines[2] == "  run.key_1 = 1: must be a name. Try: rename it."


def raised():
    """Return the parts of each error and problem in the program that are plain strings: (place, part, text)."""
    kinds, found = {*written(), "Problem"}, []
    for path in sorted(one for side in ("common", "client", "server") for one in (ROOT / side).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in kinds:
                continue
            names = (
                ("key", "value", "expected", "hint") if node.func.id == "Problem" else ("problem", "expected", "hint")
            )
            given = dict(zip(names, node.args, strict=False)) | {word.arg: word.value for word in node.keywords}
            for name, value in given.items():
                parts = value.values if isinstance(value, ast.JoinedStr) else [value]
                if name in ("problem", "expected", "hint") and isinstance(parts[-1], ast.Constant):
                    found.append((f"{path.name}:{node.lineno}", name, ast.unparse(value), parts))
    return found


def test_texts_fit_into_the_sentences():
    """Catches: "Expected expected", "must be must", "Try: Try", and a part that brings its own full stop or capital."""
    texts = raised()
    assert len(texts) > 300
    for place, name, text, parts in texts:
        first, last = parts[0], parts[-1].value
        assert not str(last).endswith("."), (place, text)
        if isinstance(first, ast.Constant) and first.value:
            assert not re.match(r"(expected|must|try|do)\b", first.value, re.I), (place, text)
            assert name == "expected" or not re.match(r"(A|An|The|No|This) ", first.value), (place, text)
