"""Token ids of many rows in one flat array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = list[int]
"""Token ids of one text, where they are made or drawn."""

AnyTokens = Sequence[int] | npt.NDArray[Any]
"""Token ids of one text; an array where they are kept."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The tokens of many rows, end to end: 4 bytes a token and 8 bytes a row, where lists of ints take ten times that.

    Args:
        values: the tokens of all rows, shape (tokens,), int32; a narrower type where small numbers are kept.
        offsets: where each row begins, and where the last one ends, shape (rows + 1,), int64.
    """

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[AnyTokens]) -> TokenRows:
        """Return the given rows."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return cls(values, _offsets(lengths))

    @classmethod
    def joined(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """Return the rows of all parts, at least one, one part after the other."""
        lengths = np.concatenate([part.lengths() for part in parts])
        return cls(np.concatenate([part.values for part in parts]), _offsets(lengths))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """Return the tokens of a row, a view.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the tokens of each row."""
        return (self[row] for row in range(len(self)))

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each row, shape (rows,)."""
        return np.diff(self.offsets)

    def lists(self) -> list[list[int]]:
        """Return each row as a list of ints."""
        return [row.tolist() for row in self]

    def take(self, rows: Iterable[int]) -> TokenRows:
        """Return the given rows, in the given order."""
        chosen = np.fromiter(rows, np.int64)
        lengths = self.lengths()[chosen]
        offsets = _offsets(lengths)
        # Where each token is now: its row's begin, and its place in the row.
        shifts = np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        return TokenRows(self.values[shifts + np.arange(len(shifts))], offsets)

    def spread(self, places: npt.NDArray[np.int64], count: int) -> TokenRows:
        """Return these rows at the given places among `count` rows, of which the others are empty.

        Args:
            places: of these rows, ascending, shape (rows,).
            count: more than the last place.
        """
        lengths = np.zeros(count, np.int64)
        lengths[places] = self.lengths()
        return TokenRows(self.values, _offsets(lengths))


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
