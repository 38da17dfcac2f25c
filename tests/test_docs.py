"""The documents name what there is."""

import ast
import re
from pathlib import Path

from common import errors

ROOT = Path(__file__).resolve().parents[1]


def codes():
    """Return every code in the program: of classes, and given to an error, a rejection or a check."""
    found = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    for path in [p for side in ("common", "client", "server") for p in (ROOT / side).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                given = [part for word in node.keywords if word.arg == "code" for part in ast.walk(word.value)]
                if name in ("Rejected", "Unacceptable", "_refusal", "_allow"):
                    given += node.args[-1:] if name != "Rejected" else node.args[1:2]
                found |= {one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    roster = (ROOT / "server" / "roster.py").read_text("utf-8")
    return {code for code in found | set(re.findall(r'^ +"([a-z-]+)": ', roster, re.M)) if code}


def test_every_code_is_in_the_operators_document():
    """Catches: a code that its reader cannot look up; one that has gone."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    listed = set(re.findall(r"^\| (`[^|]*`) \|", page, re.M))
    documented = {code for cell in listed for code in re.findall(r"`([a-z:-]+)`", cell)}
    assert len(codes()) > 80
    assert sorted(codes() - documented) == []
    elsewhere = {"dropout", "client-error", "out-of-memory", "shard-one-class"}  # constants, and a note
    assert sorted(documented - codes() - elsewhere) == []


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

    from tsugiki import app

    commands = get_command(app).commands
    used = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        used |= set(re.findall(r"tsugiki ([a-z]+)(?: ([a-z]+))?", page.read_text("utf-8")))
    groups = {name for name, command in commands.items() if hasattr(command, "commands")}
    called = {first for first, _ in used if first in commands}
    assert {"serve", "client", "certs", "keys", "site", "config", "simulate"} <= called
    for first, second in used:
        if first in groups and second:
            assert second in commands[first].commands, f"tsugiki {first} {second}"
