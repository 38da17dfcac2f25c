"""The command line as a whole: help, and what it costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
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


def test_the_help_lists_every_command_in_its_order():
    """Catches: commands in the order of the modules that declare them; one that is left out, or listed twice."""
    group = typer.main.get_command(cli.app)
    listed = group.list_commands(typer.Context(group))
    assert sorted(listed) == sorted(group.commands)
    assert listed[:4] == ["demo", "simulate", "serve", "client"]
    assert listed[-3:] == ["config", "keys", "site"]
    group.commands["another"] = group.commands["demo"]
    assert group.list_commands(typer.Context(group)) == [*listed, "another"]


def test_importing_the_command_line_imports_nothing_heavy():
    """Catches: a heavy import at the top of a module: `tsugiki --help` has to answer in half a second."""
    script = (
        "import sys, json\nfrom tsugiki import cli\n"
        "from typer.testing import CliRunner\n"
        "for words in ([], ['simulate'], ['client'], ['config', 'init'], ['keys', 'new'], ['methods'], ['predict']):\n"
        "    assert CliRunner().invoke(cli.app, [*words, '--help']).exit_code == 0\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    heavy = {
        "pydantic",
        "torch",
        "flwr",
        "transformers",
        "peft",
        "sentence_transformers",
        "numpy",
        "pyarrow",
        "matplotlib",
        "ray",
    }
    assert heavy & set(json.loads(done.stdout)) == set()


def test_an_error_becomes_one_message_and_an_exit_status(tmp_path):
    """Catches: a traceback, a message on standard output, the wrong exit status of the real program."""
    (tmp_path / "wrong.toml").write_text(tomli_w.dumps({"train": {"learning_rate": -1.0, "stepz": 3}}))
    command = [sys.executable, "-m", "tsugiki", "config", "show", "wrong.toml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0] == "tsugiki: config-invalid: wrong.toml: 2 problems"
    assert [line.split(" = ")[0].strip() for line in lines[1:]] == ["train.learning_rate", "train.stepz"]
