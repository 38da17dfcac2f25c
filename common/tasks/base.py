"""What a task is: the columns that it reads, its model with a head, its loss, its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import UsageError
from tsugiki.common.registry import Registry
from tsugiki.common.settings import TaskSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tsugiki.common.data.shard import Shard
    from tsugiki.common.tasks.decoding.generate import Generation

TASKS: Registry[type[Task]] = Registry("task")

Tokens = list[int]
Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Column:
    """A column that a task reads from a site's file.

    Args:
        name: the task's own name for it, to which a file's column is mapped.
        kind: `text`; `label`, a class by name or number; `score`, a float; `image`, a picture.
        required: whether every file must have it.
        blank: whether a text may be empty.
    """

    name: str
    kind: Literal["text", "label", "score", "image"]
    required: bool = True
    blank: bool = False


@dataclass(frozen=True)
class Encoded:
    """A tokenised shard: made once, kept between rounds.

    Args:
        texts: for each text column, the token ids of each row, special tokens included.
        targets: classes as int64 or scores as float32, shape (rows,); None where the task has none.
        images: pixels as uint8, shape (rows, height, width, channels); None where the task reads none.
        notes: what is unusual but no error, as in a `Shard`: `shard-texts-cut:COUNT`, so many texts were too long.
        reference: what a task has found out about each row from the bare base, shape (rows, ...), not a number where it
            has not yet looked; None where it needs none.
    """

    texts: dict[str, list[Tokens]]
    targets: npt.NDArray[Any] | None = None
    images: npt.NDArray[np.uint8] | None = None
    notes: tuple[str, ...] = ()
    reference: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.texts.values())) if self.images is None else self.images)

    def first(self, count: int) -> Encoded:
        """Return the first rows."""
        return self.take(range(min(count, len(self))))

    def take(self, rows: Sequence[int]) -> Encoded:
        """Return the given rows, in the given order."""
        texts = {name: [values[row] for row in rows] for name, values in self.texts.items()}
        arrays: tuple[npt.NDArray[Any] | None, ...] = (self.targets, self.images, self.reference)
        targets, images, reference = (None if array is None else array[list(rows)] for array in arrays)
        return Encoded(texts, targets, images, reference=reference)


@dataclass
class Base:
    """A loaded base model with the task's head.

    Args:
        network: what the task calls; for most tasks the transformer itself.
        transformer: the `PreTrainedModel` (later: with the adapter on it) inside `network`.
        tokenizer: a `PreTrainedTokenizerBase`; None where the task reads no text.
        heads: names of modules of `transformer` that are trained and exchanged in full.
        pixels: how images become what the model reads; None where the task reads none.
        untouched: makes the bare base's own outputs come back inside a `with` block.
        judge: a second network, with the same base's tensors, that judges what the first one says; never trained.
        constants: what both sides have to agree on beside the adapter, by name: they are a part of the spec.
    """

    network: Any
    transformer: Any
    tokenizer: Any
    heads: tuple[str, ...] = ()
    pixels: Any = None
    untouched: Callable[[], AbstractContextManager[None]] = nullcontext
    judge: Any = None
    constants: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tail:
    """The end of a network, where everything that is trained is in it: many clients train it together.

    Args:
        module: maps features of shape (rows, width) to logits; its parameters are the transformer's own.
        features: of all rows, shape (rows, width), without gradient: what the frozen trunk makes of them.
        losses: returns a loss for each row, shape (rows,), from logits and targets; their mean is the task's loss.
    """

    module: Any
    features: torch.Tensor
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TinyCase:
    """A model and data small enough for the contract tests that run over every task.

    Args:
        settings: of the task.
        rows: columns.
        model_type: of the base.
        exports: settings that name an exported adapter, and the task that it is to be one of, with its settings.
    """

    settings: dict[str, Any]
    rows: dict[str, Any]
    model_type: str = "bert"
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)


class Task(ABC):
    """One kind of fine-tuning. Instances hold settings only."""

    name: ClassVar[str]
    Settings: ClassVar[type[TaskSettings]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss"})
    row_losses: ClassVar[bool] = False
    """Whether `loss` is the mean of a loss of each row that no other row of the batch enters: DP-SGD needs that."""
    signed_loss: ClassVar[bool] = False
    """Whether `loss` may be below zero, so that one loss is no multiple of another."""

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
    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load the base with a freshly initialised head. The caller has seeded torch.

        Args:
            folder: of the checkpoint.
            dtype: of the frozen weights.
            how: what else `from_pretrained` has to know; see `tsugiki.common.model.device.loading`.
        """

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

    def tail(self, base: Base, encoded: Encoded) -> Tail | None:
        """Return what comes after the frozen trunk, where all trainable parameters are there; None elsewhere."""
        return None

    @abstractmethod
    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return the metrics over all rows; higher is better but for those in `lower_is_better`."""

    @property
    def asked(self) -> tuple[Column, ...]:
        """The columns that `predict` reads; none: this task predicts nothing for rows alone."""
        return ()

    def predict(self, base: Base, shard: Shard, how: Generation) -> list[dict[str, Any]]:
        """Return what the model makes of each row, by name.

        Args:
            base: with the adapter on it, in eval mode.
            shard: has the columns `asked`.
            how: texts are continued, where the task does that.

        Raises:
            UsageError: this task predicts nothing for rows alone.
        """
        raise UsageError(f"the task {self.name} predicts nothing for rows alone", "another run")

    @classmethod
    @abstractmethod
    def tiny(cls) -> TinyCase:
        """Return a case for the contract tests."""

    @classmethod
    def further(cls) -> dict[str, TinyCase]:
        """Return cases of other forms that the task's settings give it, by name."""
        return {}


