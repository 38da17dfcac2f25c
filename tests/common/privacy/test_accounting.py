"""What was spent, against published values and against dp-accounting called in another way than the program does.

Published values, with their sources, are those of section 4 (5) of the privacy notes: TensorFlow Privacy's
`compute_dp_sgd_privacy_test.py` and README, Opacus' `accountants_test.py`, and closed forms.
"""

import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from tsugiki.common.privacy.accounting import LEVELS, RELATION, Release, epsilon, skellam_zcdp

RELATIONS = dp.NeighboringRelation
ZERO_OUT = RELATIONS.REPLACE_SPECIAL
INTEGERS = [*range(2, 300), 384, 512, 1024, 2048]
"""Renyi orders of an account that is independent of the program's."""


def gaussian(noise_multiplier, sampling_probability=1.0):
    """Return a Gaussian release."""
    return Release("gaussian", noise_multiplier, sampling_probability)


def skellam(noise_multiplier, dimension=150_000):
    """Return a Skellam release."""
    return Release("skellam", noise_multiplier, dimension=dimension)


def by_pld(noise_multiplier, probability, count, delta, relation=ZERO_OUT):
    """Return epsilon by privacy loss distributions, straight from dp-accounting."""
    accountant, event = PLDAccountant(relation, 1e-3), dp.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp.PoissonSampledDpEvent(probability, event) if probability < 1 else event, count)
    return accountant.get_epsilon(delta)


def by_rdp(event, count, delta, orders=None, relation=ZERO_OUT):
    """Return epsilon by Renyi differential privacy, straight from dp-accounting."""
    accountant = RdpAccountant(orders, relation)
    accountant.compose(event, count)
    return accountant.get_epsilon(delta)


def old_conversion(accountant, delta):
    """Return epsilon as TensorFlow Privacy computed it until 2021: Mironov 2017, proposition 3."""
    return float(np.min(accountant.rdp - math.log(delta) / (accountant.orders - 1)))


# Published values

RDP = {
    "TF-Privacy, N=60000 B=150 z=1.3, 15 epochs": (1.3, 150 / 60_000, 6000, 1e-5, 0.7242234026109595),
    "TF-Privacy, N=100000 B=100 z=1, 30 epochs": (1.0, 100 / 100_000, 30_000, 1e-7, 1.4154988495445),
    "TF-Privacy, z=.7 twice": (0.7, 1.0, 2, 1e-5, 10.8602036),
    "Opacus, z=1.5 q=.04, 2250 steps": (1.5, 0.04, 2250, 1e-5, 7.32911117143),
    "MNIST, z=1.1, 60 epochs": (1.1, 256 / 60_000, 14_063, 1e-5, 2.597),
    "MNIST, z=1.1, 14100 steps": (1.1, 256 / 60_000, 14_100, 1e-5, 2.600),
    "notes 1.4": (1.0, 0.01, 1000, 1e-6, 2.43669),
    "763430 users, 5000 a round, 4120 rounds": (1.0, 5000 / 763_430, 4120, 1e-9, 3.856),
    "763430 users, 5000 a round, 5000 rounds": (1.0, 5000 / 763_430, 5000, 1e-9, 4.183),
}
TIGHT = {
    "TF-Privacy, z=.7 twice, exact": (0.7, 1.0, 2, 1e-5, 10.12249458, 1e-8),
    "TF-Privacy, z=.7 twice, PLD": (0.7, 1.0, 2, 1e-5, 10.1224946, 1e-8),
    "Opacus PRV, z=1.5 q=.04, 2249 steps": (1.5, 0.04, 2249, 1e-5, 6.777395712150674, 2e-3),  # PRV's own error is 0.01
    "MNIST, z=1.1, 60 epochs": (1.1, 256 / 60_000, 14_063, 1e-5, 2.391, 1e-3),
    "MNIST, z=1.1, 14100 steps": (1.1, 256 / 60_000, 14_100, 1e-5, 2.394, 1e-3),
    "notes 1.4": (1.0, 0.01, 1000, 1e-6, 2.12525, 1e-3),
    "relation trap": (1.0, 1.0, 10, 1e-5, 17.857, 1e-3),
}


@pytest.mark.parametrize(("z", "q", "count", "delta", "published"), RDP.values(), ids=list(RDP))
def test_our_releases_cost_what_others_have_published_by_rdp(z, q, count, delta, published):
    """Catches: a release that becomes another event: variance for deviation, no sampling, twice the sensitivity."""
    assert by_rdp(gaussian(z, q).event(), count, delta) == pytest.approx(published, rel=1e-3)
    assert epsilon({gaussian(z, q): count}, delta) <= published * (1 + 1e-3)


@pytest.mark.parametrize(("z", "q", "count", "delta", "published", "rel"), TIGHT.values(), ids=list(TIGHT))
def test_epsilon_is_as_tight_as_others_have_published(z, q, count, delta, published, rel):
    """Catches: the looser bound given where a tighter one is known, and a delta taken for another."""
    assert epsilon({gaussian(z, q): count}, delta) == pytest.approx(published, rel=rel)


