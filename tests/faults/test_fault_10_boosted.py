"""Fault 10: two sites of five (of seven for Krum, which needs 2 f + 3) boost their updates or turn them round.

The toy federation learns a target at a distance of 10: every honest site moves half-way to it, with an error of its own
of at most 0.1 in each coordinate. The metric is the distance that is left after six rounds; the band is 1.
"""

import numpy as np
import pytest

from tests.support.federation import hurry
from tests.support.toy import SPEC, forging, is_train, run_toy, toy_app, toy_config, toy_context, toy_state
from tsugiki.common.audit import verify
from tsugiki.common.settings import StrategySettings
from tsugiki.server.run import checkpoint
from tsugiki.server.run.collect import sample
from tsugiki.server.run.loop import finish_round, run_rounds, train_round
from tsugiki.server.run.open_round import OpenRound

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


FEDAVG = {"name": "fedavg", "norm_tolerance": 0.0}
ROBUST = [
    {"name": "krum", "num_malicious_sites": 2, "min_clients": 7},
    {"name": "fedmedian"},
    {"name": "trimmed_mean", "trim_fraction": 0.4},
]


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


LIAR = "f"
HONEST = 0.25 * np.sqrt(SPEC.size)  # the norm of the toy's honest update
DEFAULT = {"norm_tolerance": StrategySettings(name="fedavg").norm_tolerance}


def boosted_in(rounds, norm):
    """Return an update of ones, but of the liar's in some rounds: reversed and of another norm."""

    def update(site, round_, received):
        honest = np.full(SPEC.size, 0.25, np.float32)
        if site != LIAR or round_ not in rounds:
            return honest
        return (-honest * (norm / HONEST)).astype(np.float32)

    return update


@pytest.mark.parametrize("sites", ["bcf", "abcdef"])
@pytest.mark.parametrize("rounds", [{1}, {2}, {3}, {1, 2, 3}], ids=str)
def test_one_boosted_update_moves_the_model_by_a_bounded_step(tmp_path, sites, rounds):
    """Catches: a reversed update of norm 99, below the absolute bound, that undoes every round from the first on."""
    config = toy_config(tmp_path, strategy={"min_clients": len(sites), **DEFAULT})
    ran = run_toy(tmp_path, toy_app(list(sites), boosted_in(rounds, 99.0)), len(sites), config)
    moves = np.full(3, 0.25)
    for round_ in rounds:
        moves[round_ - 1] = 0.25 * (len(sites) - 1 - 1) / len(sites)
    assert np.allclose(ran.state.vector, moves.sum(), atol=1e-6)
    clipped = {
        line["round"]: entry["clipped_to"]
        for line in ran.rounds
        for site, entry in line["accepted"].items()
        if "clipped_to" in entry and site == LIAR
    }
    assert clipped == {round_: pytest.approx(HONEST) for round_ in rounds}
    events = [event for event in ran.events if event["event"] == "update-clipped"]
    assert [(event["round"], event["site"]) for event in events] == [(round_, LIAR) for round_ in sorted(rounds)]


def test_a_cohort_of_one_is_compared_with_the_rounds_before(tmp_path, monkeypatch):
    """Catches: a site that is asked alone and sets the bound for itself."""
    hurry(monkeypatch)
    config = toy_config(tmp_path, strategy={"min_clients": 1, **DEFAULT})
    fault = forging(1, lambda reply: None)

    def late(node, reply):
        # from round 2 on, only the liar answers
        return fault(node, reply) if is_train(reply) and round_of(reply) > 1 else [reply]

    app = toy_app(["a", LIAR], boosted_in({2, 3}, 99.0))
    ran = run_toy(tmp_path, app, 2, config, fault=late)
    assert [line["accepted"].get(LIAR, {}).get("clipped_to") for line in ran.rounds] == [
        None,
        pytest.approx(2 * HONEST),
        pytest.approx(3 * HONEST),  # of two honest norms and one that was clipped; it grows, but not at once
    ]


def round_of(reply):
    """Return the round that a training reply is to."""
    return reply.content.config_records["reply"]["round"]


@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_a_resumed_run_remembers_what_is_typical(tmp_path, monkeypatch, interrupted_after):
    """Catches: norms that a checkpoint forgets: the liar's update, which comes alone, sets its own bound."""
    hurry(monkeypatch)
    config = toy_config(tmp_path, strategy={"min_clients": 1})
    drop = forging(1, lambda reply: None)

    def alone(node, reply):
        return drop(node, reply) if is_train(reply) and round_of(reply) == 3 else [reply]

    app = toy_app(["a", LIAR], boosted_in({3}, 99.0))
    whole = run_toy(tmp_path, app, 2, config, fault=alone).state.vector
    other = tmp_path / "other"
    other.mkdir()
    ctx = toy_context(other, app, 2, config, fault=alone)
    ctx.roster.wait(lambda count: None)
    state = toy_state()
    for _ in range(interrupted_after):
        state = finish_round(ctx, train_round(ctx, state))
    resumed = checkpoint.load(other / "checkpoint", config.fixed, SPEC.sha256)
    assert np.array_equal(run_rounds(ctx, resumed).vector, whole)


def test_two_sites_do_not_clip_each_other(tmp_path):
    """Catches: of two honest sites, the one that learns more cut down to the other."""
    config = toy_config(tmp_path, run={"rounds": 2}, strategy={"min_clients": 2, **DEFAULT})
    ran = run_toy(tmp_path, toy_app(["a", LIAR], boosted_in({1, 2}, 20 * HONEST)), 2, config)
    assert not [event for event in ran.events if event["event"] == "update-clipped"]


def test_strategies_that_combine_each_update_get_the_clipped_one(tmp_path):
    """Catches: a bound that only the running mean knows."""
    config = toy_config(tmp_path, run={"rounds": 1}, strategy={"name": "trimmed_mean", "trim_fraction": 0.2, **DEFAULT})
    folder = tmp_path
    ctx = toy_context(folder, toy_app(list("abcdef"), boosted_in({1}, 99.0)), 6, config)
    ctx.roster.wait(lambda count: None)
    round_ = OpenRound(ctx)
    replies = round_.collect(toy_state(), 1, sample(ctx, 1, 0), 0)
    norms = [float(np.linalg.norm(one.update)) for one in replies.kept.updates()]
    assert norms == pytest.approx([HONEST] * 6)
