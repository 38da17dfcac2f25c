"""The command line as a whole: help, and what it costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import tsugiki
from tsugiki import cli
from tsugiki.common import __version__


def commands():
    """Return the words of every command and group."""
    found = []

    def walk(group, words):
        for name, command in group.commands.items():
            found.append((*words, name))
            if hasattr(command, "commands"):
                walk(command, (*words, name))

    walk(typer.main.get_command(cli.app), ())
    return found


def help_of(*words):
    """Return the help text of a command, as on a wide terminal."""
    result = CliRunner().invoke(cli.app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    return result.stdout


def test_the_commands_are_there():
    """Catches: a command of the design that is not registered; the other tests loop over what is."""
    names = {" ".join(words) for words in commands()}
    expected = (
        "demo simulate compare export predict report doctor config|init config|show config|schema site|init site|check"
    )
    assert {"site check", *(name.replace("|", " ") for name in expected.split())} <= names


def test_the_version_is_the_packages():
    """Catches: a version of the command line's own."""
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"{__version__}\n"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(words):
    """Catches: a command or an option without a word about it."""
    text = help_of(*words)
    is_group = f"Usage: {words[-1]}" not in text and "COMMAND" in text.splitlines()[1]
    assert is_group or f"tsugiki {' '.join(words)}" in text.split("Example", 1)[1]
    for line in text.splitlines():
        if line.startswith("│ --") or line.startswith("│ *"):
            assert len(line.strip("│ ").split("  ")) > 1, line


def test_importing_the_command_line_imports_nothing_heavy():
    """Catches: a heavy import at the top of a module: `tsugiki --help` has to answer in half a second."""
    script = (
        "import sys, json\nfrom tsugiki import cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['simulate', '--help']).exit_code == 0\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    heavy = {"torch", "flwr", "transformers", "peft", "sentence_transformers", "numpy", "pyarrow", "matplotlib", "ray"}
    assert heavy & set(json.loads(done.stdout)) == set()
