"""Tokenise, cut and pad texts, and batch them by length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.data.shard import Shard
from tsugiki.common.tasks.rows import AnyTokens, TokenRows

if TYPE_CHECKING:
    import torch

SLICE_ROWS = 1024
"""Rows that are tokenised at once. What a tokenizer returns for a row takes 50 times the memory of what is kept."""

CUT = "shard-texts-cut"
"""The note of texts that were too long."""


@dataclass(frozen=True)
class TokenSlice:
    """Some rows of a shard, tokenised.

    Args:
        texts: the token ids of each row, for each text column.
        counts: for each note of `Encoded`, to how many of these rows it applies.
    """

    texts: Mapping[str, Sequence[AnyTokens]]
    counts: Mapping[str, int] = field(default_factory=dict)


def encode_slices(shard: Shard, encode: Callable[[Shard], TokenSlice]) -> tuple[dict[str, TokenRows], tuple[str, ...]]:
    """Tokenise a shard slice by slice, so that its tokens are never in memory as lists all at once.

    Args:
        shard: the rows.
        encode: tokenises some of them.

    Returns:
        The tokens by the name of their column, and the notes with their counts.
    """
    texts: dict[str, list[TokenRows]] = {}
    counts: Counter[str] = Counter()
    for part in _slices(shard):
        found = encode(part)
        counts.update(found.counts)
        for name, rows in found.texts.items():
            texts.setdefault(name, []).append(TokenRows.of(rows))
    notes = tuple(f"{note}:{count}" for note, count in counts.items() if count)
    return {name: TokenRows.joined(parts) for name, parts in texts.items()}, notes


def _slices(shard: Shard) -> Iterator[Shard]:
    """Yield the rows of a shard, `SLICE_ROWS` at a time; one slice for a shard without rows."""
    for start in range(0, max(len(shard), 1), SLICE_ROWS):
        yield Shard({name: values[start : start + SLICE_ROWS] for name, values in shard.columns.items()})


def tokenise(tokenizer: Any, limit: int, *texts: Sequence[str]) -> tuple[Any, int]:
    """Tokenise texts or pairs, cut to `limit` tokens each; also return how many were too long."""
    tokens = tokenizer(*texts, truncation=True, max_length=limit, return_attention_mask=False)
    # Only a text that fills the limit can have been cut; to ask the others takes time.
    full = [row for row, ids in enumerate(tokens["input_ids"]) if len(ids) >= limit]
    if tokens.is_fast:
        return tokens, sum(bool(tokens.encodings[row].overflowing) for row in full)
    if not full:
        return tokens, 0
    whole = tokenizer(*[[column[row] for row in full] for column in texts])["input_ids"]
    return tokens, sum(len(ids) > limit for ids in whole)


def padding_id(tokenizer: Any) -> int:
    """Return the padding token for a model that names none: the tokenizer's own, its end token, or 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in known if number is not None)


def pad(rows: Sequence[AnyTokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids padded on the right and the attention mask, both of shape (rows, longest), int64."""
    import torch

    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def by_length(lengths: Sequence[int] | npt.NDArray[np.int64], batch_size: int) -> list[list[int]]:
    """Return batches of row numbers, longest rows first, so that evaluation pads little."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
