"""How much noise a budget needs, and what Skellam noise costs beyond Gaussian noise."""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, ZCDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from tsugiki.common.privacy.accounting import Release, calibrate, epsilon, skellam_zcdp

DELTA = 1e-5


def make(noise, rounds, probability=1.0):
    """Return what makes the releases of a run, given the noise multiplier."""
    return lambda z: {Release(noise, z, probability, 150_000 if noise == "skellam" else 1): rounds}


def least(noise_multiplier):
    """Whether a multiplier has 4 digits, or 5 at a power of ten."""
    return float(f"{noise_multiplier:.5g}") == noise_multiplier


@pytest.mark.parametrize(
    ("rounds", "target", "pld"),
    [(1, 8, 0.6002), (10, 8, 1.8981), (50, 8, 4.2444), (100, 8, 6.0023), (100, 2, 19.9381)],
)
def test_the_noise_of_a_budget(rounds, target, pld):
    """Catches: noise for one round instead of all, and noise calibrated by the looser Renyi bound."""
    by_gaussian, by_skellam = (calibrate(make(noise, rounds), target, DELTA) for noise in ("gaussian", "skellam"))
    assert by_gaussian == pytest.approx(pld, rel=1e-3)
    assert by_gaussian <= by_skellam == pytest.approx(pld, rel=1.5e-3)
    assert epsilon(make("gaussian", rounds)(by_gaussian), DELTA) <= target
    assert epsilon(make("skellam", rounds)(by_skellam), DELTA) <= target


@pytest.mark.parametrize(("probability", "target", "pld"), [(0.1, 2, 2.2478), (0.01, 8, 0.4646)])
def test_the_noise_of_a_budget_under_sampling(probability, target, pld):
    """Catches: noise calibrated without the amplification that the account claims."""
    found = calibrate(make("gaussian", 100, probability), target, DELTA)
    assert found == pytest.approx(pld, rel=1e-3)
    assert epsilon(make("gaussian", 100, probability)(found), DELTA) <= target


def test_a_published_noise_multiplier_spends_its_budget():
    """Catches: an account of sampled releases that is off in a way that calibration hides, being made by it."""
    assert epsilon(make("gaussian", 100, 0.1)(0.9359), DELTA) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("noise", ["gaussian", "skellam"])
@pytest.mark.parametrize(("rounds", "target"), [(1, 0.1), (3, 1.0), (10, 8.0), (1000, 4.0), (7, 300.0)])
def test_it_is_the_least_that_keeps_the_target(noise, rounds, target):
    """Catches: a multiplier rounded down or to the nearest, with which the last round would pass the budget; waste."""
    found = calibrate(make(noise, rounds), target, DELTA)
    assert least(found)
    assert epsilon(make(noise, rounds)(found), DELTA) <= target
    assert epsilon(make(noise, rounds)(found * (1 - 1.2e-3)), DELTA) > target


def test_a_budget_that_nothing_keeps_is_refused():
    """Catches: a search without an end."""
    with pytest.raises(ValueError, match="10,000"):
        calibrate(make("gaussian", 10**6), 1e-3, DELTA)


def test_up_to_ten_thousand_it_is_found():
    """Catches: a budget refused that a noise multiplier of 9,300 keeps."""
    assert epsilon(make("gaussian", 10)(9_999.0), DELTA) < 0.0005
    assert calibrate(make("gaussian", 10), 0.0005, DELTA) < 10_000


# Skellam


def by_rdp(event, rounds=100):
    """Return epsilon of so many events on integer orders."""
    accountant = RdpAccountant(list(range(2, 64)), NeighboringRelation.REPLACE_SPECIAL)
    return accountant.compose(event, rounds).get_epsilon(DELTA)


def rounded(levels, dimension):
    """Return the norm of an update after stochastic rounding: Kairouz et al. 2021, proposition 22, beta = e^-0.5.

    The program rounds toward zero and needs none of it; the published values have it.
    """
    return math.sqrt(levels**2 + dimension / 4 + levels + math.sqrt(dimension) / 2)


