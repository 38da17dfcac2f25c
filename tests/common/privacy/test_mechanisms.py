"""Who adds which noise: one contract for every mode, through the pieces that a run uses, and what breaks it."""

import math
from dataclasses import replace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from scipy import stats

from tests.support.private import plan_of, privacy_of
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.clipping import LEVELS, clip
from tsugiki.common.privacy.mechanisms import ADVERSARIES, MECHANISMS, Adversary, mean_noise, mechanism_of, releases_of
from tsugiki.common.privacy.noise import noise_generator
from tsugiki.common.privacy.settings import PrivacySection

MODES = MECHANISMS.names()
SIZE, CLIENTS, Z = 100_000, 50, 6.0023
TOLERANCE = 5.4 * math.sqrt(2 / SIZE)
"""Of a variance's ratio to what it should be: a right one is outside once in ten million runs."""

each_mode = pytest.mark.parametrize("mode", MODES)


def summed(plan, clients, same="", chunk=10):
    """Return the noisy sum of null updates of so many clients, in levels; `same`: all draw with this purpose."""
    total = ProtectedSum.empty(plan, 7 if same else 0)
    for start in range(0, clients, 1 if same else chunk):
        total.add(np.zeros((1 if same else min(chunk, clients - start), plan.dimension)), same or f"client-{start}")
    noise = mechanism_of(plan).server_noise(plan, noise_generator(), plan.dimension)
    assert total.clients == clients
    return total.levels + noise


def ratio(levels, wanted):
    """Return the variance of noise around zero over the wanted one."""
    return float(np.mean(np.asarray(levels, np.float64) ** 2)) / wanted


def right(found):
    """Whether a ratio is within the tolerance."""
    return abs(found - 1) < TOLERANCE


def wanted_variance(mode, clients, fewest, honest=1.0):
    """Return the variance on the sum that section 3 of the notes gives, in levels^2."""
    whole = (Z * LEVELS) ** 2
    return {"central": whole, "local": clients * whole, "distributed": clients * whole / (honest * fewest)}[mode]


def test_there_is_a_mechanism_for_every_mode():
    """Catches: tests below that pass because they loop over nothing; a mode that settings allow and nothing does."""
    annotation = PrivacySection.model_fields["mode"].annotation
    assert get_origin(annotation) is Literal
    assert set(MODES) == set(get_args(annotation)) - {"none"}
    assert len(MODES) >= 3


@each_mode
def test_a_mode_names_itself_and_whom_it_is_there_against(mode):
    """Catches: a budget that bounds a ledger which the mode never charges."""
    mechanism, plan = MECHANISMS.get(mode), plan_of(mode, noise_multiplier=1.0)
    assert mechanism.name == mode
    assert mechanism.title
    assert mechanism_of(plan) is mechanism
    assert mechanism.budgeted
    assert set(releases_of(plan)) <= set(ADVERSARIES) == set(get_args(Adversary))
    assert mechanism.budgeted[0] in releases_of(plan)
    for who in mechanism.budgeted:
        assert releases_of(plan).get(who, Release("gaussian", 1.0)).noise_multiplier > 0


# How much noise


@each_mode
def test_the_sum_carries_the_planned_noise(mode):
    """Catches: a share divided by n instead of its root, noise added twice or by the wrong party, or none."""
    plan = plan_of(mode, SIZE, clients=CLIENTS, noise_multiplier=Z)
    assert right(ratio(summed(plan, CLIENTS), wanted_variance(mode, CLIENTS, CLIENTS)))


@each_mode
def test_more_clients_than_the_fewest_never_carry_less(mode):
    """Catches: shares that depend on who is asked, so that a sum of the fewest clients is short of noise."""
    plan = plan_of(mode, SIZE, clients=CLIENTS, noise_multiplier=Z, strategy={"min_clients": 30})
    found = ratio(summed(plan, CLIENTS), wanted_variance(mode, CLIENTS, 30))
    assert right(found)
    assert mean_noise(plan, CLIENTS) * CLIENTS >= Z * (1 - 1e-12)


def test_dishonest_clients_are_made_up_for():
    """Catches: shares as if everybody added one, where some may not."""
    plan = plan_of("distributed", SIZE, clients=20, noise_multiplier=Z, honest_fraction=0.5)
    assert right(ratio(summed(plan, 20), wanted_variance("distributed", 20, 20, 0.5)))
    assert right(ratio(summed(plan, 10), (Z * LEVELS) ** 2))


