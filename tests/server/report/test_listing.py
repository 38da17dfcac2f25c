"""What is listed of the runs in a folder."""

import pytest

from tests.support.federation import run_tiny, tiny_config
from tests.support.toy import federate, toy_app, toy_config
from tsugiki.common.audit import verify
from tsugiki.common.errors import NotEnoughSites, StorageError
from tsugiki.common.files import locked
from tsugiki.server.report.listing import list_runs, look_at


def test_every_run_is_listed_with_its_state(tmp_path, monkeypatch):
    """Catches: a folder with one broken run that cannot be listed at all; a run without a round called finished."""
    ended = run_tiny(tiny_config(tmp_path))
    runs = ended.folder.parent
    with pytest.raises(NotEnoughSites):
        federate(
            monkeypatch, toy_app([]), 0, toy_config(runs, run={"name": "alone"}, strategy={"connect_timeout_s": 0.1})
        )
    broken = runs / "broken"
    broken.mkdir()
    (broken / "config.toml").write_text("[run")
    (runs / "else").mkdir()
    found = {run.name: run for run in list_runs(runs)}
    assert {name: run.state for name, run in found.items()} == {
        "tiny": "finished",
        "alone": "no round",
        "broken": "config-invalid",
    }
    tiny = found["tiny"]
    assert (tiny.rounds, tiny.planned_rounds, tiny.sites) == (2, 2, {"site-0": 2, "site-1": 2})
    assert (tiny.monitor, tiny.best, tiny.best_round) == (
        "accuracy",
        ended.summary["after"]["accuracy"],
        ended.summary["best_round"],
    )
    events = verify(ended.folder / "audit.jsonl")
    assert (tiny.begun, tiny.last) == (events[0]["time"], events[-1]["time"])
    assert [run.name for run in list_runs(runs)] == ["broken", "tiny", "alone"]
    with locked(ended.folder / ".lock"):
        assert look_at(ended.folder).state == "running"


def test_what_is_no_run_is_refused(tmp_path):
    """Catches: an empty list for a mistyped folder."""
    for look in (list_runs, look_at):
        with pytest.raises(StorageError) as caught:
            look(tmp_path / "nowhere")
        assert caught.value.code == "run-missing"
    assert list_runs(tmp_path) == []
