"""Run files: the one that is written, what one resolves to, and the schema."""

import json

import pytest

from tests.support.command_line import invoke
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.files import read
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, RegistryError, TsugikiError, UsageError
from tsugiki.common.strategies import STRATEGIES
from tsugiki.common.tasks import TASKS


def test_init_writes_every_setting_at_its_default(tmp_path):
    """Catches: a written file that is not the defaults, or does not parse."""
    for task in TASKS.names():
        for method in ADAPTERS.names():
            file = tmp_path / f"{task}-{method}.toml"
            assert invoke("config", "init", file, "--task", task, "--method", method).stdout == f"{file}\n"
            assert read(file) == parse({"task": {"name": task}, "adapter": {"method": method}})
            assert {*RunConfig.model_fields, "privacy.examples"} == {
                line.strip("[]") for line in file.read_text().splitlines() if line.startswith("[")
            }


def test_init_does_not_write_over_a_file(tmp_path):
    """Catches: an edited run file lost."""
    (tmp_path / "federation.toml").write_text("mine")
    with pytest.raises(UsageError):
        invoke("config", "init", tmp_path / "federation.toml")
    assert (tmp_path / "federation.toml").read_text() == "mine"


@pytest.mark.parametrize("option", ["--task", "--method", "--strategy"])
def test_init_refuses_an_unknown_name_and_leaves_no_file(tmp_path, option):
    """Catches: an empty file left behind, and a message without the known names."""
    with pytest.raises((ConfigError, RegistryError), match="one of"):
        invoke("config", "init", tmp_path / "run.toml", option, "nonsense")
    assert list(tmp_path.iterdir()) == []


def test_init_in_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path):
    """Catches: a traceback."""
    with pytest.raises(TsugikiError, match="Cannot write"):
        invoke("config", "init", tmp_path / "missing" / "run.toml")


@pytest.fixture
def run_file(tmp_path):
    """A run file with settings from all sources."""
    file = tmp_path / "run.toml"
    file.write_text(
        '[run]\nname = "clauses"\n[train]\nlearning_rate = 2e-4\nlocal_steps = 7\n[data.columns]\ntext = "sentence"\n'
    )
    return file


def sources(output):
    """Return the source of each shown setting, by its name."""
    lines = [line for line in output.splitlines() if "  # " in line]
    return {line.split(" = ")[0]: line.rsplit("  # ", 1)[1] for line in lines}


def test_show_tells_where_each_setting_comes_from(run_file):
    """Catches: a setting from the command line or the file shown as a default."""
    shown = sources(invoke("config", "show", run_file, "--set", "run.rounds=3").stdout)
    file = str(run_file)
    expected = {"rounds": "--set", "local_steps": file, "seed": "default", "text": file}
    assert {name: shown[name] for name in expected} == expected


def test_show_as_json_is_the_resolved_file(run_file):
    """Catches: anything else among the output that a script reads."""
    shown = json.loads(invoke("config", "show", run_file, "--set", "run.rounds=3", "--json").stdout)
    assert shown == read(run_file, ["run.rounds=3"]).model_dump(mode="json")


def test_show_without_json_is_toml(run_file):
    """Catches: a shown file that cannot be used as one."""
    text = invoke("config", "show", run_file).stdout
    again = run_file.with_name("again.toml")
    again.write_text(text)
    assert read(again) == read(run_file)


def test_the_schema_knows_every_setting_of_every_choice():
    """Catches: a task, method or strategy, or a setting of theirs, that the schema refuses."""
    schema = json.loads(invoke("config", "schema").stdout)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    for section, registry in (("task", TASKS), ("adapter", ADAPTERS), ("strategy", STRATEGIES)):
        choices = schema["properties"][section]["anyOf"]
        classes = [entry.Settings for entry in map(registry.get, registry.names())]
        assert len(choices) == len(classes) >= 2
        for choice, settings in zip(choices, classes, strict=True):
            assert set(choice["properties"]) == set(settings.model_fields)