def test_broken_shares_fail_the_same_check():
    """Catches: a tolerance so wide that a missing share, sigma / n, or equal noise everywhere goes unseen."""
    clients, wanted = 20, (Z * LEVELS) ** 2
    plan = plan_of("distributed", SIZE, clients=clients, noise_multiplier=Z)
    assert right(ratio(summed(plan, clients), wanted))
    assert not right(ratio(summed(plan, clients - 1), wanted))
    over_n = replace(plan, min_clients=clients**2)  # a share of z / n instead of z / sqrt(n)
    assert ratio(summed(over_n, clients), wanted) == pytest.approx(1 / clients, rel=TOLERANCE)
    assert ratio(summed(plan, clients, same="all"), wanted) == pytest.approx(clients, rel=TOLERANCE)
    assert not right(ratio(summed(replace(plan, mode="local"), clients), wanted))


@pytest.mark.parametrize(
    ("mode", "clients", "deviation"),
    [
        ("central", 100, 0.060023),
        ("central", 1_000, 0.0060023),
        ("central", 10_000, 0.00060023),
        ("distributed", 100, 0.060023),
        ("distributed", 1_000, 0.0060023),
        ("distributed", 10_000, 0.00060023),
        ("local", 100, 0.60023),
        ("local", 1_000, 0.18981),
        ("local", 10_000, 0.060023),
    ],
)
def test_the_noise_on_a_mean_is_that_of_the_notes(mode, clients, deviation):
    """Catches: noise on the sum told as noise on the mean, and a root of n too many or too few."""
    plan = plan_of(mode, SIZE, clients=clients, noise_multiplier=Z, delta=1e-6)
    assert mean_noise(plan, clients) == pytest.approx(deviation, rel=1e-4)
    share = math.sqrt(mechanism_of(plan).client_variance(plan)) / LEVELS
    assert share == pytest.approx({"central": 0.0, "local": Z, "distributed": Z / math.sqrt(clients)}[mode], rel=1e-9)


@each_mode
def test_a_mean_of_null_updates_is_noise_of_that_deviation(mode, tmp_path):
    """Catches: server noise left out of the mean, a mean in levels, and a clip norm that scales only one of both."""
    plan = plan_of(mode, 20_000, clients=20, noise_multiplier=Z, clip_norm=0.25)
    total = ProtectedSum.empty(plan)
    total.add(np.zeros((20, plan.dimension)))
    mean, told = privacy_of(plan, tmp_path).mean(total.levels, 20, 1)
    found = float(np.mean(mean.astype(np.float64) ** 2)) / mean_noise(plan, 20) ** 2
    assert abs(found - 1) < 5.4 * math.sqrt(2 / plan.dimension)
    assert told["effective_noise_multiplier"] == pytest.approx(Z * (math.sqrt(20) if mode == "local" else 1))
    assert told["noise_norm"] == pytest.approx(told["mean_norm"], rel=5.4 * math.sqrt(0.5 / plan.dimension))


def test_central_and_distributed_are_the_same_without_noise(tmp_path):
    """Catches: another rounding, clipping or denominator in one of the modes: byte for byte."""
    updates, means = np.random.default_rng(5).normal(0, 0.2, (6, 1000)), {}
    updates[0, 0] = math.nan
    for mode in MODES:
        plan = plan_of(mode, 1000, clients=6, noise_multiplier=1.0, clip_norm=2.0)
        plan = replace(plan, noise_multiplier=0.0)
        total = ProtectedSum.empty(plan)
        for row in updates:
            total.add(row[np.newaxis])
        assert (total.clients, total.clipped, total.null) == (6, 5, 1)
        means[mode] = privacy_of(plan, tmp_path).mean(total.levels, 6, 1)[0].tobytes()
    assert means["central"] == means["distributed"] == means["local"]


def test_central_and_distributed_have_the_same_variance_with_noise(tmp_path):
    """Catches: one of two modes with the same promise that adds less noise (F-test)."""
    found = {}
    for mode in ("central", "distributed"):
        found[mode] = np.var(summed(plan_of(mode, SIZE, clients=20, noise_multiplier=Z), 20))
    low = stats.f.cdf(found["central"] / found["distributed"], SIZE - 1, SIZE - 1)
    assert 2 * min(low, 1 - low) > 1e-7


# What an update can do


def test_nobody_weighs_more_than_one_clip_norm_over_n(tmp_path):
    """Catches: updates weighted by rows: one client of 1,000 rows among nine of 1 would move the mean by all of it."""
    plan = replace(plan_of("distributed", 1000, clients=10, noise_multiplier=1.0, clip_norm=3.0), noise_multiplier=0.0)
    privacy, small = privacy_of(plan, tmp_path), np.random.default_rng(6).normal(0, 1e-3, (9, 1000))
    means = []
    for one in (np.full(1000, 1000.0), np.zeros(1000)):
        total = ProtectedSum.empty(plan)
        total.add(np.vstack([small, one]))
        means.append(privacy.mean(total.levels, 10, 1)[0].astype(np.float64))
    moved = float(np.linalg.norm(means[0] - means[1]))
    assert 0.999 * 3.0 / 10 < moved <= 3.0 / 10 * (1 + 1e-6)


RUNS = 4_000


