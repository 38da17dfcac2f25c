"""Noise: nobody can foretell it, and it has the distribution that the account counts on."""

import math
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from tsugiki.common.privacy.noise import MOST_VARIANCE, gaussian, noise_generator, skellam
from tsugiki.common.rng import generator, seed_everything

LEAST_P = 1e-7
"""A right sampler fails a test of shape once in ten million runs."""
SIGMAS = 5.4
"""The same for a normal variable, both sides together."""


def draws(count=4, *arguments):
    """Return a few numbers of a generator made anew."""
    return noise_generator(*arguments).integers(0, 2**63, count).tolist()


def normal_p(values, deviation):
    """Return the p-value of a Kolmogorov-Smirnov test against N(0, deviation^2)."""
    return stats.kstest(np.asarray(values, np.float64) / deviation, "norm").pvalue


def skellam_p(values, variance):
    """Return the p-value of a chi-square test against scipy's Skellam distribution; tails are put together."""
    edge = math.ceil(4 * math.sqrt(variance))
    middle = np.arange(-edge + 1, edge)
    law = stats.skellam(variance / 2, variance / 2)
    expected = [law.cdf(-edge), *law.pmf(middle), law.sf(edge - 1)]
    counted = np.bincount(np.clip(values, -edge, edge) + edge, minlength=2 * edge + 1)
    return stats.chisquare(counted, np.array(expected) * len(values)).pvalue


def correlation(one, other):
    """Return the correlation in units of its own standard deviation."""
    return float(np.corrcoef(one, other)[0, 1] * math.sqrt(len(one)))


# Where it comes from


def test_no_two_generators_are_alike():
    """Catches: one generator, or one key, for all clients and rounds: shares that add up instead of averaging out."""
    first = {tuple(draws(2)) for _ in range(200)}
    assert len(first) == 200
    assert len({draws(1, 0, "server", 1)[0] for _ in range(50)}) == 50


def test_no_seed_makes_noise_repeat():
    """Catches: noise from NumPy's or Python's global generator, or from the run's seed, which every site knows."""
    found = []
    for _ in range(2):
        seed_everything(42)
        np.random.seed(42)
        random.seed(42)
        found.append((draws(), skellam(noise_generator(0, "site-0", 1), 1e6, (4,)).tolist()))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_noise_leaves_the_global_generators_alone():
    """Catches: noise that is drawn from a generator of the training, whose numbers then depend on privacy."""
    seed_everything(42)
    before = (np.random.get_state()[1].tolist(), random.getstate())
    draws()
    skellam(noise_generator(), 1e6, (100,))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_a_key_is_256_bits_of_the_operating_system_and_the_stream_is_chacha20(monkeypatch):
    """Catches: a key folded to fewer bits, fewer rounds, or a stream that is not the cipher it is called."""
    asked = []

    def token(count):
        asked.append(count)
        return bytes(range(count))

    monkeypatch.setattr("tsugiki.common.privacy.noise.secrets.token_bytes", token)
    found = noise_generator().bit_generator.random_raw(64)
    stream = Cipher(algorithms.ChaCha20(bytes(range(32)), bytes(16)), mode=None).encryptor().update(bytes(512))
    assert asked == [32]
    assert np.array_equal(found, np.frombuffer(stream, "<u8"))


@pytest.mark.parametrize("bit", [0, 100, 255])
def test_every_bit_of_the_key_counts(monkeypatch, bit):
    """Catches: a key of which only 32 or 64 bits are used."""
    found = []
    for key in (bytes(32), (1 << bit).to_bytes(32, "little")):
        monkeypatch.setattr("tsugiki.common.privacy.noise.secrets.token_bytes", lambda count, key=key: key)
        found.append(draws())
    assert found[0] != found[1]


def test_seeded_noise_repeats_and_differs_by_purpose():
    """Catches: a test mode that does not repeat, or in which all clients and rounds draw the same noise."""
    assert draws(4, 7, "site-0", 1) == draws(4, 7, "site-0", 1)
    others = [(7, "site-1", 1), (7, "site-0", 2), (7, "site-0"), (8, "site-0", 1), (7, "server", 1), (7,)]
    assert len({tuple(draws(4, *other)) for other in [(7, "site-0", 1), *others]}) == 7


def test_seeded_noise_is_not_the_runs_other_randomness():
    """Catches: noise equal to the draws of cohorts or batches where both seeds are the same number."""
    assert draws(4, 42, "cohort", 1) != generator(42, "cohort", 1).integers(0, 2**63, 4).tolist()


# What it looks like


@pytest.mark.parametrize("deviation", [1.0, 65536.0, 6.5e8])
def test_gaussian_noise_is_normal_with_its_deviation(deviation):
    """Catches: a variance taken for a deviation, and another distribution of the same variance."""
    values = gaussian(noise_generator(), deviation, (100_000,))
    assert normal_p(values, deviation) > LEAST_P
    assert values.dtype == np.float64


