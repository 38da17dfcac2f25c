"""The bound for Skellam noise from that of Gaussian noise, against the noise's own epsilon, summed over its values."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import optimize, signal, special, stats

from tsugiki.common.privacy.near_gaussian import SkellamNoise, _log_ratio, _mass_beyond, near_gaussian_epsilon

DELTA = 1e-5
STEP = 1e-4
"""Of the grid of privacy losses."""


def bound(variance, levels, dimension=1, count=1):
    """Return the bound of releases with an L2 sensitivity of so many levels."""
    noise = math.sqrt(variance) / levels / math.sqrt(count)
    noises = [SkellamNoise(variance, dimension * count)]
    return near_gaussian_epsilon(lambda delta: dp_accounting.get_epsilon_gaussian(noise, delta), noises, DELTA)


def losses_of(variance, shift):
    """Return the privacy loss of a coordinate that is moved by so many levels, as masses on the grid of `STEP`.

    Losses are rounded down, so that the epsilon that follows is a little too small. Returned: masses, and the number of
    the first.
    """
    edge = int(9 * math.sqrt(variance))
    masses = special.ive(np.abs(np.arange(-edge, edge + 1)), variance)
    moved, still = masses[:-shift], masses[shift:]
    bins = np.floor(np.log(moved / still) / STEP).astype(int)
    return np.bincount(bins - bins.min(), moved), bins.min()


def true_epsilon(variance, shifts):
    """Return the epsilon of one release whose coordinates are moved by these numbers of levels."""
    masses, first = np.ones(1), 0
    for shift in shifts:
        more, start = losses_of(variance, shift)
        masses, first = signal.fftconvolve(masses, more), first + start
    losses = STEP * (first + np.arange(len(masses)))

    def left(value):
        beyond = losses > value
        return float(np.sum(masses[beyond] * -np.expm1(value - losses[beyond]))) - DELTA

    return optimize.brentq(left, 0, 50)


@pytest.mark.parametrize(
    ("shifts", "noise"),
    [([2_000], 0.6), ([2_000], 2.0), ([1_000] * 4, 0.6), ([1_000] * 4, 2.0), ([500] * 16, 1.0), ([1_600, 1_200], 1.0)],
    ids=["one", "one, more noise", "four", "four, more noise", "many", "unequal"],
)
def test_real_skellam_noise_is_within_the_bound(shifts, noise):
    """Catches: a bound that real noise exceeds, for one coordinate or for many; and one that is looser than RDP's."""
    levels = math.sqrt(sum(shift**2 for shift in shifts))
    variance = (levels * noise) ** 2
    real = true_epsilon(variance, shifts)
    exact = dp_accounting.get_epsilon_gaussian(noise, DELTA)
    assert real == pytest.approx(exact, rel=2e-3)  # the sum of the losses is right
    assert max(real, exact) < bound(variance, levels, len(shifts)) < 1.05 * exact


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


def test_a_delta_too_small_for_floats_gives_no_figure():
    """Catches: a division by zero for settings that a server sends."""
    noise = [SkellamNoise(1e9, 10)]
    assert near_gaussian_epsilon(lambda delta: 500.0, noise, 1e-200) == math.inf
