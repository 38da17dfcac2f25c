import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

import tsugiki
from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import tiny_sentence_transformer
from tsugiki import cli
from tsugiki.client.app import simulated_app
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.files import read, to_toml
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, ExportError, RegistryError, TsugikiError, UsageError
from tsugiki.common.files import read_lines
from tsugiki.common.strategies.settings import STRATEGY_SETTINGS
from tsugiki.common.tasks import TASKS
from tsugiki.server import doctor
from tsugiki.server.commands import runs as commands
from tsugiki.server.demo import run as demo


def invoke(*arguments):
    """Run the command line in this process; an error of ours is raised."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def no_export(monkeypatch):
    """Put quick stand-ins in the place of export and report, which have tests of their own."""
    monkeypatch.setattr("tsugiki.server.export.export.export", lambda folder, *_, **__: folder / "adapter")
    monkeypatch.setattr("tsugiki.server.report.page.write_report", lambda folder: folder / "report.html")


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
    for section, registry in (("task", TASKS), ("adapter", ADAPTERS), ("strategy", STRATEGY_SETTINGS)):
        choices = schema["properties"][section]["anyOf"]
        classes = [
            entry.Settings if hasattr(entry, "Settings") else entry for entry in map(registry.get, registry.names())
        ]
        assert len(choices) == len(classes) >= 2
        for choice, settings in zip(choices, classes, strict=True):
            assert set(choice["properties"]) == set(settings.model_fields)


@pytest.mark.parametrize(
    "arguments", [[], ["run.toml", "--resume", "runs/x"], ["run.toml", "--previous"]], ids=["none", "both", "previous"]
)
def test_simulate_needs_a_file_or_a_run(arguments):
    """Catches: one of two contradicting arguments silently ignored."""
    with pytest.raises(UsageError) as caught:
        invoke("simulate", *arguments)
    assert caught.value.exit_status == 2


def write_tiny(folder, **sections):
    """Write a tiny run's file."""
    file = folder / "tiny.toml"
    file.write_text(to_toml(tiny_config(folder, **sections)))
    return file


def test_simulate_prints_one_json_object(tmp_path, no_export):
    """Catches: progress, warnings or a table among the output that a script reads."""
    result = invoke("simulate", write_tiny(tmp_path), "--set", "run.rounds=1", "--json")
    summary = json.loads(result.stdout)
    folder = tmp_path / "runs" / "tiny"
    assert (summary["rounds"], summary["folder"]) == (1, str(folder))
    assert (summary["adapter"], summary["report"]) == (str(folder / "adapter"), str(folder / "report.html"))


def test_simulate_shows_a_table(tmp_path, no_export):
    """Catches: a result that the operator does not see."""
    shown = invoke("simulate", write_tiny(tmp_path), "--set", "run.rounds=1").stdout
    for words in ("accuracy", "bytes up, all rounds", "report.html"):
        assert words in shown


@pytest.mark.parametrize("code", ["no-public-name", "export-unsupported"])
def test_a_run_without_evaluation_or_public_name_ends_well(tmp_path, no_export, monkeypatch, code):
    """Catches: a summary that cannot be shown without metrics, and a run that fails because it cannot be exported."""

    def refuse(folder):
        raise ExportError("it cannot be", code=code)

    monkeypatch.setattr("tsugiki.server.export.export.export", refuse)
    file = write_tiny(tmp_path, evaluation={"data": ""}, run={"rounds": 1})
    result = invoke("simulate", file)
    assert "accuracy" not in result.stdout
    assert "bytes up, all rounds" in result.stdout
    assert "not exported" in result.stderr


