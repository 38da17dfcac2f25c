"""Fault 14: too few sites ever connect, or all of them are gone."""

import threading

import numpy as np
import pytest

from tests.support.federation import hurry
from tests.support.toy import SPEC, federate, is_train, toy_app, toy_config
from tsugiki.common.errors import NotEnoughSites, QuorumNotMet
from tsugiki.common.files import read_lines
from tsugiki.server.engines.grid import Stop, wait_for_nodes
from tsugiki.server.engines.in_process import InProcessGrid


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


def test_a_run_that_never_finds_enough_sites_ends_and_can_go_on_later(tmp_path, monkeypatch):
    """Catches: an endless wait, a message without numbers, a run that then can neither be started nor resumed."""
    before = threading.active_count()
    config = toy_config(tmp_path)
    with pytest.raises(NotEnoughSites, match="1 of 2 clients") as caught:
        federate(monkeypatch, toy_app(["a"]), 1, config)
    assert (caught.value.code, caught.value.exit_status) == ("not-enough-sites", 4)
    assert threading.active_count() == before
    ended = federate(monkeypatch, toy_app(["a", "b"]), 2, config, resume=True)
    assert np.array_equal(ended.state.vector, np.full(SPEC.size, 0.75, np.float32))


def test_nobody_at_all_is_waited_for_in_vain_but_not_for_ever():
    """Catches: Flower's own wait, which never ends."""
    grid = InProcessGrid(toy_app([]), 0)
    assert wait_for_nodes(grid, 1, 30.0, Stop(), lambda count: None) == []


def test_sites_that_leave_in_the_middle_stop_the_run_with_its_checkpoint(tmp_path, monkeypatch):
    """Catches: a round with fewer sites than the quorum, and a run that is lost with its sites."""
    config = toy_config(tmp_path)

    def update(site, round_, received):
        if round_ == 2:
            monkeypatch.setattr(InProcessGrid, "get_node_ids", lambda self: [1])
        return np.full(SPEC.size, 0.25, np.float32)

    with pytest.raises(NotEnoughSites, match="Round 3: 1 clients at 1 sites are connected") as caught:
        federate(monkeypatch, toy_app(["a", "b"], update), 2, config)
    assert caught.value.exit_status == 4
    monkeypatch.undo()
    hurry(monkeypatch)
    ended = federate(monkeypatch, toy_app(["a", "b"]), 2, config, resume=True)
    assert np.array_equal(ended.state.vector, np.full(SPEC.size, 0.75, np.float32))
    assert [line["round"] for line in read_lines(ended.folder / "metrics.jsonl")] == [0, 1, 2, 3]


def test_connected_sites_that_all_fall_silent_stop_the_run(tmp_path, monkeypatch):
    """Catches: a "zombie" server that waits for dead clients."""
    with pytest.raises(QuorumNotMet) as caught:
        federate(
            monkeypatch,
            toy_app(["a", "b"]),
            2,
            toy_config(tmp_path),
            lambda node, reply: [] if is_train(reply) else [reply],
        )
    assert caught.value.exit_status == 3
    voided = [line for line in read_lines(tmp_path / "toy" / "metrics.jsonl") if line.get("voided")]
    assert [line["dropouts"] for line in voided] == [2, 2]
