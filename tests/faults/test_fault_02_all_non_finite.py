"""Fault 2: all updates are NaN: the round is voided, tried once more, and the run stops with its last checkpoint."""

import numpy as np
import pytest

from tests.support.toy import SPEC, federate, is_train, of_array, toy_app, toy_config, with_arrays
from tsugiki.common.audit import verify
from tsugiki.common.errors import QuorumNotMet
from tsugiki.common.files import read_lines
from tsugiki.server.run import checkpoint


def test_the_run_stops_with_the_last_good_model(tmp_path, monkeypatch):
    """Catches: a mean of nothing, an endless retry, a checkpoint that took part in the voided round."""
    sent = []

    def fault(node, reply):
        sent.extend([node] if is_train(reply) else [])
        bad = is_train(reply) and len(sent) > 2  # the first round is good
        return [with_arrays(reply, of_array(np.full(SPEC.size, np.nan, np.float32))) if bad else reply]

    config = toy_config(tmp_path)
    with pytest.raises(QuorumNotMet) as caught:
        federate(monkeypatch, toy_app(["a", "b"]), 2, config, fault)
    folder = tmp_path / "toy"
    assert (caught.value.code, caught.value.exit_status) == ("quorum-not-met", 3)
    assert str(folder / "checkpoint") in str(caught.value)
    assert "the model of round 1" in str(caught.value)

    state = checkpoint.load(folder / "checkpoint", config.fixed, SPEC.sha256)
    assert state.round == 1
    assert np.array_equal(state.vector, np.full(SPEC.size, 0.25, np.float32))
    lines = [(line["round"], line.get("voided", False)) for line in read_lines(folder / "metrics.jsonl")]
    assert lines == [(0, False), (1, False), (2, True), (2, True)]
    voided = [event for event in verify(folder / "audit.jsonl") if event["event"] == "round-voided"]
    assert [event["rejected"] for event in voided] == [{"a": "non-finite", "b": "non-finite"}] * 2

    ended = federate(monkeypatch, toy_app(["a", "b"]), 2, config, resume=True)
    assert np.array_equal(ended.state.vector, np.full(SPEC.size, 0.75, np.float32))
