"""Compute the epsilon of all releases together, with Google's `dp-accounting`.

A release is one noisy value that an adversary saw. Gaussian releases are accounted exactly, sampled Gaussian ones by
privacy loss distributions, Skellam ones by the exact epsilon of the Gaussian and their distance from it, or by Renyi
differential privacy where that is smaller; all under zero-out adjacency (`REPLACE_SPECIAL`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.near_gaussian import SkellamNoise, near_gaussian_epsilon

RELATION = "zero-out (REPLACE_SPECIAL)"
ACCOUNT = 2
"""Version of the rules by which releases follow from a plan. Version 1 took a site's own noise for noise
that hides the others from it."""
_DISCRETIZATION = 1e-3
_LEAST_NOISE = 1e-9
"""A noise multiplier below it counts as no noise: its powers would be too small for floats, and epsilon above 10^17."""
LARGEST_NOISE = 10_000.0  # the largest value that [privacy] accepts
_PLDLARGEST_EPSILON = 100.0
"""Above it, a privacy loss distribution takes gigabytes, so the RDP bound is used. No such figure promises anything."""
_ORDERS = (*range(2, 64), 72, 96, 128, 192, 256, 384, 512, 1024, 2048)
"""Renyi orders; integers, because the Skellam bound is proved for these."""


LARGEST = 10**12
"""More than any number of a release that was planned, and than how often one was made."""


@dataclass(frozen=True)
class Release:
    """One noisy value that an adversary saw.

    Args:
        noise: distribution of the noise.
        noise_multiplier: the standard deviation of the noise over the sensitivity; 0: no noise, no privacy.
        sampling_probability: probability of each client to be in the value, if the adversary does not know which
            clients are; else 1.
        dimension: number of coordinates; Skellam only.
    """

    noise: Literal["gaussian", "skellam"]
    noise_multiplier: float
    sampling_probability: float = 1.0
    dimension: int = 1

    @classmethod
    def from_json(cls, value: Any) -> Release:
        """Return the release that a line of a ledger holds.

        Raises:
            ValueError: it holds none: a field is missing or unknown, or a value is out of range.
        """
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(cls)}:
            raise ValueError("no release")
        release = cls(**value)
        numbers = (release.noise_multiplier, release.sampling_probability)
        if not all(type(number) in (int, float) for number in numbers) or type(release.dimension) is not int:
            raise ValueError("a value of another type")
        in_range = 0 <= numbers[0] <= LARGEST and 0 <= numbers[1] <= 1 and 1 <= release.dimension <= LARGEST
        if not in_range or release.noise not in ("gaussian", "skellam"):
            raise ValueError("a value out of range")
        return release

    def event(self) -> Any:
        """Return the release as a `dp_accounting.DpEvent`."""
        import dp_accounting

        if self.noise_multiplier <= 0:
            return dp_accounting.NonPrivateDpEvent()
        if self.noise == "skellam":
            return dp_accounting.ZCDpEvent(*skellam_zcdp(self.noise_multiplier, self.dimension))
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_probability < 1:
            return dp_accounting.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return gaussian


_Counts = Sequence[tuple[Release, int]]


def skellam_zcdp(noise_multiplier: float, dimension: int, levels: int = LEVELS) -> tuple[float, float]:
    """Return (rho, xi) so that a Skellam release has a Renyi divergence of at most xi + rho * a for integers a > 1.

    The bound has two branches, both linear in a; the one that is smaller at a = 2 is used. A negative xi becomes 0.

    Args:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity.
        dimension: number of coordinates.
        levels: the L2 sensitivity as an integer.

    Source: Agarwal et al. 2021, arXiv:2110.04995, theorem 3.5; with D2 = levels and D1 = min(sqrt(d) D2, D2^2).
    """
    square = float(levels) ** 2
    variance = (levels * noise_multiplier) ** 2
    taxicab = min(math.sqrt(dimension) * levels, square)
    first = (square / (2 * variance) + square / (2 * variance**2), (6 * taxicab - square) / (4 * variance**2))
    second = (square / (2 * variance), 3 * taxicab / (2 * variance))
    rho, xi = min(first, second, key=lambda branch: 2 * branch[0] + branch[1])
    return rho, max(xi, 0.0)


def epsilon(releases: Iterable[Release] | Mapping[Release, int], delta: float) -> float:
    """Return the epsilon of all releases together; infinite if one of them had no noise.

    Args:
        releases: all releases, in any order, or the number of times that each was made.
        delta: in (0, 1).
    """
    counts = Counter(releases)  # accepts a mapping of counts, too
    if not counts:
        return 0.0
    return _epsilon(tuple(sorted(counts.items(), key=repr)), delta)


@lru_cache(maxsize=256)
def _epsilon(counts: _Counts, delta: float) -> float:
    if any(release.noise_multiplier < _LEAST_NOISE for release, _ in counts):
        return math.inf
    if all(release.noise == "gaussian" and release.sampling_probability >= 1 for release, _ in counts):
        return _exact(counts, delta)
    # Everything else is bounded by RDP, and by something that may be tighter.
    bound = _by_renyi(counts, delta)
    if all(release.sampling_probability >= 1 for release, _ in counts):
        return min(bound, _near_gaussian(counts, delta))
    if bound > _PLDLARGEST_EPSILON or any(release.noise == "skellam" for release, _ in counts):
        return bound
    return min(bound, _by_loss_distribution(counts, delta))


def _exact(counts: _Counts, delta: float) -> float:
    """Return the epsilon of releases that are not sampled, as if all had Gaussian noise."""
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(_composed(counts), delta))


def _composed(counts: _Counts) -> float:
    """Return the noise multiplier of one Gaussian release that reveals as much as all of these with Gaussian noise.

    Gaussians of z_1, z_2, ... together reveal as much as one of (1 / z_1^2 + 1 / z_2^2 + ...)^(-1/2).
    Source: Dong, Roth and Su 2022, arXiv:1905.02383, corollary 3.3.
    """
    return float(sum(count / release.noise_multiplier**2 for release, count in counts) ** -0.5)


def _near_gaussian(counts: _Counts, delta: float) -> float:
    """Return the epsilon of releases that are not sampled, some with Skellam noise, from that of Gaussian noise."""
    noises = [
        SkellamNoise((LEVELS * release.noise_multiplier) ** 2, count * release.dimension)
        for release, count in counts
        if release.noise == "skellam"
    ]
    return near_gaussian_epsilon(lambda left: _exact(counts, left), noises, delta)


def _by_renyi(counts: _Counts, delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    renyi = RdpAccountant(_ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for release, count in _merge_gaussians(counts):
        renyi.compose(release.event(), count)
    return float(renyi.get_epsilon(delta))


def _by_loss_distribution(counts: _Counts, delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    distribution = PLDAccountant(relation, _DISCRETIZATION)
    for release, count in _merge_gaussians(counts):
        distribution.compose(release.event(), count)
    return float(distribution.get_epsilon(delta))


def _merge_gaussians(counts: _Counts) -> list[tuple[Release, int]]:
    """Return the releases with all Gaussian ones that are not sampled replaced by a single equivalent one."""
    plain = [(r, count) for r, count in counts if r.noise == "gaussian" and r.sampling_probability >= 1]
    others = [(r, count) for r, count in counts if (r, count) not in plain]
    return ([(Release("gaussian", _composed(plain)), 1)] if plain else []) + others


def calibrate(
    make: Callable[[float], Iterable[Release] | Mapping[Release, int]], target_epsilon: float, delta: float
) -> float:
    """Return the smallest noise multiplier, rounded up to 4 digits, with which the releases keep the target epsilon.

    Args:
        make: called with a noise multiplier; returns all releases of a run.
        target_epsilon: above 0.
        delta: in (0, 1).

    Raises:
        ValueError: no noise multiplier up to 10,000 is enough.
    """

    def spent(noise_multiplier: float) -> float:
        return epsilon(make(noise_multiplier), delta)

    # Double the noise until it is enough, then bisect.
    low = 1e-2
    high = 1.0
    while spent(high) > target_epsilon:
        if high >= LARGEST_NOISE:
            raise ValueError(f"no noise up to {LARGEST_NOISE:,.0f} times the clip norm is enough")
        low = high
        high = min(high * 2, LARGEST_NOISE)
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= target_epsilon else (middle, high)
    # Rounded up to 4 digits, so that the rounded multiplier keeps the target, too.
    digits = 4 - math.ceil(math.log10(high))
    rounded = math.ceil(high * 10**digits) / 10**digits
    return min(float(rounded), LARGEST_NOISE)