@contextmanager
def at_rest(network: Any) -> Iterator[None]:
    """Eval mode inside a `with` block, where nothing is dropped; then the network's own mode again."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def tokenise(tokenizer: Any, limit: int, *texts: Sequence[str]) -> tuple[Any, int]:
    """Return what a tokenizer makes of texts, or of pairs, cut to `limit` tokens each, and how many were too long."""
    tokens = tokenizer(*texts, truncation=True, max_length=limit)
    if tokens.is_fast:
        return tokens, sum(bool(one.overflowing) for one in tokens.encodings)
    return tokens, sum(len(row) > limit for row in tokenizer(*texts)["input_ids"])


def cut_note(cut: int) -> tuple[str, ...]:
    """Return the note that so many texts were cut, where there are any."""
    return (f"shard-texts-cut:{cut}",) if cut else ()


def padding_id(tokenizer: Any) -> int:
    """Return the token with which a model that names none is padded: the tokenizer's own, the one for the end, or 0."""
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


def named_classes(logits: torch.Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the likeliest class of each row, with its probability; logits have the shape (rows, classes)."""
    chances, numbers = logits.float().softmax(dim=1).max(dim=1)
    return [
        {"label": labels[number], "probability": chance}
        for number, chance in zip(numbers.tolist(), chances.tolist(), strict=True)
    ]


def class_metrics(logits: torch.Tensor, targets: npt.NDArray[Any] | None) -> dict[str, float]:
    """Return accuracy, macro_f1 (over the classes that occur or are predicted) and loss (cross-entropy).

    Args:
        logits: of shape (rows, classes).
        targets: of shape (rows,).
    """
    import torch
    from sklearn.metrics import f1_score
    from torch.nn.functional import cross_entropy

    classes, predicted = torch.from_numpy(targets), logits.argmax(dim=1)
    return {
        "accuracy": float((predicted == classes).float().mean()),
        "macro_f1": float(f1_score(classes.numpy(), predicted.numpy(), average="macro")),
        "loss": float(cross_entropy(logits, classes)),
    }