@pytest.mark.parametrize(
    ("z", "epochs", "old", "new"), [(1.1, 60, 3.01, 2.597), (1.3, 15, 1.19, None), (0.7, 45, 7.10, None)]
)
def test_the_values_of_mnist_by_the_old_and_the_new_conversion(z, epochs, old, new):
    """Catches: a rounds-to-epsilon table compared with papers whose conversion from RDP was the old one."""
    accountant = RdpAccountant()
    accountant.compose(gaussian(z, 256 / 60_000).event(), round(epochs * 60_000 / 256))
    assert old_conversion(accountant, 1e-5) == pytest.approx(old, abs=0.005)
    assert accountant.get_epsilon(1e-5) < old
    if new:
        assert accountant.get_epsilon(1e-5) == pytest.approx(new, rel=1e-3)


def test_the_relation_is_zero_out():
    """Catches: replace-one, which doubles the sensitivity (and only in one of dp-accounting's two accountants)."""
    ours = epsilon({gaussian(1.0): 10}, 1e-5)
    assert f"zero-out ({ZERO_OUT.name})" == RELATION
    assert by_pld(1.0, 1, 10, 1e-5) == pytest.approx(ours, rel=1e-3)
    assert by_pld(1.0, 1, 10, 1e-5, RELATIONS.ADD_OR_REMOVE_ONE) == pytest.approx(17.857, rel=1e-4)
    assert by_pld(1.0, 1, 10, 1e-5, RELATIONS.REPLACE_ONE) == pytest.approx(46.211, rel=1e-4)
    assert by_pld(2.0, 1, 10, 1e-5, RELATIONS.REPLACE_ONE) == pytest.approx(17.857, rel=1e-4)
    twice = by_rdp(dp.GaussianDpEvent(1.0), 10, 1e-5, relation=RELATIONS.REPLACE_ONE)
    assert twice == pytest.approx(19.054, rel=1e-4)


@pytest.mark.parametrize(("clients", "published"), [(100, 209), (1_000, 1_612), (10_000, 14_588)])
def test_what_the_server_sees_without_secure_aggregation(clients, published):
    """Catches: an epsilon of thousands that is capped, cut off or left out."""
    share = 6.0023 / math.sqrt(clients)
    assert epsilon({gaussian(share): 100}, 1e-5) == pytest.approx(published, rel=1e-3)
    by_skellam = epsilon({skellam(share): 100}, 1e-5)
    assert by_skellam <= by_rdp(skellam(share).event(), 100, 1e-5, INTEGERS) * (1 + 1e-9)
    assert published < by_skellam < 2 * published  # the Renyi bound is proved for integer orders, of which 2 is best


@pytest.mark.parametrize(("present", "published"), [(100, 8.0), (99, 8.05), (90, 8.53), (80, 9.16), (50, 12.26)])
def test_what_silent_clients_cost(present, published):
    """Catches: noise that falls with the number of clients instead of its root."""
    assert epsilon({gaussian(6.0023 * math.sqrt(present / 100)): 100}, 1e-5) == pytest.approx(published, abs=0.006)


# Every epsilon again, by an account made here


@pytest.mark.parametrize(("z", "count", "delta"), [(0.3, 1, 1e-5), (1.0, 7, 1e-6), (6.0, 100, 1e-5), (50.0, 1000, 0.1)])
def test_gaussian_releases_are_accounted_exactly(z, count, delta):
    """Catches: composition that is not that of the root of the count; Balle and Wang 2018, theorem 8, is checked."""
    ours, mu = epsilon({gaussian(z): count}, delta), math.sqrt(count) / z
    normal = stats.norm.cdf
    found = normal(mu / 2 - ours / mu) - math.exp(ours) * normal(-mu / 2 - ours / mu)
    assert found == pytest.approx(delta, rel=1e-6)
    assert ours == pytest.approx(dp.get_epsilon_gaussian(z / math.sqrt(count), delta), rel=1e-9)


@pytest.mark.parametrize(
    ("z", "q", "count", "delta"), [(1.0, 0.1, 100, 1e-5), (0.7, 0.5, 10, 1e-6), (4.0, 0.9, 3, 1e-5)]
)
def test_sampled_releases_are_accounted_by_pld(z, q, count, delta):
    """Catches: no amplification, amplification twice, or the looser of two bounds."""
    ours, rdp = epsilon({gaussian(z, q): count}, delta), by_rdp(gaussian(z, q).event(), count, delta)
    assert ours == pytest.approx(min(by_pld(z, q, count, delta), rdp), rel=1e-9)
    assert ours < epsilon({gaussian(z): count}, delta)


@pytest.mark.parametrize(("z", "count", "d"), [(8.0, 100, 150_000), (0.6, 10, 5_000), (2.0, 1, 10**7), (1.0, 4, 100)])
def test_skellam_releases_cost_a_little_more_than_gaussian_ones(z, count, d):
    """Catches: a Skellam release accounted as Gaussian, and the 6 % of the Renyi bound where a tighter one is known."""
    exact = dp.get_epsilon_gaussian(z / math.sqrt(count), 1e-5)
    assert exact < epsilon({skellam(z, d): count}, 1e-5) <= exact * 1.001


