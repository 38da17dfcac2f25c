"""Limit the influence of one client: scale its update to a bounded L2 norm, in integers.

All private arithmetic uses integers. Floats are denser near zero than elsewhere, so the low bits of a noisy float can
reveal the value under the noise (Mironov 2012, section 4); and a sum of rounded floats is not the rounded sum. An
update is therefore measured in levels (`LEVELS` of them are one clip norm) and rounded toward zero, and its norm is
checked exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Levels = npt.NDArray[np.int64]
"""Updates in units of clip_norm / LEVELS; shape (size,), or (clients, size)."""

LEVELS = 2**16
"""Number of levels in a clip norm. Rounding changes a coordinate by at most 1 / LEVELS of the clip norm, and more
levels would make that smaller. But the noise has a variance of about (LEVELS * noise_multiplier)^2, and above about
10^12 the acceptance test of NumPy's Poisson sampler fails, because float64 rounds."""


@dataclass(frozen=True)
class Clipped:
    """Clipped updates, and how clipping changed them. The party that clipped keeps `norm` and `null` to itself.

    Args:
        levels: the clipped updates, shape (..., size).
        norm: L2 norms before clipping, shape (...); 0 for updates that were not finite, infinite above 1e154.
        null: whether an update was not finite and became zero, shape (...), bool.
    """

    levels: Levels
    norm: npt.NDArray[np.float64]
    null: npt.NDArray[np.bool_]


def clip(update: npt.NDArray[Any], clip_norm: float) -> Clipped:
    """Scale each update to an L2 norm of at most `clip_norm` and round it toward zero.

    The norm is taken over the whole last axis, in float64, without overflow. An update with a NaN or an infinity
    becomes zero, because an error would reveal something about the data to the server.

    Args:
        update: local minus received adapters, shape (..., size), any numeric type.
        clip_norm: above 0.

    Source: McMahan et al. 2018, arXiv:1710.06963, section 2 ("flat clipping"); rounding: privacy notes in
    docs/privacy.md.
    """
    values = np.asarray(update, np.float64)
    null = np.asarray(~np.isfinite(values).all(axis=-1))
    if null.any():
        values = np.where(null[..., None], 0.0, values)
    # Short updates keep their length: the factor then only changes the unit to levels.
    norm = _norm(values)
    factor = LEVELS / np.where(norm > clip_norm, norm, clip_norm)
    huge = np.isinf(norm)  # squares of 1e200 overflow; such updates are scaled down first
    if huge.any():
        values = np.where(huge[..., None], values * 2.0**-600, values)
        factor = np.where(huge, LEVELS / _norm(values), factor)
    # Rounding toward zero makes no coordinate longer, so it does not undo the clipping.
    levels = np.trunc(values * factor[..., None]).astype(np.int64)
    return Clipped(_within(levels), norm, null)


def _norm(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return L2 norms over the last axis, shape (...); infinite where a square overflows."""
    with np.errstate(over="ignore"):
        return np.asarray(np.sqrt(np.einsum("...i,...i->...", values, values)))


def _within(levels: Levels) -> Levels:
    """Return the levels, moved toward zero where float rounding leaves the exact norm above `LEVELS`."""
    while (over := squared_norm(levels) > LEVELS**2).any():
        levels = np.where(over[..., None], levels - np.sign(levels), levels)
    return levels


def squared_norm(levels: Levels) -> npt.NDArray[np.int64]:
    """Return the squared L2 norms in levels, exactly, shape (...); for clipped updates, below 2^33."""
    return np.asarray(np.einsum("...i,...i->...", levels, levels))


def to_float(levels: npt.NDArray[Any], clip_norm: float, clients: float) -> npt.NDArray[np.float32]:
    """Return the mean update of a sum over `clients`, in the adapter's own units, shape (size,)."""
    return (np.asarray(levels, np.float64) * (clip_norm / LEVELS) / clients).astype(np.float32)