def test_other_noise_fails_the_same_test():
    """Catches: a test of shape that anything passes."""
    draw = noise_generator()
    uniform = draw.uniform(-math.sqrt(3), math.sqrt(3), 100_000)
    assert normal_p(uniform, 1.0) < LEAST_P
    assert normal_p(draw.laplace(0, math.sqrt(0.5), 100_000), 1.0) < LEAST_P
    assert normal_p(gaussian(draw, 1.05, (100_000,)), 1.0) < LEAST_P


@pytest.mark.parametrize("variance", [0.5, 3.0, 40.0])
def test_small_skellam_noise_has_its_distribution(variance):
    """Catches: the variance given to each of the two Poisson variables, and a rounded Gaussian called Skellam."""
    values = skellam(noise_generator(), variance, (200_000,))
    assert values.dtype == np.int64
    assert skellam_p(values, variance) > LEAST_P


def test_other_integer_noise_fails_the_same_test():
    """Catches: a chi-square test with bins so wide that it sees nothing."""
    draw, variance = noise_generator(), 3.0
    doubled = draw.poisson(variance, 200_000) - draw.poisson(variance, 200_000)
    rounded = np.rint(gaussian(draw, math.sqrt(variance), (200_000,))).astype(np.int64)
    one_sided = draw.poisson(variance, 200_000) - int(variance)
    for broken in (doubled, rounded, one_sided):
        assert skellam_p(broken, variance) < LEAST_P


def test_a_sum_of_skellam_shares_is_skellam():
    """Catches: shares whose sum has another distribution, so that a dropped client would change the account."""
    shares = skellam(noise_generator(), 0.25, (12, 200_000))
    assert skellam_p(shares.sum(axis=0), 3.0) > LEAST_P
    assert skellam_p(shares[1:].sum(axis=0), 2.75) > LEAST_P
    assert skellam_p(shares[1:].sum(axis=0), 3.0) < LEAST_P


def test_no_variance_is_no_noise():
    """Catches: a mode without noise that adds some, in which two modes could not be compared bit by bit."""
    assert not skellam(noise_generator(), 0.0, (1000,)).any()
    assert not gaussian(noise_generator(), 0.0, (1000,)).any()


def test_at_the_largest_variance_drawn_at_once_the_sampler_is_right():
    """Catches: a limit set where NumPy's sampler has already lost its acceptance test to rounding."""
    values = skellam(noise_generator(), MOST_VARIANCE, (400_000,))
    assert normal_p(values, math.sqrt(MOST_VARIANCE)) > LEAST_P
    ratio = float(np.mean(values.astype(np.float64) ** 2)) / MOST_VARIANCE
    assert abs(ratio - 1) < SIGMAS * math.sqrt(2 / len(values))


def test_above_it_numpys_own_sampler_is_wrong():
    """Catches: the limit lifted because it looks arbitrary; at 6e13 the variance is 2 % off, at 6e14 9 %."""
    draw = np.random.default_rng(1)
    for variance, size in ((6e13, 3_000_000), (6e14, 400_000)):
        values = draw.poisson(variance / 2, size) - draw.poisson(variance / 2, size)
        assert normal_p(values, math.sqrt(variance)) < LEAST_P
        assert np.mean(values.astype(np.float64) ** 2) / variance - 1 > SIGMAS * math.sqrt(2 / size)


@pytest.mark.parametrize("variance", [MOST_VARIANCE * 1.001, 6e13])
def test_more_variance_is_drawn_in_parts(variance):
    """Catches: noise of a wrong distribution, silently, and parts that do not add up to the variance."""
    values = skellam(noise_generator(), variance, (200_000,))
    assert normal_p(values, math.sqrt(variance)) > LEAST_P
    ratio = float(np.mean(values.astype(np.float64) ** 2)) / variance
    assert abs(ratio - 1) < SIGMAS * math.sqrt(2 / len(values))


@pytest.mark.parametrize("sampler", [gaussian, skellam], ids=["gaussian", "skellam"])
def test_clients_and_rounds_are_independent(sampler):
    """Catches: a client's noise used again in the next round (their difference has none), or by another client."""
    size = 100_000
    found = [sampler(noise_generator(), 1e4, (size,)) for _ in range(3)]  # two clients, and one of them a round later
    assert abs(correlation(found[0], found[1])) < SIGMAS
    assert abs(correlation(found[0], found[2])) < SIGMAS
    batch = sampler(noise_generator(), 1e4, (2, size))
    assert abs(correlation(*batch)) < SIGMAS
    assert abs(correlation(batch[0][1:], batch[0][:-1])) < SIGMAS


def test_dependent_noise_fails_the_same_check():
    """Catches: a check of independence that equal or partly equal noise passes."""
    same = [np.random.default_rng(42).normal(size=100_000) for _ in range(2)]
    assert correlation(*same) > SIGMAS
    partly = same[0] + 4 * np.random.default_rng(43).normal(size=100_000)
    assert correlation(same[0], partly) > SIGMAS
