"""Fault 9: updates of exactly zero, of norm 1e-30, and of values of 1e30."""

import math

import numpy as np
import pytest

from tests.support.toy import (
    ASKED,
    SPEC,
    check_only_rejected,
    forging,
    of_array,
    rewritten,
    run_toy,
    run_with_bad_site,
    toy_app,
    toy_config,
    train_reply,
    with_arrays,
)
from tsugiki.server.run.guard import check
from tsugiki.server.run.replies import Accepted


def verdict(value, bound=100.0):
    """Check an update of one value."""
    return check(train_reply(of_array(np.full(SPEC.size, value, np.float32))), ASKED, SPEC, bound)


def test_zero_stays_zero(tmp_path):
    """Catches: a division by a norm of zero, in the guard or in a strategy."""
    accepted = verdict(0.0)
    assert isinstance(accepted, Accepted)
    assert (accepted.norm, accepted.update.any()) == (0.0, False)
    zeros = toy_app(["a", "b"], lambda site, round_, received: np.zeros(SPEC.size, np.float32))
    for name in ("fedavg", "fedadam", "fedmedian"):
        (tmp_path / name).mkdir()
        ran = run_toy(tmp_path / name, zeros, 2, toy_config(tmp_path / name, strategy={"name": name}))
        assert not ran.state.vector.any()


@pytest.mark.parametrize("value", [1e-30, 1e-38, 1e-45, 1e30, 3e38])
def test_norms_are_computed_in_float64(value):
    """Catches: squares that vanish or overflow in float32: norms of 0 and of infinity."""
    exact = abs(float(np.float32(value))) * math.sqrt(SPEC.size)
    accepted = verdict(value, bound=1e300)
    assert isinstance(accepted, Accepted)
    assert accepted.norm == pytest.approx(exact, rel=1e-12)


def test_huge_values_are_rejected_by_their_norm(tmp_path):
    """Catches: a norm of infinity that compares as it likes, and the average with it."""
    assert verdict(1e30).reason == "norm"
    assert verdict(-3e38).reason == "norm"
    huge = of_array(np.full(SPEC.size, 1e30, np.float32))
    check_only_rejected(run_with_bad_site(tmp_path, lambda reply: with_arrays(reply, huge)), "norm")


def test_a_loss_that_overflows_in_the_mean_is_null(tmp_path):
    """Catches: losses that are finite at each site and infinite in the mean: Infinity in metrics.jsonl."""
    config = toy_config(tmp_path, run={"rounds": 1})
    fault = forging(2, lambda reply: rewritten(reply, loss=1.7e308))
    ran = run_toy(tmp_path, toy_app(["a", "b", "c"]), 3, config, fault=fault)
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "audit.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert ran.rounds[0]["train_loss"] is None
    assert ran.rounds[0]["accepted"]["b"]["loss"] == 1.7e308
