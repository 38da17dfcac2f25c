"""Bound what Skellam noise costs beyond Gaussian noise of the same variance.

A Renyi bound has to be converted to (epsilon, delta), and the conversion alone adds about 6 % to epsilon. Skellam noise
of many levels is so close to rounded Gaussian noise that the exact epsilon of the Gaussian holds with a small addition.
Rounding is post-processing, so a clipped update in integers plus rounded Gaussian noise costs what the Gaussian costs.

Let V be the variance of the noise in levels^2, and s = sqrt(V). The proof has three steps.

1. One coordinate. Let f be the probability of a Skellam value k, g that of rounded Gaussian noise. With a = k + 1/2,
   f(k + 1) / f(k) = I_{k+1}(V) / I_k(V) is between V / (a + sqrt(V^2 + (a + 1)^2)) and
   V / (a + sqrt(V^2 + a^2)) = exp(-asinh(a / V)): Amos 1974, "Computation of Modified Bessel Functions and Their
   Ratios", Mathematics of Computation 28. The tests compare both bounds with exact ratios.
   Summed over k, with x - x^3 / 6 <= asinh(x) <= x:
   -(k^2 + k) / (2 V^2) <= ln(f(k) / f(0)) + k^2 / (2 V) <= k^4 / (24 V^3).
   From the integral of the density over [k - 1/2, k + 1/2]:
   -1 / (8 V) <= ln(g(k) / g(0)) + k^2 / (2 V) <= k^2 / (8 V^2) + 1 / (8 V).
   Both add up to 1, so for |k| <= B s, |ln(f(k) / g(k))| is at most the sum of these four bounds, and twice the mass
   beyond B s. By Chernoff's bound, f has at most the mass 2 exp(-B^2 / 2 + B^4 / (6 V)) there.
2. All coordinates of all releases. Noise is drawn anew for each, so the composition theorem of Kairouz, Oh and
   Viswanath 2015, arXiv:1311.0776, for steps that differ, bounds how far apart both kinds of noise are together: by a
   factor exp(`distance`), except for a probability `failure`.
3. P(S) <= exp(distance) P'(S) + failure, where P' is the same run with rounded Gaussian noise; the same holds for a run
   Q without the client, in the other direction; and P'(S) <= exp(e) Q'(S) + d by the Gaussian's exact account.
   Together: P(S) <= exp(e + 2 distance) Q(S) + exp(distance) d + (1 + exp(distance + e)) failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FAILURE = 1e-4
"""The share of delta that the difference of the two kinds of noise may take."""
_MOST_EPSILON = 600.0
"""Above it, exp(epsilon) comes near to the largest float, and no figure promises anything."""


@dataclass(frozen=True)
class SkellamNoise:
    """The Skellam noise of equal releases.

    Args:
        variance: in levels^2, on each coordinate.
        coordinates: number of all coordinates of all these releases.
    """

    variance: float
    coordinates: int


def near_gaussian_epsilon(
    gaussian_epsilon: Callable[[float], float], noises: Sequence[SkellamNoise], delta: float
) -> float:
    """Return an epsilon of releases with Skellam noise; infinite where this bound says nothing.

    Args:
        gaussian_epsilon: called with a delta in (0, 1); returns the exact epsilon of the same releases with Gaussian
            noise of the same variances.
        noises: of all releases with Skellam noise.
        delta: in (0, 1).
    """
    most = gaussian_epsilon(delta / 2)
    if most > _MOST_EPSILON:
        return math.inf
    allowed = _FAILURE * delta * math.exp(-most)
    if allowed == 0:  # a delta so small that the product is no float
        return math.inf
    distance, failure = _difference(noises, allowed)
    if distance > 1:
        return math.inf
    # What is left of delta for the Gaussian; more than half, so that its epsilon is at most `most`.
    left = (delta - (1 + math.exp(distance + most)) * failure) * math.exp(-distance)
    if left < delta / 2:
        return math.inf
    return gaussian_epsilon(left) + 2 * distance


def _difference(noises: Sequence[SkellamNoise], allowed: float) -> tuple[float, float]:
    """Return how far Skellam noise is from rounded Gaussian noise: `distance` and `failure` of step 2.

    Args:
        noises: as `near_gaussian_epsilon`.
        allowed: the failure that is aimed at, in (0, 1).
    """
    coordinates = sum(noise.coordinates for noise in noises)
    width = math.sqrt(2 * math.log(8 * coordinates / allowed))
    failure = allowed / 2
    squares = 0.0
    drift = 0.0
    for noise in noises:
        beyond = _mass_beyond(noise.variance, width)
        ratio = _log_ratio(noise.variance, width, beyond)
        if ratio > 1:
            return math.inf, 1.0
        failure += noise.coordinates * beyond
        squares += noise.coordinates * ratio**2
        drift += noise.coordinates * ratio * math.tanh(ratio / 2)
    return drift + math.sqrt(2 * squares * math.log(2 / allowed)), failure


def _mass_beyond(variance: float, width: float) -> float:
    """Return a bound on the mass of either noise beyond `width` standard deviations; at most 1."""
    rounding = 0.5 / math.sqrt(variance)  # rounding moves Gaussian noise by half a level
    exponent = max(width - rounding, 0.0) ** 2 / 2 - width**4 / (6 * variance)
    return min(1.0, 2 * math.exp(-exponent)) if exponent > 0 else 1.0


def _log_ratio(variance: float, width: float, beyond: float) -> float:
    """Return a bound on |ln(f(k) / g(k))| of step 1 within `width` standard deviations."""
    linear = width / (2 * math.sqrt(variance))
    return (width**4 / 24 + 5 * width**2 / 8 + linear + 0.25) / variance + 2 * beyond
