from dataclasses import replace

import numpy as np
import pytest

from tests.support.private import plan_of
from tsugiki.client.training.update import ProtectedSum, make_update
from tsugiki.common.privacy.clipping import LEVELS, clip
from tsugiki.common.privacy.mechanisms import mechanism_of
from tsugiki.common.wire.spec import l2_norm


def test_the_update_is_local_minus_received():
    """Catches: the sign turned round, and weights sent instead of their change."""
    local, received = np.array([1.0, 2.0], np.float32), np.array([0.5, 3.0], np.float32)
    update = make_update(local, received)
    assert update.dtype == np.float32
    assert update.tolist() == [0.5, -1.0]


def test_without_training_the_update_is_exactly_zero():
    """Catches: rounding on the way."""
    received = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert not make_update(received.copy(), received).any()


def test_the_arguments_are_not_changed():
    """Catches: a subtraction in place: the received adapter is needed again."""
    local, received = np.ones(3, np.float32), np.full(3, 2.0, np.float32)
    make_update(local, received)
    assert (local.tolist(), received.tolist()) == ([1.0] * 3, [2.0] * 3)


def test_large_and_small_values_are_subtracted_exactly():
    """Catches: an overflow on the way to a difference that float32 holds."""
    update = make_update(np.array([3e38, 1e-45], np.float32), np.array([2.9e38, 0.0], np.float32))
    assert np.isfinite(update).all()
    assert update[1] == np.float32(1e-45)


# The protected sum


def quiet(mode="distributed", **options):
    """Return a plan without noise, so that sums can be compared exactly."""
    return replace(plan_of(mode, 100, noise_multiplier=1.0, **options), noise_multiplier=0.0)


def test_a_protected_sum_is_the_sum_of_clipped_updates():
    """Catches: the sum clipped instead of each update in it, which lets one client take it all."""
    updates = np.random.default_rng(1).normal(0, 1, (5, 100)) * [[1], [1], [1], [1], [0.01]]  # the last one is short
    total = ProtectedSum.empty(quiet(clip_norm=0.5))
    total.add(updates)
    wanted = sum(clip(one, 0.5).levels for one in updates)
    assert total.levels.dtype == np.int64
    assert np.array_equal(total.levels, wanted)
    assert l2_norm(total.levels) > 1.5 * LEVELS  # four of LEVELS each, in directions of their own
    assert total.clipped == 4


def test_it_does_not_matter_who_comes_together():
    """Catches: clients of one batch that share a factor, and a batch that overwrites the one before it."""
    updates, sums = np.random.default_rng(2).normal(0, 0.1, (6, 100)), []
    for sizes in ((6,), (1, 2, 3), (1,) * 6):
        total, start = ProtectedSum.empty(quiet()), 0
        for size in sizes:
            total.add(updates[start : start + size])
            start += size
        assert total.clients == 6
        sums.append(total.levels.tolist())
    assert sums[0] == sums[1] == sums[2]


def test_how_many_were_clipped():
    """Catches: those exactly at the norm counted, and those that are no numbers counted as too long."""
    total = ProtectedSum.empty(plan_of("local", 2, clients=4, noise_multiplier=1.0, clip_norm=1.0))
    total.add(np.array([[3.0, 4.0], [0.6, 0.7], [1.0, 0.0], [np.nan, 9.0]]))
    assert (total.clients, total.clipped, total.null) == (4, 1, 1)


def test_what_is_not_finite_adds_noise_and_nothing_else():
    """Catches: a client that is left out of the sum because its training diverged: its noise would be missing."""
    total = ProtectedSum.empty(quiet())
    total.add(np.array([np.full(100, np.nan), np.full(100, 1e-3), np.full(100, 1e30)]))
    assert (total.clients, total.clipped, total.null) == (3, 1, 1)
    noisy = ProtectedSum.empty(plan_of("local", 1000, noise_multiplier=1.0))
    noisy.add(np.full((1, 1000), np.nan))
    assert np.mean(noisy.levels.astype(float) ** 2) / LEVELS**2 == pytest.approx(1, abs=5.4 * np.sqrt(2 / 1000))


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_every_client_of_a_batch_has_noise_of_its_own(mode):
    """Catches: noise drawn once a batch: a gateway of 40 clients would add a fortieth of its shares."""
    size, plan = 20_000, plan_of(mode, 20_000, clients=40, noise_multiplier=1.0)
    total = ProtectedSum.empty(plan)
    total.add(np.zeros((40, size)))
    variance = float(np.mean(total.levels.astype(float) ** 2))
    assert variance / (40 * mechanism_of(plan).client_variance(plan)) == pytest.approx(1, abs=5.4 * np.sqrt(2 / size))


def test_the_server_adds_the_noise_in_mode_central():
    """Catches: noise added twice."""
    total = ProtectedSum.empty(plan_of("central", 100, noise_multiplier=1.0))
    total.add(np.zeros((3, 100)))
    assert not total.levels.any()


def test_seeded_noise_follows_from_seed_and_purpose_and_other_noise_does_not():
    """Catches: a test mode that does not repeat; a real run that does."""

    def levels(seed, *purpose):
        total = ProtectedSum.empty(plan_of("local", 100, noise_multiplier=1.0), seed)
        total.add(np.zeros((1, 100)), *purpose)
        return total.levels.tolist()

    assert levels(7, "a", 1) == levels(7, "a", 1)
    assert levels(7, "a", 1) != levels(7, "a", 2)
    assert levels(7, "a", 1) != levels(7, "b", 1)
    assert levels(0, "a", 1) != levels(0, "a", 1)
