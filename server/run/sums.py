"""Running sums: each update is added when it arrives and then forgotten, so memory does not grow with the sites.

Updates arrive in any order, and a sum of floats depends on its order. Here every update is first rounded to a common
grid. On that grid float64 adds without rounding, so any order of arrival gives the same bits.

Source: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", 21st IEEE Symposium on Computer Arithmetic
(ARITH), 2013; "Parallel Reproducible Summation", IEEE Transactions on Computers 64(7), 2015. This is the simplest form
of their method: one grid, chosen in advance, because the guard bounds what may be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.wire.arrays import PackedLevels
from tsugiki.common.wire.spec import BLOCK, Vector, blocks

SHORT = 2.0**17
"""Weighted updates up to this length (L2 norm times rows) share one grid. Longer ones get coarser grids of their own,
so that neither `max_update_norm` nor the rows that one site claims make the grid of ordinary updates coarse."""
RATIO = 2.0**20
"""The ratio of the lengths that two neighbouring grids are made for."""


class RunningMean:
    """The mean of the updates that were added so far, weighted by rows.

    A weighted update x is rounded to the grid as (x + c) - c, with c = 1.5 * 2^k: near c, float64 has no digits below
    2^(k - 52). Let T be the largest length of a weighted update on the grid times the number of updates. k is chosen
    such that 2^(k - 1) is the least power of two that is not below T. So no sum exceeds 2^51 units of the grid, and all
    sums are exact. Rounding changes each weighted update by at most 2^-51 * T. With n updates of norm times rows L, on
    the first grid, that is at most n * 2^-34 / L of the update.

    Args:
        size: of an update.
        count: the most updates that may be added.
    """

    def __init__(self, size: int, count: int) -> None:
        self._size = size
        self._most = count
        self._count = 0
        self._sums: dict[int, npt.NDArray[np.float64]] = {}  # one for each grid in use
        self._scratch = np.empty(BLOCK)
        self.weight = 0

    def add(self, update: Vector, norm: float, weight: int) -> None:
        """Add an update, shape (size,), of this L2 norm and with this weight in rows.

        Raises:
            ValueError: it is one update more than the grids were made for.
        """
        if self._count == self._most:
            raise ValueError(f"a sum of {self._most} updates has no room for another")
        self._count += 1
        grid = _grid(norm * weight)
        if grid not in self._sums:
            self._sums[grid] = np.zeros(self._size)
        total = self._sums[grid]
        constant = self._constant(grid)
        self.weight += weight
        for part in blocks(self._size):
            weighted = self._scratch[: part.stop - part.start]
            weighted[:] = update[part]  # a copy that widens is faster than a product that does
            weighted *= weight
            weighted += constant
            weighted -= constant  # now a multiple of the grid's unit
            block = total[part]
            block += weighted

    def _constant(self, grid: int) -> float:
        # a little more than the bound: the norm itself was rounded
        _, exponent = math.frexp(SHORT * RATIO**grid * self._most * (1 + 1e-9))
        return math.ldexp(1.5, exponent + 1)

    def value(self) -> Vector:
        """Return the mean, shape (size,), and forget the sums: the mean takes their memory.

        At least one update was added. Nothing can be added afterwards.
        """
        self._count = self._most
        grids = sorted(self._sums)
        sums = [self._sums.pop(grid) for grid in grids]

        def mean(part: slice) -> npt.NDArray[np.float64]:
            # few grids, always in this order
            total = sum(one[part] for one in sums)
            return np.asarray(total / self.weight)

        narrowed(sums[0], mean)
        # the second half of the memory goes back to the system; `sums` and `mean` refer to the array, so no check
        sums[0].resize((self._size + 1) // 2, refcheck=False)
        return sums[0].view(np.float32)[: self._size]


def narrowed(wide: npt.NDArray[Any], block_of: Callable[[slice], npt.NDArray[Any]]) -> Vector:
    """Return the float32 vector that `block_of` computes from `wide`, shape (size,), in the memory of `wide`.

    Args:
        wide: numbers of 8 bytes, shape (size,). Its values are lost.
        block_of: returns the numbers of a slice from those of `wide`; slices come in order.
    """
    narrow = wide.view(np.float32)[: len(wide)]
    for part in blocks(len(wide)):
        # a block is written to memory whose numbers were read before: 4 bytes a number here, 8 there
        narrow[part] = block_of(part)
    return narrow


def _grid(length: float) -> int:
    """Return the number of the grid for weighted updates of a length: 0 up to `SHORT`, then one for each `RATIO`."""
    grid = 0
    while length > SHORT * RATIO**grid:
        grid += 1
    return grid


class RunningSum:
    """The sum of the protected updates that were added so far, in levels. Sums of integers are always exact.

    Args:
        size: of an update.
    """

    def __init__(self, size: int) -> None:
        self.total: Levels = np.zeros(size, np.int64)

    def add(self, levels: PackedLevels) -> None:
        """Add a protected update. A masked one may wrap around: sums modulo 2^64 are sums modulo 2^bits as well."""
        for part in blocks(len(self.total)):
            self.total[part] += levels.block(part)


def update_cosine(norms: Sequence[float], weights: Sequence[int], mean_norm: float) -> float | None:
    """Return how much the updates of a round point in the same direction: the mean cosine over all pairs of updates.

    A pair counts by the product of the lengths with which its two updates enter the mean, a_i = weight_i * norm_i.
    With them the mean cosine follows from the length of the mean, and no update is needed again:
    |sum_i a_i e_i|^2 = sum_i a_i^2 + sum_{i != j} a_i a_j cos_ij. Where all a_i are equal, it is the plain mean.

    Args:
        norms: L2 norms of the updates.
        weights: their weights, in rows.
        mean_norm: L2 norm of the weighted mean.

    Returns:
        Between -1 and 1; 1 if all updates point in one direction, about 0 if they have nothing in common. None with
        fewer than two updates that are not zero.
    """
    lengths = np.array([norm * weight for norm, weight in zip(norms, weights, strict=True)])
    squares = float(np.square(lengths).sum())
    pairs = float(lengths.sum()) ** 2 - squares
    if np.count_nonzero(lengths) < 2 or pairs <= 0:
        return None
    total = mean_norm * sum(weights)
    return float(np.clip((total**2 - squares) / pairs, -1.0, 1.0))