def test_simulate_resumes_a_run_wherever_it_was_moved(tmp_path, no_export, monkeypatch):
    """Catches: a resume that writes where the run was, and a relative path taken from elsewhere."""
    run_tiny(tiny_config(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "runs" / "tiny", tmp_path / "elsewhere" / "tiny")
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = invoke("simulate", "--resume", "tiny", "--json")
    assert json.loads(result.stdout)["folder"] == str(tmp_path / "elsewhere" / "tiny")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_previous_goes_back_one_round(tmp_path, no_export):
    """Catches: --previous that is read and ignored: then the damaged checkpoint is refused again."""
    done = run_tiny(tiny_config(tmp_path))
    current = json.loads((done.folder / "checkpoint" / "current.json").read_bytes())
    (done.folder / "checkpoint" / current["tensors"]).write_bytes(b"")
    with pytest.raises(TsugikiError) as caught:
        invoke("simulate", "--resume", done.folder)
    assert caught.value.code == "checkpoint-corrupt"
    assert "--previous" in str(caught.value)
    invoke("simulate", "--resume", done.folder, "--previous")
    lines = [line["round"] for line in read_lines(done.folder / "metrics.jsonl")]
    assert lines == [0, 1, 2]


def test_the_first_signal_stops_the_run_and_the_second_the_program(capsys):
    """Catches: a Ctrl-C that loses the round's end, and a program that cannot be stopped."""
    before = signal.getsignal(signal.SIGINT)
    with commands.stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert "again to stop at once" in capsys.readouterr().err
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_compare_shows_all_four(tmp_path, no_export):
    """Catches: a baseline that is computed and not shown."""
    file = write_tiny(tmp_path, run={"rounds": 1})
    results = json.loads(invoke("compare", file, "--json").stdout)
    assert list(results) == ["federated", "untouched", "local", "centralised"]
    assert sorted(results["local"]) == ["site-0", "site-1"]
    shown = invoke("compare", file, "--set", "run.name=second").stdout
    for row in ("none (base model)", "site-0 alone", "average site alone", "federated", "all data in one place"):
        assert row in shown


def test_compare_needs_something_to_compare_by(tmp_path):
    """Catches: training for nothing."""
    with pytest.raises(UsageError):
        invoke("compare", write_tiny(tmp_path, evaluation={"data": ""}))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """Let the demo run on a tiny model, for one round, and evaluate on twelve rows."""
    make_data, demo_config = demo.make_data, demo.demo_config

    def few(folder, seed):
        files = make_data(folder, seed)
        for file in (files.test_retrieval, files.test_scored):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:13]))
        return files

    def tiny(*arguments):
        raw = demo_config(*arguments).model_dump(mode="json")
        raw["model"]["name"] = str(tmp_path / "model")
        raw["run"]["rounds"] = raw["train"]["local_steps"] = raw["train"]["threads"] = 1
        return parse(raw)

    tiny_sentence_transformer(tmp_path / "model")
    monkeypatch.setattr(demo, "make_data", few)
    monkeypatch.setattr(demo, "demo_config", tiny)


def test_demo_ends_with_what_was_gained(tmp_path, no_export, small_demo):
    """Catches: a part of the demo that is not shown, and a second demo that stumbles over the first."""
    summary = json.loads(invoke("demo", "--output-dir", tmp_path / "runs", "--json").stdout)
    assert sorted(summary["local"]) == ["clinic", "logistics", "retail", "software"]
    assert {"untouched", "federated", "pearson", "seconds", "adapter", "report"} <= set(summary)
    shown = invoke("demo", "--output-dir", tmp_path / "runs", "--no-baselines").stdout
    for words in ("none (base model)", "federated", "pearson on scored pairs", "demo-2"):
        assert words in shown
    assert "alone" not in shown


def test_doctor_tells_and_fails_where_something_is_missing(monkeypatch):
    """Catches: exit status 0 of a machine that cannot run anything, and advice that is not shown."""
    assert invoke("doctor").exit_code == 0
    bad = doctor.Finding("flwr", "not installed", False, True, "pip install flwr")
    monkeypatch.setattr(doctor, "examine", lambda: [bad])
    result = invoke("doctor")
    assert (result.exit_code, result.stdout) == (1, "FAIL flwr: not installed  -> pip install flwr\n")
    assert json.loads(invoke("doctor", "--json").stdout)[0]["do"] == "pip install flwr"


def test_export_and_report_print_where(tmp_path, no_export):
    """Catches: a path that a script cannot read."""
    assert invoke("export", tmp_path).stdout == f"{tmp_path / 'adapter'}\n"
    assert invoke("report", tmp_path).stdout == f"{tmp_path / 'report.html'}\n"


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


def test_site_names_come_from_the_audit_log(tmp_path):
    """Catches: sites missing from a comparison, or listed twice after a resume."""
    done = run_tiny(tiny_config(tmp_path, run={"rounds": 1}), simulated_app)
    run_tiny(tiny_config(tmp_path, run={"rounds": 1}), simulated_app, resume=True)
    assert commands.site_names(done.folder) == ["site-0", "site-1"]
