"""Fault 10: two sites of five (of seven for Krum, which needs 2 f + 3) boost their updates or turn them round.

The toy federation learns a target at a distance of 10: every honest site moves half-way to it, with an error of its own
of at most 0.1 in each coordinate. The metric is the distance that is left after six rounds; the band is 1.
"""

import numpy as np
import pytest

from tests.support.toy import SPEC, run_toy, toy_app, toy_config
from tsugiki.common.audit import verify

COLLUDERS = ("y", "z")
TARGET = (np.ones(SPEC.size) * 10 / np.sqrt(SPEC.size)).astype(np.float32)
BAND = 1.0


def learning(boost):
    """Return an update: towards the target, or `boost` times as far, which is away from it if negative."""

    def update(site, round_, received):
        error = np.random.default_rng([ord(site), round_]).uniform(-0.1, 0.1, SPEC.size)
        step = 0.5 * (TARGET - received) + error
        return (step * (boost if site in COLLUDERS else 1)).astype(np.float32)

    return update


def final(folder, strategy, boost, bound=1e12):
    """Return the distance to the target in the end, and the reasons for which sites were rejected."""
    config = toy_config(folder, run={"rounds": 6}, strategy={**strategy, "max_update_norm": bound})
    honest = "abcde" if strategy["name"] == "krum" else "abc"
    sites = [*honest, *COLLUDERS]
    ran = run_toy(folder, toy_app(sites, learning(boost)), len(sites), config)
    rejected = {
        (site, reason)
        for event in verify(folder / "audit.jsonl")
        if event["event"] == "round"
        for site, reason in event["rejected"].items()
    }
    return float(np.linalg.norm(ran.state.vector.astype(np.float64) - TARGET)), rejected


FEDAVG = {"name": "fedavg"}
ROBUST = [{"name": "krum", "num_malicious_sites": 2, "min_clients": 7}, {"name": "fedmedian"}]


@pytest.mark.parametrize("strategy", [FEDAVG, *ROBUST], ids=lambda strategy: strategy["name"])
def test_honest_sites_reach_the_target(tmp_path, strategy):
    """Catches: a band that is wide enough for anything, and a robust strategy that does not learn."""
    assert final(tmp_path, strategy, 1.0)[0] < BAND


@pytest.mark.parametrize("boost", [-1.0, -1000.0, 1000.0])
@pytest.mark.parametrize("strategy", ROBUST, ids=lambda strategy: strategy["name"])
def test_robust_strategies_stay_in_the_band(tmp_path, strategy, boost):
    """Catches: a robust strategy's name over a plain mean, and one that is not told how many may lie."""
    assert final(tmp_path, strategy, boost)[0] < BAND


@pytest.mark.parametrize(("boost", "damage"), [(-1.0, 2.0), (-1000.0, 1e6), (1000.0, 1e6)])
def test_the_plain_mean_shows_the_damage(tmp_path, boost, damage):
    """Catches: an attack in these tests that does nothing."""
    assert final(tmp_path, FEDAVG, boost)[0] > damage


@pytest.mark.parametrize("boost", [-1000.0, 1000.0])
def test_the_guard_rejects_boosted_updates_by_their_norm(tmp_path, boost):
    """Catches: a bound that is not applied: with it the plain mean stays in the band."""
    distance, rejected = final(tmp_path, FEDAVG, boost, bound=20.0)
    assert distance < BAND
    assert rejected == {("y", "norm"), ("z", "norm")}
