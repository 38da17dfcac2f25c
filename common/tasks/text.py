"""Tokenise, cut and pad texts, and batch them by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tsugiki.common.tasks.base import Tokens

if TYPE_CHECKING:
    import torch


def tokenise(tokenizer: Any, limit: int, *texts: Sequence[str]) -> tuple[Any, int]:
    """Tokenise texts or pairs, cut to `limit` tokens each; also return how many were too long."""
    tokens = tokenizer(*texts, truncation=True, max_length=limit)
    if tokens.is_fast:
        return tokens, sum(bool(one.overflowing) for one in tokens.encodings)
    return tokens, sum(len(row) > limit for row in tokenizer(*texts)["input_ids"])


def cut_note(cut: int) -> tuple[str, ...]:
    """Return the note that `cut` texts were cut; empty if there are none."""
    return (f"shard-texts-cut:{cut}",) if cut else ()


def padding_id(tokenizer: Any) -> int:
    """Return the padding token for a model that names none: the tokenizer's own, its end token, or 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in known if number is not None)


def pad(rows: Sequence[Tokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids padded on the right and the attention mask, both of shape (rows, longest), int64."""
    import torch

    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return batches of row numbers, longest rows first, so that evaluation pads little."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
