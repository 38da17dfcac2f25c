"""A run that has not ended: its figures, report, predictions and export."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import invoke
from tests.support.federation import run_tiny, tiny_config
from tsugiki.common.config.files import read
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import Interrupted, StorageError
from tsugiki.common.files import read_json
from tsugiki.common.tasks.base import Generation
from tsugiki.common.wire.spec import sha256
from tsugiki.server.export.finished import choose, open_graft
from tsugiki.server.predict import predict
from tsugiki.server.report.page import write_report
from tsugiki.server.run import loop
from tsugiki.server.run.so_far import describe_unfinished, summary_of

DONE = 2


def stop_after(monkeypatch, config, rounds):
    """Run until a round is finished, then stop; return the run's folder."""
    finish_round = loop.finish_round

    def finish(ctx, state):
        ctx.stop.requested = state.round == rounds
        return finish_round(ctx, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish_round", finish)
        with pytest.raises(Interrupted):
            run_tiny(config)
    return read_folder(config)


def read_folder(config):
    """Return the folder of a run."""
    return Path(config.run.output_dir) / config.run.name


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of a run of four rounds that was stopped after two, and of the same run of two rounds."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"lr_schedule": "constant", "warmup_ratio": 0.0, "local_steps": 8}
    config = tiny_config(folder, run={"rounds": 4}, train=train, evaluation={"monitor": "eval_loss"})
    with pytest.MonkeyPatch.context() as patch:
        stopped = stop_after(patch, config, DONE)
    ended = run_tiny(changed(config, {"run.name": "ended", "run.rounds": DONE}))
    return stopped, ended.folder


def test_what_is_known_so_far_is_what_the_summary_would_say(both):
    """Catches: the best round of the checkpoint alone, which does not know its own evaluation yet."""
    stopped, ended = both
    found, whole = summary_of(stopped), read_json(ended / "summary.json")
    told = {"name": "tiny", "stopped": "unfinished", "planned_rounds": 4}
    left_out = {"seconds", *told}
    assert {key: value for key, value in found.items() if key not in left_out} == {
        key: whole[key] for key in found if key not in left_out
    }
    assert {key: found[key] for key in told} == told
    assert found["best_round"] == DONE
    assert describe_unfinished(found) == "the run is unfinished: 2 of 4 rounds are done"
    assert describe_unfinished(whole) == ""


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_adapter_so_far_is_that_of_the_shorter_run(both, which):
    """Catches: `run-unfinished` where a checkpoint has the best adapter; or its last one in the best one's place."""
    chosen = []
    for folder in both:
        config = read(folder / "config.toml")
        chosen.append(choose(folder, config, open_graft(folder, config), which))
    assert sha256(chosen[0].vector) == sha256(chosen[1].vector)
    assert chosen[0].round == chosen[1].round == DONE
    assert predict(both[0], ["a good clause"], None, Generation(), which=which) == predict(
        both[1], ["a good clause"], None, Generation(), which=which
    )


def test_the_report_says_that_the_run_is_unfinished(both):
    """Catches: `run-missing` for a run that goes on for days, and a page that looks like a finished one's."""
    stopped, ended = both
    sentence = "The run is unfinished: 2 of 4 rounds are done."
    assert sentence in write_report(stopped).read_text()
    assert sentence not in write_report(ended).read_text()


def test_the_commands_say_that_the_run_is_unfinished(both):
    """Catches: a prediction that is taken for the finished model's, and words among what a script reads."""
    stopped, ended = both
    for folder, words in ((stopped, "the run is unfinished: 2 of 4 rounds are done\n"), (ended, "")):
        found = invoke("predict", folder, "a good clause", "--json")
        assert found.stderr == words
        assert json.loads(found.stdout)
        assert invoke("report", folder).stderr == words


def test_an_export_of_an_unfinished_run_says_so(both, tmp_path, monkeypatch):
    """Catches: an export that nobody can tell from that of the finished run."""
    monkeypatch.setattr("tsugiki.server.export.export.prove", lambda *arguments: None)
    stopped, ended = both
    for folder, words in ((stopped, "2 of 4, the run has not ended; this is"), (ended, "2; this is")):
        target = tmp_path / folder.name
        invoke("export", folder, "--target", target)
        assert words in (target / "README.md").read_text()


def test_a_run_without_a_round_has_no_adapter(tmp_path, monkeypatch):
    """Catches: an untrained adapter that is exported as a result."""
    config = tiny_config(tmp_path)
    folder = stop_after(monkeypatch, config, 0)
    assert summary_of(folder)["rounds"] == 0
    with pytest.raises(StorageError) as caught:
        predict(folder, ["a good clause"], None, Generation())
    assert caught.value.code == "run-unfinished"


def test_an_unfinished_private_run_is_not_called_open(tmp_path, monkeypatch):
    """Catches: a report without the epsilon of the rounds that were done."""
    privacy = {"mode": "local", "noise_multiplier": 4.0, "delta": 1e-5}
    folder = stop_after(monkeypatch, tiny_config(tmp_path, run={"rounds": 3}, privacy=privacy), 1)
    found = summary_of(folder)["privacy"]
    assert (found["mode"], found["private"]) == ("local", True)
    assert found["epsilon"]["uploads"] > 0
    assert "Mode local" in write_report(folder).read_text()
