"""A one-run audit: an attacker guesses, from one released sum, which of many canary clients were in it.

Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, appendix D. It raises an alarm if it finds more than the
account says, and is weak where the account is right; what it can find is shown without noise and with a tenth of it.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tests.support.private import plan_of, privacy_of
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.privacy.mechanisms import epsilon_after

CANARIES, SIZE, DELTA = 500, 10_000, 1e-5
CLAIMED = 2.0
CONFIDENCE, GUESSES = 0.01, (20, 50, 100, 200)


def p_value(guesses, right, epsilon):
    """Return how likely so many right guesses are at most, if the mechanism is (epsilon, DELTA)-private."""
    q = 1 / (1 + math.exp(-epsilon))
    alpha = total = 0.0
    for missing in range(1, right + 1):
        total += stats.binom.pmf(right - missing, guesses, q)
        alpha = max(alpha, total / missing)
    return min(1.0, stats.binom.sf(right - 1, guesses, q) + alpha * DELTA * 2 * CANARIES)


def lower_bound(guesses, right, confidence):
    """Return the epsilon below which the mechanism cannot be, with confidence."""
    if p_value(guesses, right, 0.0) >= confidence:
        return 0.0
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(guesses, right, middle) < confidence else (low, middle)
    return low


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
        found.append(lower_bound(2 * count, right, CONFIDENCE / len(GUESSES)))
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


def test_the_bound_itself():
    """Catches: a bound that chance exceeds: half of the guesses right say nothing, all of them much."""
    assert lower_bound(100, 50, 0.01) == 0.0
    assert lower_bound(100, 100, 0.01) == pytest.approx(3.0, abs=0.3)
    assert lower_bound(400, 400, 0.01) > lower_bound(100, 100, 0.01)