def shift(plan, clients):
    """Return how far the whole clip norm of one client moves a sum of clients, in deviations of its noise."""
    direction, many = np.full(4, 0.5), replace(plan, dimension=4 * RUNS)  # all runs at once, side by side
    draw, found = noise_generator(), []
    for update in (direction, np.zeros(4)):
        levels = clip(np.broadcast_to(update * plan.clip_norm, (RUNS, 4)), plan.clip_norm).levels
        noise = sum(mechanism_of(plan).client_noise(many, draw) for _ in range(clients))
        noise = noise + mechanism_of(plan).server_noise(many, draw, many.dimension)
        found.append((levels + noise.reshape(RUNS, 4)) @ direction)
    return (found[0].mean() - found[1].mean()) / math.sqrt((found[0].var() + found[1].var()) / 2)


@pytest.mark.parametrize(("mode", "clients"), [("central", 20), ("distributed", 20), ("local", 1)])
@pytest.mark.parametrize("z", [1.0, 3.0])
def test_who_tells_a_client_from_a_null_one_gains_what_the_account_says(mode, clients, z):
    """Catches: noise that is not a multiple of what an update can do, however it was added."""
    plan = plan_of(mode, 4, clients=clients, noise_multiplier=z, clip_norm=0.1)
    assert abs(shift(plan, clients) - 1 / z) < 5.4 * math.sqrt(2 / RUNS)


def test_the_game_is_won_against_too_little_noise():
    """Catches: a game that cannot be won: the noise here is divided by n where its root is meant."""
    plan = plan_of("distributed", 4, clients=20, noise_multiplier=1.0)
    assert shift(replace(plan, min_clients=400), 20) > 1 + 5.4 * math.sqrt(2 / RUNS)


# What is seen


def test_what_each_adversary_sees():
    """Catches: a server that is told to see less than it does; a share told as the whole noise."""
    plain = Release("gaussian", 2.0)
    assert releases_of(plan_of("central", noise_multiplier=2.0)) == {
        "release": plain,
        "uploads": Release("gaussian", 0.0),
    }
    sampled = plan_of("central", noise_multiplier=2.0, sampling="poisson", strategy={"fraction_train": 0.25})
    assert releases_of(sampled) == {"release": Release("gaussian", 2.0, 0.25), "uploads": Release("gaussian", 0.0)}
    assert releases_of(plan_of("local", noise_multiplier=2.0)) == {"release": plain, "uploads": plain}


@pytest.mark.parametrize(
    ("honest", "fewest", "each", "share"),
    [(1.0, 16, 1, 0.5), (0.25, 16, 1, 1.0), (1.0, 4, 1, 1.0), (0.5, 8, 1, 1.0), (1.0, 16, 7, 0.5), (0.5, 8, 3, 1.0)],
)
def test_what_is_seen_of_distributed_noise(honest, fewest, each, share):
    """Catches: shares by the number of clients, not of the fewest honest ones; a gateway taken for an outsider."""
    options = {"clients": 16, "noise_multiplier": 2.0, "honest_fraction": honest, "strategy": {"min_clients": fewest}}
    options["max_clients_per_site"] = each
    whole = Release("skellam", 2.0, dimension=40)
    to_a_site = Release("skellam", pytest.approx(math.sqrt(4.0 - each * share**2)), dimension=40)
    openly = releases_of(plan_of("distributed", **options))
    upload = Release("skellam", share, dimension=40)
    assert openly == {"release": to_a_site, "outsiders": whole, "uploads": upload}
    hidden = releases_of(plan_of("distributed", secure_aggregation=True, **options))
    assert hidden == {"release": to_a_site, "outsiders": whole, "sums": whole}
    assert epsilon([openly["uploads"]], 1e-5) >= epsilon([openly["release"]], 1e-5)


def test_noise_is_rounded_to_whole_levels_where_clients_add_it():
    """Catches: float noise under an integer update, whose low bits would tell what is under it."""
    for mode in ("local", "distributed"):
        plan = plan_of(mode, noise_multiplier=1.0)
        noise = mechanism_of(plan).client_noise(plan, noise_generator(), 3)
        assert noise.dtype == np.int64
        assert noise.shape == (40,)
        assert len(np.unique(noise)) > 30


@each_mode
@pytest.mark.parametrize("together", [1, 7, CLIENTS])
def test_clients_behind_a_gateway_carry_the_noise_of_as_many_apart(mode, together):
    """Catches: one share for a whole gateway, or its noise multiplied by k where its variance is."""
    plan = plan_of(mode, SIZE, clients=CLIENTS, noise_multiplier=Z)
    wanted = together * mechanism_of(plan).client_variance(plan)
    noise = mechanism_of(plan).client_noise(plan, noise_generator(), together)
    if not wanted:
        assert not noise.any()
    else:
        assert right(ratio(noise, wanted))
        assert stats.kstest(noise / math.sqrt(wanted), "norm").pvalue > 1e-7
