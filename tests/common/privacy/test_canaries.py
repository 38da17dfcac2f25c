"""A one-run audit: an attacker guesses, from one released sum, which of many canary clients were in it.

Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, appendix D. It raises an alarm if it finds more than the
account says, and is weak where the account is right; what it can find is shown without noise and with a tenth of it.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.private import plan_of, privacy_of
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.privacy.canaries import LENGTH, draw_canaries
from tsugiki.common.privacy.mechanisms import epsilon_after
from tsugiki.server.budget.lower_bounds import guesses_bound

CANARIES, SIZE, DELTA = 500, 10_000, 1e-5
CLAIMED = 2.0
ERROR, GUESSES = 0.01, (20, 50, 100, 200)


def audit(plan, folder):
    """Return the lower bound on epsilon that an attacker finds in one released mean."""
    draw = np.random.default_rng(11)
    canaries = (draw.integers(0, 2, (CANARIES, SIZE)) * 2.0 - 1.0) * (plan.clip_norm / math.sqrt(SIZE))
    included = draw.random(CANARIES) < 0.5
    total = ProtectedSum.empty(plan)
    for start in range(0, CANARIES, 50):  # who is out sends a null update, and adds its noise all the same
        chunk = slice(start, start + 50)
        total.add(canaries[chunk] * included[chunk, np.newaxis])
    mean, _ = privacy_of(plan, folder).mean(total.levels, CANARIES, 1)
    order = np.argsort(canaries @ mean)
    found = []
    for count in GUESSES:
        right = int(included[order[-count:]].sum() + (~included[order[:count]]).sum())
        found.append(guesses_bound(CANARIES, 2 * count, right, DELTA, 1 - ERROR / len(GUESSES)))
    return max(found)


def claimed(mode):
    """Return a plan of one round and CANARIES clients that claims CLAIMED."""
    return plan_of(mode, SIZE, clients=CANARIES, rounds=1, target_epsilon=CLAIMED, delta=DELTA, clip_norm=0.5)


@pytest.mark.parametrize("mode", ["central", "distributed"])
def test_no_more_is_found_than_the_account_says(mode, tmp_path):
    """Catches: less noise than planned on the way from the clients to the model, wherever it was lost."""
    plan = claimed(mode)
    assert epsilon_after(plan, 1)["release"] == pytest.approx(CLAIMED, rel=1e-2)
    assert audit(plan, tmp_path) < CLAIMED


@pytest.mark.parametrize("mode", ["central", "distributed"])
def test_the_audit_finds_noise_that_is_not_there(mode, tmp_path):
    """Catches: an audit without power, that passes whatever is released."""
    plan = claimed(mode)
    assert audit(replace(plan, noise_multiplier=0.0), tmp_path) > CLAIMED
    assert audit(replace(plan, noise_multiplier=plan.noise_multiplier / 10), tmp_path) > CLAIMED


def test_each_uploads_own_noise_is_in_the_sum(tmp_path):
    """Catches: local noise drawn once for all clients of a site, which would leave the sum with a share of it."""
    plan = claimed("local")
    assert audit(plan, tmp_path) < CLAIMED / 2
    assert audit(replace(plan, noise_multiplier=plan.noise_multiplier / (10 * math.sqrt(CANARIES))), tmp_path) > CLAIMED


# The canaries of `tsugiki audit privacy`


def drawn(names, dimension, seed=3):
    """Return canaries with names and directions."""
    return draw_canaries([f"site/{number}" for number in range(names)], dimension, np.random.default_rng(seed))


def test_directions_are_at_right_angles_and_use_every_coordinate():
    """Catches: canaries that hide each other; coordinates whose noise is never audited."""
    canaries = drawn(20, 100)
    plan = plan_of("distributed", 100, clients=20, noise_multiplier=1.0, clip_norm=0.5)
    included = replace(canaries, included=np.ones(20, bool))
    updates = included.updates(included.names, plan)
    assert np.allclose(updates @ updates.T, (LENGTH * 0.5) ** 2 * np.eye(20))
    assert (updates != 0).any(axis=0).all()
    assert np.allclose(included.scores(updates[3]), LENGTH * 0.5 * np.eye(20)[3])
    assert 0.2 < (updates > 0).sum() / 100 < 0.8


def test_a_canary_that_was_left_out_sends_zeros():
    """Catches: a client that is called out and takes part; coins that are not fair, or the same for all."""
    canaries = drawn(400, 400)
    plan = plan_of("distributed", 400, clients=400, noise_multiplier=1.0, delta=1e-4)
    sends = canaries.updates(canaries.names, plan).any(axis=1)
    assert np.array_equal(sends, canaries.included)
    assert 140 < sends.sum() < 260
    assert not np.array_equal(sends, drawn(400, 400, seed=4).included)


def test_there_are_at_most_as_many_canaries_as_coordinates():
    """Catches: a direction of length zero, or shared by two, where clients are more than numbers."""
    canaries = drawn(50, 8)
    assert len(canaries.names) == len(set(canaries.names)) == 8
    assert sorted(canaries.coordinates.ravel()) == list(range(8))