@pytest.mark.parametrize(("z", "count", "d"), [(0.02, 1, 10**7), (0.001, 10, 5_000), (0.005, 1, 150_000)])
def test_skellam_releases_with_little_noise_are_accounted_by_rdp(z, count, d):
    """Catches: a Skellam release accounted as Gaussian where it is none, or the terms of the bound mixed up."""
    square, variance = LEVELS**2, (z * LEVELS) ** 2
    taxicab = min(math.sqrt(d) * LEVELS, square)
    rdp = [
        a * square / (2 * variance)
        + min(((2 * a - 1) * square + 6 * taxicab) / (4 * variance**2), 3 * taxicab / (2 * variance))
        for a in INTEGERS
    ]
    wanted = dp.rdp.compute_epsilon(INTEGERS, count * np.array(rdp), 1e-5)[0]
    assert wanted > 600
    assert epsilon({skellam(z, d): count}, 1e-5) == pytest.approx(wanted, rel=1e-3)
    event = dp.ZCDpEvent(*skellam_zcdp(z, d))
    assert epsilon({skellam(z, d): count}, 1e-5) == pytest.approx(by_rdp(event, count, 1e-5, INTEGERS), rel=1e-3)


def test_mixtures():
    """Catches: epsilons added up (too large), or releases of another noise multiplier forgotten (too small)."""
    assert epsilon([gaussian(1.0), gaussian(2.0), gaussian(2.0)], 1e-5) == pytest.approx(
        dp.get_epsilon_gaussian((1 + 2 / 4) ** -0.5, 1e-5), rel=1e-9
    )
    both = PLDAccountant(ZERO_OUT, 1e-3)
    both.compose(gaussian(4.0, 0.1).event(), 50).compose(dp.GaussianDpEvent(8.0), 20)
    assert epsilon({gaussian(4.0, 0.1): 50, gaussian(8.0): 20}, 1e-5) == pytest.approx(both.get_epsilon(1e-5), rel=1e-3)
    with_skellam = RdpAccountant(INTEGERS, ZERO_OUT)
    with_skellam.compose(gaussian(4.0, 0.1).event(), 50).compose(dp.ZCDpEvent(*skellam_zcdp(8.0, 100)), 5)
    ours = epsilon({gaussian(4.0, 0.1): 50, skellam(8.0, 100): 5}, 1e-5)
    assert ours == pytest.approx(with_skellam.get_epsilon(1e-5), rel=1e-3)


def test_without_noise_epsilon_is_infinite():
    """Catches: a division by zero, and one release without noise that is forgotten among many with it."""
    assert epsilon([gaussian(0.0)], 1e-5) == math.inf
    assert epsilon([skellam(0.0)], 1e-5) == math.inf
    assert epsilon({gaussian(8.0): 100, gaussian(0.0, 0.01): 1}, 1e-5) == math.inf
    assert epsilon([], 1e-5) == 0.0


def test_counts_and_lists_mean_the_same():
    """Catches: a count that is taken for one release."""
    assert epsilon([gaussian(3.0)] * 5, 1e-5) == epsilon({gaussian(3.0): 5}, 1e-5)


def test_a_hopeless_sampled_run_has_a_bound_too():
    """Catches: gigabytes and minutes for an epsilon of thousands that promises nothing."""
    event = gaussian(0.06, 0.5).event()
    assert epsilon({gaussian(0.06, 0.5): 100}, 1e-5) == pytest.approx(by_rdp(event, 100, 1e-5, INTEGERS))


@pytest.mark.parametrize(
    "kind", [gaussian, skellam, lambda z: gaussian(z, 0.2)], ids=["gaussian", "skellam", "sampled"]
)
def test_epsilon_grows_with_rounds_and_falls_with_noise(kind):
    """Catches: a table of noise read the wrong way round."""
    by_rounds = [epsilon({kind(2.0): rounds}, 1e-5) for rounds in (1, 2, 5, 20)]
    by_noise = [epsilon({kind(z): 10}, 1e-5) for z in (8.0, 4.0, 2.0, 1.0)]
    by_delta = [epsilon({kind(2.0): 10}, delta) for delta in (1e-3, 1e-5, 1e-7)]
    for values in (by_rounds, by_noise, by_delta):
        assert values == sorted(values)
        assert len(set(values)) == len(values)


def test_epsilon_grows_with_the_share_of_clients():
    """Catches: a probability q taken for 1 - q."""
    values = [epsilon({gaussian(1.0, q): 10}, 1e-5) for q in (0.01, 0.1, 0.5, 0.99, 1.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("noise", ["gaussian", "skellam"])
@pytest.mark.parametrize("least", [1e-300, 1e-100, 1e-10])
def test_next_to_no_noise_counts_as_none(noise, least):
    """Catches: powers of a tiny noise multiplier that are 0 in floats: a traceback, or a finite figure."""
    assert epsilon([Release(noise, least, dimension=10)], 1e-5) == math.inf
