"""Whole runs from the command line: simulate, serve, compare and the demo."""

import json
import os
import shlex
import signal

import pytest

from tests.support.command_line import invoke
from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import tiny_sentence_transformer
from tsugiki import cli
from tsugiki.common.config.files import to_toml
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ExportError, TsugikiError, UsageError
from tsugiki.common.files import read_lines
from tsugiki.server.commands import runs as commands
from tsugiki.server.demo import demo
from tsugiki.server.run import loop


@pytest.fixture
def no_export(monkeypatch):
    """Put quick stand-ins in the place of export and report, which have tests of their own."""
    monkeypatch.setattr("tsugiki.server.export.export.export", lambda folder, *_, **__: folder / "adapter")
    monkeypatch.setattr("tsugiki.server.report.page.write_report", lambda folder: folder / "report.html")


@pytest.mark.parametrize("command", ["simulate", "serve"])
@pytest.mark.parametrize(
    "arguments", [[], ["run.toml", "--resume", "runs/x"], ["run.toml", "--previous"]], ids=["none", "both", "previous"]
)
def test_a_run_needs_a_file_or_a_folder(command, arguments):
    """Catches: one of two contradicting arguments silently ignored; a start although it is not clear which run."""
    with pytest.raises(UsageError) as caught:
        invoke(command, *arguments)
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
    sorted((done.folder / "checkpoint").glob("round-*"))[-1].write_bytes(b"")
    with pytest.raises(TsugikiError) as caught:
        invoke("simulate", "--resume", done.folder)
    assert caught.value.code == "checkpoint-corrupt"
    assert "--previous" in str(caught.value)
    invoke("simulate", "--resume", done.folder, "--previous")
    lines = [line["round"] for line in read_lines(done.folder / "metrics.jsonl")]
    assert lines == [0, 1, 2]


def test_a_plan_without_hope_is_refused_before_it_costs(tmp_path, no_export):
    """Catches: a budget that is spent for noise, without a word."""
    privacy = {"mode": "distributed", "target_epsilon": 1.0, "secure_aggregation": True, "delta": 1e-5}
    file = write_tiny(tmp_path, run={"rounds": 1}, privacy=privacy, simulation={"clients": 3})
    with pytest.raises(UsageError) as caught:
        invoke("simulate", file, "--set", "strategy.min_clients=3")
    assert caught.value.code == "plan-hopeless"
    assert not list(tmp_path.rglob("privacy-ledger.jsonl"))
    invoke("simulate", file, "--set", "strategy.min_clients=3", "--yes")
    assert list(tmp_path.rglob("privacy-ledger.jsonl"))
    # it was agreed to, so what follows needs no second yes
    invoke("simulate", "--resume", tmp_path / "runs" / "tiny")


@pytest.fixture
def stopped(tmp_path, monkeypatch, no_export):
    """A run in a folder with a space in its name, which is stopped after its first round: its file and its error."""
    folder = tmp_path / "June and July"
    folder.mkdir()
    file = write_tiny(folder, strategy={"min_clients": 1})
    finish_round = loop.finish_round

    def stop_after_one(ctx, state):
        ctx.stop.requested = state.round == 1
        return finish_round(ctx, state)

    monkeypatch.setattr(loop, "finish_round", stop_after_one)
    options = ["--no-export", "--set", "evaluation.every_rounds=2", "--set", "train.local_steps=1", "--json"]
    with pytest.raises(TsugikiError) as caught:
        invoke("simulate", file, *options)
    monkeypatch.setattr(loop, "finish_round", finish_round)
    return file, options, caught.value


def line_of(error):
    """Return the command that an error says goes on, as a shell splits it."""
    (note,) = error.__notes__
    first, line = note.splitlines()
    assert first == "This goes on with the run:"
    return shlex.split(line)


def test_a_run_that_stopped_says_the_line_that_goes_on(stopped):
    """Catches: a line that a shell cuts at a space, that lacks the options, or that is refused when it is pasted."""
    file, options, error = stopped
    program, *arguments = line_of(error)
    assert program == "tsugiki"
    assert arguments == ["simulate", "--resume", str(file.parent / "runs" / "tiny"), *options]
    assert json.loads(invoke(*arguments).stdout)["rounds"] == 2


def test_a_run_that_is_there_says_the_line_that_goes_on_with_it(stopped):
    """Catches: options in the line that the run in the folder cannot take, such as another learning rate."""
    file, _, _ = stopped
    other = ["--set", "train.local_steps=9", "--set", "strategy.min_clients=2", "--set", f"run.name={'tiny'}"]
    with pytest.raises(TsugikiError) as caught:
        invoke("simulate", file, *other)
    assert caught.value.code == "run-exists"
    _, *arguments = line_of(caught.value)
    assert arguments[3:] == ["--set", "strategy.min_clients=2"]
    invoke(*arguments)


def test_a_start_that_did_no_round_has_no_such_line(tmp_path, monkeypatch, no_export):
    """Catches: `--resume` advised where the same command starts."""
    file = write_tiny(tmp_path)
    with pytest.raises(TsugikiError) as caught:
        invoke("simulate", file, "--set", "strategy.max_update_norm=1e-9")
    assert caught.value.code == "quorum-not-met"
    assert not hasattr(caught.value, "__notes__")
    invoke("simulate", file)


def test_the_line_is_below_the_message(stopped, monkeypatch, capsys):
    """Catches: a line that ends in the full stop of a sentence, or is not shown at all."""
    error = stopped[2]
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("tsugiki: interrupted: ")
    assert shlex.split(shown[-1]) == line_of(error)


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
    file = write_tiny(
        tmp_path, run={"rounds": 1}, evaluation={"at_sites": True}, simulation={"evaluation_fraction": 0.3}
    )
    results = json.loads(invoke("compare", file, "--json").stdout)
    assert [name for name in results if isinstance(results[name], dict)] == list(results)
    assert {"federated", "untouched", "local", "centralised", "own_rows", "learning_rates"} <= results.keys()
    assert sorted(results["local"]) == ["site-0", "site-1"]
    shown = invoke("compare", file, "--no-search", "--set", "run.name=second").stdout
    for row in ("none (base model)", "site-0 alone", "average site alone", "federated", "all data in one place"):
        assert row in shown
    assert "each site's own rows" in shown
    assert not list((tmp_path / "runs" / "second" / "baselines").glob("search-*"))


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
