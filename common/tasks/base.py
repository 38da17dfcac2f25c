"""What a task is: the columns that it reads, its model with a head, its loss, its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from common.registry import Registry
from common.settings import TaskSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from common.data.shard import Shard

TASKS: Registry[type[Task]] = Registry("task")

Tokens = list[int]
Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Column:
    """A column that a task reads from a site's file.

    Args:
        name: the task's own name for it, to which a file's column is mapped.
        kind: `text`; `label`, a class by name or number; `score`, a float.
        required: whether every file must have it.
    """

    name: str
    kind: Literal["text", "label", "score"]
    required: bool = True


@dataclass(frozen=True)
class Encoded:
    """A tokenised shard: made once, kept between rounds.

    Args:
        texts: for each text column, the token ids of each row, special tokens included.
        targets: classes as int64 or scores as float32, shape (rows,); None where the task has none.
    """

    texts: dict[str, list[Tokens]]
    targets: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.texts.values())))


@dataclass
class Base:
    """A loaded base model with the task's head.

    Args:
        network: what the task calls; for most tasks the transformer itself.
        transformer: the `PreTrainedModel` (later: with the adapter on it) inside `network`.
        tokenizer: a `PreTrainedTokenizerBase`.
        heads: names of modules of `transformer` that are trained and exchanged in full.
    """

    network: Any
    transformer: Any
    tokenizer: Any
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class TinyCase:
    """A model and data small enough for the contract tests that run over every task."""

    settings: dict[str, Any]
    rows: dict[str, list[Any]]
    model_type: str = "bert"
    notes: dict[str, str] = field(default_factory=dict)


class Task(ABC):
    """One kind of fine-tuning. Instances hold settings only."""

    name: ClassVar[str]
    Settings: ClassVar[type[TaskSettings]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss"})

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The columns that this task reads, given its settings."""

    @property
    @abstractmethod
    def monitor(self) -> str:
        """The metric by which the best adapter is chosen unless the run says otherwise."""

    @property
    def evaluation_columns(self) -> tuple[tuple[Column, ...], ...]:
        """The forms that an evaluation file may have; the first whose columns are all there is used."""
        return (self.columns,)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes by name, in order; empty for tasks without classes."""
        return ()

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> Base:
        """Load the base with a freshly initialised head. The caller has seeded torch."""

    def graft(self, base: Base, transformer: nn.Module) -> None:
        """Put the transformer with its adapter in the place of the bare one."""
        base.network = base.transformer = transformer

    @abstractmethod
    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise a shard."""

    @abstractmethod
    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return the given rows, padded to the longest; token tensors have shape (rows, tokens)."""

    @abstractmethod
    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the mean loss over the batch, a scalar."""

    @abstractmethod
    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return the metrics over all rows; higher is better but for those in `lower_is_better`."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> TinyCase:
        """Return a case for the contract tests."""


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
