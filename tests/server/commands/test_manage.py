"""`tsugiki runs`, and its commands; tests/e2e/test_queue.py stops a run of another process."""

import json
import threading

import pytest

from tests.support.command_line import invoke, printed
from tests.support.federation import run_tiny, tiny_config
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import Interrupted, TsugikiError
from tsugiki.common.files import locked
from tsugiki.server.run import loop
from tsugiki.server.run.storage import STOP_FILE


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a finished run."""
    return run_tiny(tiny_config(tmp_path_factory.mktemp("runs"))).folder


def test_runs_are_listed(ended):
    """Catches: a list without the rounds, the metric, the times or the sites; one that a script cannot read."""
    shown = " ".join(printed("runs", "--dir", ended.parent).split())
    (run,) = json.loads(printed("runs", "--dir", ended.parent, "--json"))
    for words in ("tiny", "finished", "2 of 2", "accuracy", "site-0", "site-1"):
        assert words in shown
    assert run["begun"][:10] in shown
    assert run["sites"] == {"site-0": 2, "site-1": 2}


def test_one_run_is_shown(ended):
    """Catches: a site that was in few rounds, and nobody sees it."""
    shown = printed("runs", "show", ended)
    assert "rounds: 2 of 2\n" in shown
    assert "  site-1: in 2 rounds\n" in shown
    assert json.loads(printed("runs", "show", ended, "--json"))["state"] == "finished"


def test_only_a_running_run_is_stopped(ended):
    """Catches: a request to stop that is left behind, and ends the run when it goes on."""
    with pytest.raises(TsugikiError, match="is not running"):
        invoke("runs", "stop", ended)
    assert not (ended / STOP_FILE).exists()


def test_a_run_stops_when_it_is_asked_and_goes_on_later(tmp_path, monkeypatch):
    """Catches: a request that is not heard, or is still there when the run goes on; a half round in its folder."""
    config = tiny_config(tmp_path, run={"rounds": 3})
    folder = tmp_path / "runs" / "tiny"
    said = []
    finish_round = loop.finish_round

    def ask_after_one(ctx, state):
        state = finish_round(ctx, state)
        if state.round == 1:
            asking = threading.Thread(target=lambda: said.append(printed("runs", "stop", folder)))
            asking.start()
            while not (folder / STOP_FILE).exists() and asking.is_alive():
                pass
            threads.append(asking)
        return state

    threads = []
    monkeypatch.setattr(loop, "finish_round", ask_after_one)
    with pytest.raises(Interrupted):
        run_tiny(config)
    threads[0].join(30)
    assert said == [f"tiny has stopped after 1 of 3 rounds; --resume {folder} goes on\n"]
    assert not (folder / STOP_FILE).exists()
    monkeypatch.setattr(loop, "finish_round", finish_round)
    whole = run_tiny(changed(config, {"run.name": "whole"}))
    assert run_tiny(config, resume=True).summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_a_run_is_removed_after_a_yes_only(tmp_path):
    """Catches: adapters that are gone by a slip; a folder removed that is in use, or is no run."""
    folder = run_tiny(tiny_config(tmp_path)).folder
    assert invoke("runs", "rm", folder).exit_code == 1  # nobody says yes
    with locked(folder / ".lock"), pytest.raises(TsugikiError) as caught:
        invoke("runs", "rm", folder, "--yes")
    assert caught.value.code == "locked"
    with pytest.raises(TsugikiError):
        invoke("runs", "rm", tmp_path, "--yes")
    assert (folder / "summary.json").exists()
    invoke("runs", "rm", folder, "--yes")
    assert not folder.exists()
    assert (tmp_path / "train.csv").exists()