@pytest.mark.parametrize(
    ("bits", "dimension", "published"),
    [(16, 5_000, 6.1591), (16, 150_000, 6.1591), (10, 150_000, 6.3032), (8, 150_000, 8.0224)],
)
def test_published_values_of_skellam_noise(bits, dimension, published):
    """Catches: a bound whose sensitivity or variance is not in the same integers."""
    levels = rounded(2**bits, dimension)
    event = ZCDpEvent(*skellam_zcdp(8.0 * 2**bits / levels, dimension, levels))
    assert by_rdp(event) == pytest.approx(published, rel=2e-5)


def test_skellam_noise_comes_to_cost_what_gaussian_noise_does():
    """Catches: a term that does not vanish as levels become finer; one that is left out where they are coarse."""
    gaussian = by_rdp(GaussianDpEvent(8.0))
    assert gaussian == pytest.approx(6.1590, abs=5e-5)
    extra = [by_rdp(ZCDpEvent(*skellam_zcdp(8.0, 150_000, 2**bits))) / gaussian - 1 for bits in (1, 2, 4, 8, 16)]
    assert extra == sorted(extra, reverse=True)
    assert extra[0] > 1e-3
    assert 0 <= extra[-1] < 1e-9


def divergence(order, shift, variance):
    """Return the Renyi divergence of Skellam noise from itself shifted, summed over all integers that matter."""
    law, edge = stats.skellam(variance / 2, variance / 2), int(shift * order + 40 * math.sqrt(variance) + 40)
    values = np.arange(-edge, edge + 1)
    moved, still = law.logpmf(values - shift), law.logpmf(values)
    finite = np.isfinite(moved) & np.isfinite(still)
    return float(np.logaddexp.reduce(order * moved[finite] - (order - 1) * still[finite])) / (order - 1)


@pytest.mark.parametrize(("levels", "noise_multiplier"), [(1, 3.0), (2, 1.0), (4, 2.0), (16, 1.0)])
def test_the_bound_is_one(levels, noise_multiplier):
    """Catches: a bound that real Skellam noise exceeds; the noise's own divergence is summed up here."""
    rho, xi = skellam_zcdp(noise_multiplier, 1, levels)
    broken = rho - (levels**2) / (4 * (levels * noise_multiplier) ** 2)  # half of the leading term
    for order in (2, 3, 5, 8):
        real = divergence(order, levels, (levels * noise_multiplier) ** 2)
        assert real <= xi + rho * order
        assert real > xi + broken * order or levels < 4  # so coarse that the bound is loose


@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 8.0])
def test_it_is_the_published_bound_or_more_and_no_more_at_order_two(levels, noise_multiplier):
    """Catches: a term mixed up where it matters, which is at coarser levels than the program's."""
    square, variance = levels**2, (levels * noise_multiplier) ** 2
    for dimension in (1, 50, 10**6):
        rho, xi = skellam_zcdp(noise_multiplier, dimension, levels)
        taxicab = min(math.sqrt(dimension) * levels, square)
        for order in (2, 3, 10, 100):
            first = ((2 * order - 1) * square + 6 * taxicab) / (4 * variance**2)
            published = order * square / (2 * variance) + min(first, 3 * taxicab / (2 * variance))
            assert xi + rho * order >= published * (1 - 1e-12)
            assert order > 2 or xi + rho * order == pytest.approx(published, rel=1e-12) or xi == 0


def test_its_terms_are_never_negative():
    """Catches: a negative term, which dp-accounting refuses."""
    for levels in (1, 2, 256, 2**16):
        for noise_multiplier in (0.01, 1.0, 1e4):
            for dimension in (1, 100, 10**8):
                rho, xi = skellam_zcdp(noise_multiplier, dimension, levels)
                assert rho > 0
                assert xi >= 0
