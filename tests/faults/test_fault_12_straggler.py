"""Fault 12: a site answers after the deadline."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.federation import hurry, leaks, run_tiny, tiny_config
from tests.support.toy import SPEC, is_train, mostly_two, run_toy, toy_app, toy_config
from tsugiki.client.training import trainer
from tsugiki.common.audit import verify
from tsugiki.common.errors import QuorumNotMet


@pytest.mark.parametrize("late_first", [True, False])
def test_a_late_reply_is_a_dropout_and_ignored_when_it_comes(tmp_path, monkeypatch, late_first):
    """Catches: an update of round 1 averaged into round 2, a site counted twice, a round that waits for ever."""
    hurry(monkeypatch)
    late = []

    def fault(node, reply):
        if not is_train(reply) or node != 2:
            return [reply]
        if not late:
            late.append(reply)
            return []
        return [late[0], reply] if late_first else [reply, late[0]]

    config = toy_config(tmp_path, run={"rounds": 2}, strategy={"max_update_norm": 1000.0, "norm_tolerance": 0.0})
    ran = run_toy(tmp_path, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=fault)
    first, second = ran.rounds
    assert (first["rejected"], first["dropouts"]) == ({"b": {"reason": "silent", "detail": ""}}, 1)
    assert list(second["accepted"]) == ["a", "b", "c"]
    assert second["dropouts"] == 0
    assert np.allclose(ran.state.vector, np.full(SPEC.size, 2.0 + 18.0))
    assert next(event["rejected"] for event in ran.events if event["event"] == "round") == {"b": "silent"}


def test_a_late_reply_of_a_site_that_drops_out_again_is_stale(tmp_path, monkeypatch):
    """Catches: the old update taken because no new one came."""
    hurry(monkeypatch)
    replies = []

    def fault(node, reply):
        if not is_train(reply) or node != 2:
            return [reply]
        replies.append(reply)
        return replies[-2:-1]

    config = toy_config(tmp_path, run={"rounds": 2}, strategy={"max_update_norm": 1000.0, "norm_tolerance": 0.0})
    ran = run_toy(tmp_path, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=fault)
    assert [line["rejected"]["b"]["reason"] for line in ran.rounds] == ["silent", "stale"]
    assert np.allclose(ran.state.vector, np.full(SPEC.size, 4.0))


def test_the_site_itself_gives_up_at_the_deadline(tmp_path, monkeypatch, capsys):
    """Catches: a deadline that does not reach the local loop."""
    ticks = itertools.count(step=50)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    config = tiny_config(tmp_path, strategy={"round_timeout_s": 60.0})
    with pytest.raises(QuorumNotMet):
        run_tiny(config)
    folder = tmp_path / "runs" / "tiny"
    voided = [event for event in verify(folder / "audit.jsonl") if event["event"] == "round-voided"]
    assert [event["rejected"] for event in voided] == [{"site-0": "deadline", "site-1": "deadline"}] * 2
    assert leaks(folder, *capsys.readouterr()) == []
