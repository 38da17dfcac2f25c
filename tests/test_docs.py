"""The documents name what there is."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from tests.support.exports import to_fuse
from tests.support.tiny import tiny_bert
from tsugiki.common import errors
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]


def test_every_code_is_in_the_operators_document():
    """Catches: a code that its reader cannot look up; one that has gone."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    listed = re.findall(r"^\| (`[^|]*`) \|", page, re.M)
    documented = {code for cell in listed for code in re.findall(r"`([a-z0-9-]+)`", cell)}
    assert len(documented) > 80
    assert sorted(documented) == sorted(get_args(errors.KnownCode))


def test_every_code_is_given_somewhere():
    """Catches: a code that stays in the list when the last error with it has gone."""
    paths = [path for side in ("common", "client", "server") for path in (ROOT / side).rglob("*.py")]
    sources = [path.read_text("utf-8") for path in paths if path.name != "errors.py"]
    given = {code for source in sources for code in re.findall(r"""["']([a-z][a-z0-9-]*)(?=["':])""", source)}
    given |= {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    assert sorted(set(get_args(errors.KnownCode)) - given) == []


def test_the_table_of_adapters_is_true(tmp_path):
    """Catches: a method that nobody can read about; a number of parameters that is none any more."""
    import torch
    from transformers import AutoModel, BertConfig

    page = (ROOT / "docs" / "adapters.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)`(?:, `(\w+) = (.*)`)? \| ([0-9,]+) \|", page, re.M)
    assert {method for method, *_ in rows} == set(ADAPTERS.names())
    base = tiny_bert(tmp_path / "base", hidden=384, layers=6)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    for method, key, value, numbers in rows:
        kind = ADAPTERS.get(method)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        named = to_fuse(tmp_path / "adapters", base, placement="pfeiffer") if method == "fusion" else None
        settings = kind.Settings(**({key: json.loads(value)} if key else {"adapters": named} if named else {}))
        trained = [value for value in kind(settings).attach(model, ()).parameters() if value.requires_grad]
        assert f"{sum(value.numel() for value in trained):,}" == numbers, (method, key)


def test_the_tasks_whose_rows_can_be_protected_are_named():
    """Catches: a task that is refused under [privacy.examples], or allowed, and nobody can read it."""
    page = " ".join((ROOT / "docs" / "privacy.md").read_text("utf-8").split())
    (named,) = re.findall(r"The tasks ([^.]*) can be protected so\b", page)
    assert re.findall(r"`([a-z-]+)`", named) == [name for name in TASKS.names() if TASKS.get(name).row_losses]


PROMISES = {
    "docs/threat-model.md": (
        "What the server sees of a site",
        "What a site sees of others",
        "Threats and protections",
        "Exports from elsewhere",
        "Telemetry is off",
    ),
    "docs/privacy.md": (
        "Three modes",
        "What happens to an update",
        "The account",
        "Secure aggregation",
        "A site decides for itself",
        "Rows instead of clients: DP-SGD",
        "Many small clients",
    ),
    "SECURITY.md": ("What is promised",),
}
"""The sections that promise something in each of their paragraphs, list items and rows of tables."""

PROMISES_NOTHING = (
    "Each ✓ leads to",
    "C is the clip norm",
    "So noise of length",
    "Each adversary has a ledger",
    "The description of each key",
    "| an honest server only |",
    "An adapter that someone else exported is treated",
    "None of this shows",
    "How many clients a plan needs",
    "**What this costs.**",
    "- A site that spoils sums may add no noise",
    *(f"| {sites} |" for sites in (2, 3, 5, 10, 100)),  # figures, below the sentence that has their test
)
"""How the blocks in these sections begin that define, lead to another page, or warn."""


def blocks_of(page, title):
    """Return the paragraphs, list items and rows of tables in a section, without code and headings."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    section = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
    section = re.sub(r"^\|.*\|\n\|[-|]+\|$", "", section, flags=re.M)
    section = re.sub(r"^\[[a-z0-9-]+\]: .*$", "", section, flags=re.M)
    section = re.sub(r"^### .*$", "", section, flags=re.M)
    return [block.strip() for block in re.split(r"\n(?=\n|- |\| )", section) if block.strip()]


@pytest.mark.parametrize("name", PROMISES)
def test_every_promise_is_followed_by_its_test(name):
    """Catches: a promise that nothing tests; a link to a test that was renamed; one that no sentence uses."""
    page = (ROOT / name).read_text("utf-8")
    links = {label: target for label, *target in re.findall(r'^\[([a-z0-9-]+)\]: (\S+) "(\w+)"$', page, re.M)}
    assert len(links) > 20
    assert set(re.findall(r"\[✓\]\[([a-z0-9-]+)\]", page)) == set(links)
    for label, (path, test) in links.items():
        file = (ROOT / name).parent / path
        assert file.is_file(), label
        assert re.search(rf"^def {test}\(", file.read_text("utf-8"), re.M), f"{label}: {path} has no {test}"
    for title in PROMISES[name]:
        found = blocks_of(page, title)
        assert found, title
        assert [block for block in found if "[✓]" not in block and not block.startswith(PROMISES_NOTHING)] == []


def test_blocks_without_a_promise_are_found():
    """Catches: a reading of the pages that passes over paragraphs, items or rows."""
    page = "x\n\n## A\n\none\nmore\n\n- two\n  more\n- three\n\n| a |\n|---|\n| four |\n| five |\n\n```\nno\n```\n"
    page += "\n## B\n\nno\n"
    assert blocks_of(page, "A") == ["one\nmore", "- two\n  more", "- three", "| four |", "| five |"]


def test_links_between_documents_lead_somewhere():
    """Catches: a renamed page."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8"))
        if not target.startswith("http")
    ]
    assert len(links) > 5
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []


