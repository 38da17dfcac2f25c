"""The end of a run, as its sites hear of it."""

import pytest

from tests.support.toy import federate, mostly_two, toy_app, toy_config
from tsugiki.common.errors import QuorumNotMet
from tsugiki.common.wire.messages import ENDED, EndedRequest, from_record
from tsugiki.server.engines.in_process import InProcessGrid

KIND = f"query.{ENDED}"


@pytest.fixture
def told(monkeypatch):
    """What each node was told, by node, on a grid whose sites count as real ones."""
    found = {}
    push = InProcessGrid.push_messages

    def pushing(grid, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == KIND:
                found[message.metadata.dst_node_id] = from_record(EndedRequest, message.content)
        return push(grid, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", pushing)
    monkeypatch.setattr(InProcessGrid, "simulated", False)
    return found


def failing(site, round_number):
    """Return a training that fails at one site in one round."""

    def update(name, round_, received):
        if (name, round_) == (site, round_number):
            raise ValueError("no update")
        return mostly_two(name, round_, received)

    return update


def of_two(folder, quorum):
    """Return a run of two rounds that does not wait for sites."""
    strategy = {
        "min_clients": quorum,
        "wait_for_quorum_s": 0,
        "grace_s": 30,
        "max_update_norm": 1000.0,
        "start_with": 2,
    }
    return toy_config(folder, run={"rounds": 2}, strategy=strategy)


def test_sites_hear_how_a_run_ended_and_in_how_many_rounds_they_were(tmp_path, told, monkeypatch):
    """Catches: a site that waits for a round of a run that is over; the rounds of another site."""
    federate(monkeypatch, toy_app(["a", "b"], failing("b", 1)), 2, of_two(tmp_path, 1))
    assert told == {1: EndedRequest("toy", "finished", 2, 2), 2: EndedRequest("toy", "finished", 2, 1)}


def test_sites_hear_of_a_run_that_failed(tmp_path, told, monkeypatch):
    """Catches: sites that learn of a good end only."""
    with pytest.raises(QuorumNotMet):
        federate(monkeypatch, toy_app(["a", "b"], failing("b", 2)), 2, of_two(tmp_path, 2))
    assert told == {node: EndedRequest("toy", "quorum-not-met", 1, 1) for node in (1, 2)}


def test_a_run_ends_as_well_where_nobody_listens(tmp_path, told, monkeypatch, caplog):
    """Catches: a run that fails, or is lost, because a client of another version does not know the message."""
    outcome = federate(monkeypatch, toy_app(["a", "b"], mostly_two), 2, of_two(tmp_path, 2))
    assert (outcome.state.round, len(told)) == (2, 2)
    assert "0 of 2 sites have heard that the run is over" in caplog.text


def test_simulated_sites_are_not_told(tmp_path, told, monkeypatch):
    """Catches: a message more for each of a hundred thousand sites that end with the run."""
    monkeypatch.setattr(InProcessGrid, "simulated", True)
    federate(monkeypatch, toy_app(["a", "b"], mostly_two), 2, of_two(tmp_path, 2))
    assert told == {}
