"""Unpredictable noise, from a stream cipher keyed by the operating system, never from a seeded generator.

Gaussian noise is for noise of a single party. Skellam noise, the difference of two Poisson variables, is for shares
that are summed: a sum of Skellam shares is again exactly Skellam, also after dropouts. Both are drawn in levels.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.rng import generator

if TYPE_CHECKING:
    from tsugiki.common.privacy.clipping import Levels

MOST_VARIANCE = 2e12
"""The largest Skellam variance drawn at once, in levels^2. At 2e12 the sampler passes a Kolmogorov-Smirnov test against
the normal distribution; at 6e13 it fails: its acceptance test subtracts numbers that float64 cannot tell apart."""


def noise_generator(insecure_seed: int = 0, *purpose: str | int) -> np.random.Generator:
    """Return a generator for one draw of noise: ChaCha20 with a fresh 256-bit key.

    Args:
        insecure_seed: for tests only; above 0, the noise follows from it and from `purpose`, and hides nothing.
        purpose: what the noise is for.
    """
    if insecure_seed:
        return generator(insecure_seed, "insecure-noise", *purpose)
    from randomgen import ChaCha

    bits: Any = ChaCha(key=int.from_bytes(secrets.token_bytes(32), "little"), rounds=20)
    return np.random.Generator(bits)


def gaussian(draw: np.random.Generator, standard_deviation: float, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return independent normal noise.

    Args:
        draw: from `noise_generator`.
        standard_deviation: in levels.
        shape: of the result.
    """
    return draw.normal(0.0, standard_deviation, shape)


def skellam(draw: np.random.Generator, variance: float, shape: tuple[int, ...]) -> Levels:
    """Return independent integer noise, symmetric around zero.

    Args:
        draw: from `noise_generator`.
        variance: in levels^2. Above `MOST_VARIANCE` the noise is drawn in parts, whose sum has the same distribution.
        shape: of the result.

    Source: Agarwal et al. 2021, arXiv:2110.04995, definition 3.1.
    """
    parts = max(1, math.ceil(variance / MOST_VARIANCE))
    rate = variance / parts / 2
    return sum((draw.poisson(rate, shape) - draw.poisson(rate, shape) for _ in range(parts)), np.zeros(shape, np.int64))