def test_commands_in_the_documents_exist():
    """Catches: a page that tells people to run what is not there."""
    from typer.main import get_command

    from tsugiki.cli import app

    commands = get_command(app).commands
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.toml")]
    used = []
    for page in pages:
        for line in re.findall(r"(?:^|`|#|=/srv/\S*/)\s*tsugiki ([a-z][^`#\n]*)", page.read_text("utf-8"), re.M):
            used.append((page.name, line.split()))
    assert len(used) > 25
    for page, words in used:
        assert words[0] in commands, f"{page}: tsugiki {' '.join(words)}"
        command = commands[words[0]]
        if hasattr(command, "commands") and len(words) > 1:
            assert words[1] in command.commands, f"{page}: tsugiki {' '.join(words)}"
            command = command.commands[words[1]]
        known = {option for parameter in getattr(command, "params", []) for option in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word.strip(";,.)") in known | {"--help"}, f"{page}: tsugiki {' '.join(words)}"


def mapped():
    """Return the paths in README's map of folders."""
    page = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"## The map\n\n```\n(.*?)```", page, re.DOTALL)
    found, side = [], ""
    for line in block.splitlines():
        names = re.findall(r"(?<![\w/])(\w+\.py|\w+/)", line)
        if not line.startswith(" "):
            side = names.pop(0)
            found.append(side)
        room = ""
        for number, name in enumerate(names):
            if (ROOT / side / name).exists() or not room:
                found.append(side + name)
                room = side + name if name.endswith("/") and number == 0 else room
            else:
                found.append(room + name)
    return found


def test_the_map_in_the_readme_is_the_tree():
    """Catches: a room that a newcomer does not find on the map; a room on the map that is gone."""
    paths = mapped()
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for side in ("common", "client", "server"):
        rooms = {f"{side}/{path.name}/" for path in (ROOT / side).iterdir() if (path / "__init__.py").is_file()}
        rooms |= {f"{side}/{path.name}" for path in (ROOT / side).glob("*.py") if path.name != "__init__.py"}
        assert rooms - set(paths) == set()


def test_paths_in_the_documents_exist():
    """Catches: a page that sends its reader to a file that has moved."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    sides = r"(?<![\w/.])((?:tsugiki|common|client|server|tests|scripts|docs|docker|examples)/[\w/.*-]+)"
    named = [(page, path.rstrip(".")) for page in pages for path in re.findall(sides, page.read_text("utf-8"))]
    # The changelog tells of the past; the pages on adding things name the files that their reader makes.
    apart = ("CHANGELOG.md", "adding-a-task.md", "adding-a-strategy.md")
    named = [(page.name, path) for page, path in named if page.name not in apart]
    assert len(named) > 60
    assert [(page, path) for page, path in named if not list(ROOT.glob(path))] == []
