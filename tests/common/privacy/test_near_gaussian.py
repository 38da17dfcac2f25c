"""The bound for Skellam noise from that of Gaussian noise, against the noise's own epsilon, summed over its values."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import special, stats

from tsugiki.common.privacy.near_gaussian import SkellamNoise, _log_ratio, _mass_beyond, near_gaussian_epsilon

DELTA = 1e-5


def bound(variance, levels, dimension=1, count=1):
    """Return the bound of releases with an L2 sensitivity of so many levels."""
    noise = math.sqrt(variance) / levels / math.sqrt(count)
    noises = [SkellamNoise(variance, dimension * count)]
    return near_gaussian_epsilon(lambda delta: dp_accounting.get_epsilon_gaussian(noise, delta), noises, DELTA)


def log_mass(variance, edge):
    """Return the logarithm of Skellam probabilities from -edge to edge."""
    orders = np.abs(np.arange(-edge, edge + 1))
    return np.log(special.ive(orders, variance))


def true_epsilon(variance, shifts):
    """Return the epsilon of one release whose coordinates are moved by these numbers of levels.

    The losses of the coordinates are added up exactly, on the grid of their values.
    """
    edge = int(14 * math.sqrt(variance))
    still = log_mass(variance, edge)
    losses, masses = np.zeros(1), np.ones(1)
    for shift in shifts:
        moved = np.roll(still, shift)[shift:-shift]
        loss, mass = (moved - still[shift:-shift]), np.exp(moved)
        losses = (losses[:, None] + loss[None, :]).ravel()
        masses = (masses[:, None] * mass[None, :]).ravel()
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        beyond = losses > middle
        delta = float(np.sum(masses[beyond] * -np.expm1(middle - losses[beyond])))
        low, high = (middle, high) if delta > DELTA else (low, middle)
    return high


@pytest.mark.parametrize(("levels", "noise"), [(2_000, 0.6), (2_000, 1.5), (5_000, 0.6), (20_000, 1.0)])
def test_real_skellam_noise_is_within_the_bound(levels, noise):
    """Catches: a bound that real noise exceeds, and one that is looser than the Renyi bound."""
    variance = (levels * noise) ** 2
    real = true_epsilon(variance, [levels])
    exact = dp_accounting.get_epsilon_gaussian(noise, DELTA)
    assert real <= bound(variance, levels) <= 1.05 * exact
    assert exact <= bound(variance, levels)


def test_real_skellam_noise_on_two_coordinates_is_within_the_bound():
    """Catches: a proof that holds for an update in a single coordinate only."""
    shift = 60
    levels = math.sqrt(2) * shift
    variance = (levels * 2.5) ** 2
    real = true_epsilon(variance, [shift, shift])
    assert real <= bound(variance, levels, dimension=2) or math.isinf(bound(variance, levels, dimension=2))
    assert real == pytest.approx(dp_accounting.get_epsilon_gaussian(2.5, DELTA), rel=0.02)


@pytest.mark.parametrize("variance", [4e4, 1e6, 1e8])
@pytest.mark.parametrize("width", [4.0, 8.0, 12.0])
def test_the_two_kinds_of_noise_are_as_close_as_the_proof_says(variance, width):
    """Catches: a term of step 1 left out: probabilities of both kinds are compared, value by value."""
    deviation = math.sqrt(variance)
    inside = np.unique(np.linspace(0, math.floor(width * deviation), 4_000).astype(int))
    skellam = np.log(special.ive(inside, variance))
    density = stats.norm(0, deviation)
    rounded = np.log(density.sf(inside - 0.5) - density.sf(inside + 0.5))
    beyond = _mass_beyond(variance, width)
    largest = np.abs(skellam - rounded).max()
    assert largest <= _log_ratio(variance, width, beyond) + 1e-9  # float64 rounds the probabilities
    # The mass of either kind outside of the window.
    assert 2 * density.sf(math.floor(width * deviation) + 0.5) <= beyond
    everywhere = np.arange(math.ceil(width * deviation), int(20 * deviation))
    if variance < 1e8:
        assert 2 * float(special.ive(everywhere, variance).sum()) <= beyond * (1 + 1e-9)


@pytest.mark.parametrize("variance", [1e2, 4e4, 1e6])
def test_the_bounds_of_the_ratio_of_bessel_functions_hold(variance):
    """Catches: Amos's inequalities the wrong way round."""
    order = np.unique(np.linspace(0, 12 * math.sqrt(variance), 500).astype(int))
    ratio = special.ive(order + 1, variance) / special.ive(order, variance)
    half = order + 0.5
    assert (ratio <= np.exp(-np.arcsinh(half / variance)) * (1 + 1e-11)).all()
    assert (ratio >= variance / (half + np.sqrt(variance**2 + (half + 1) ** 2)) * (1 - 1e-11)).all()


def test_it_says_nothing_where_the_two_kinds_differ():
    """Catches: Gaussian noise taken for what is a handful of levels."""
    assert bound(9.0, 3) == math.inf
    assert bound(1e4, 100, dimension=10**9) == math.inf
    assert bound((0.001 * 65_536) ** 2, 65_536) == math.inf  # an epsilon of half a million


def test_more_coordinates_rounds_and_less_noise_cost_more():
    """Catches: a distance that does not grow with the number of draws."""
    by_dimension = [bound((65_536 * 2.0) ** 2, 65_536, dimension) for dimension in (10, 10**4, 10**7)]
    by_count = [bound((65_536 * 2.0) ** 2, 65_536, 10**4, count) for count in (1, 2, 4)]
    by_noise = [bound((65_536 * noise) ** 2, 65_536, 10**4) for noise in (4.0, 2.0, 1.0)]
    for values in (by_dimension, by_count, by_noise):
        assert values == sorted(values)
        assert len(set(values)) == 3
