"""The interface of a task: the columns that it reads, its model with a head, its loss, its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from tsugiki.common.adapters.base import BaseKind
from tsugiki.common.data.columns import Column
from tsugiki.common.errors import UsageError
from tsugiki.common.registry import Registry
from tsugiki.common.settings import TaskSettings
from tsugiki.common.tasks.rows import TokenRows

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tsugiki.common.data.shard import Shard

Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Encoded:
    """A tokenised shard. It is made once and kept between rounds.

    Args:
        texts: for each text column, the token ids of each row, special tokens included. A row that the run does not
            touch is empty.
        targets: classes as int64 or scores as float32, shape (rows,); None if the task has no targets.
        images: pixels as uint8, shape (rows, height, width, channels); None if the task reads no images.
        notes: unusual but no error, as in a `Shard`: `shard-texts-cut:COUNT`, COUNT texts were too long.
        reference: values that the task computes from the bare base for each row, shape (rows, ...); NaN until they are
            computed. None if the task needs no such values.
    """

    texts: dict[str, TokenRows]
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
        texts = {name: values.take(rows) for name, values in self.texts.items()}
        arrays: tuple[npt.NDArray[Any] | None, ...] = (self.targets, self.images, self.reference)
        targets, images, reference = (None if array is None else array[list(rows)] for array in arrays)
        return Encoded(texts, targets, images, reference=reference)

    def spread(self, places: npt.NDArray[np.int64], count: int) -> Encoded:
        """Return these rows at the given places among `count` rows, with their notes.

        The other rows have no tokens. Their targets and references are no valid values, so that nothing can be trained
        on them by mistake.

        Args:
            places: of these rows, ascending, shape (rows,).
            count: more than the last place.
        """
        texts = {name: values.spread(places, count) for name, values in self.texts.items()}
        arrays: tuple[npt.NDArray[Any] | None, ...] = (self.targets, self.images, self.reference)
        targets, images, reference = (None if array is None else _spread(array, places, count) for array in arrays)
        return Encoded(texts, targets, images, self.notes, reference)


def _spread(array: npt.NDArray[Any], places: npt.NDArray[np.int64], count: int) -> npt.NDArray[Any]:
    """Return an array whose other rows are NaN, or the highest unsigned or the number -1."""
    filler = np.nan if np.issubdtype(array.dtype, np.floating) else -1
    spread = np.full((count, *array.shape[1:]), filler).astype(array.dtype)
    spread[places] = array
    return spread


@dataclass
class Base:
    """A loaded base model with the head of a task.

    Args:
        network: the module that the task calls; for most tasks the transformer itself.
        transformer: the `PreTrainedModel` inside `network`; later it has the adapter on it.
        tokenizer: a `PreTrainedTokenizerBase`; None if the task reads no text.
        heads: names of modules of `transformer` that are trained and exchanged in full.
        pixels: the image format that the model reads; None if the task reads no images.
        adapter_disabled: switches the adapter off inside a `with` block.
        reward_model: a second network on the same base tensors, which scores the answers of the first; never trained.
        constants: hashes and values that both sides must agree on beside the adapter, by name; a part of the spec. What
            a setting of the task took for "auto" is here under the setting's name.
        loss_heads: whether only the loss reads the heads, so that exports leave them out.
    """

    network: Any
    transformer: Any
    tokenizer: Any
    heads: tuple[str, ...] = ()
    pixels: Any = None
    adapter_disabled: Callable[[], AbstractContextManager[None]] = nullcontext
    reward_model: Any = None
    constants: Mapping[str, str] = field(default_factory=dict)
    loss_heads: bool = False


@dataclass(frozen=True)
class Tail:
    """The end of a network that contains all trained parameters, so that many clients can train it in one pass.

    Args:
        module: maps features of shape (rows, width) to logits; its parameters are the transformer's own.
        features: outputs of the frozen trunk for all rows, shape (rows, width), without gradient.
        losses: returns a loss for each row, shape (rows,), from logits and targets; their mean is the task's loss.
    """

    module: Any
    features: torch.Tensor
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Generation:
    """How a text is continued.

    Args:
        max_new_tokens: most tokens to add.
        temperature: 0: take the likeliest token at each step; above 0: divide the logits by it and draw.
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TinyCase:
    """A model and data small enough for the contract tests that run over every task.

    Args:
        settings: of the task.
        rows: the values of each column, by name.
        model_type: of the base.
        exports: by the name of each setting that names an exported adapter: the settings of that adapter's task.
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
    """Whether `loss` is a mean of losses that depend on one row each: DP-SGD needs that."""
    adjusts_logits: ClassVar[bool] = False
    """Whether `loss` takes an adjustment to a site's own shares of the classes (`classes.py`)."""
    signed_loss: ClassVar[bool] = False
    """Whether `loss` may be negative, so that the ratio of two losses means nothing."""
    shares_base: ClassVar[bool] = False
    """Whether two models share the base's tensors, which excludes 4-bit loading."""
    rate_factor: ClassVar[float] = 1.0
    """The factor of this task on the learning rate that "auto" takes."""
    base_kind: ClassVar[BaseKind | None] = None
    """The kind of base that this task takes; None if it takes more than one."""
    gradient_in_eval_mode: ClassVar[bool] = False
    """Whether the gradient is taken in eval mode, which excludes gradient checkpointing."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def pads_rows(self) -> bool:
        """Whether rows are padded to the longest of their batch, so that batches of like rows save time."""
        return any(column.kind == "text" for column in self.columns)

    @property
    def compares_rows(self) -> bool:
        """Whether `loss` compares the rows of a batch with each other, as losses with in-batch negatives do.

        Such a loss changes with the choice of rows that share a batch, so they are not grouped by length on their own.
        """
        return False

    def lengths(self, encoded: Encoded) -> npt.NDArray[np.int64]:
        """Return how many tokens each row takes in a batch, shape (rows,): the sum over its texts."""
        lengths = np.zeros(len(encoded), np.int64)
        for texts in encoded.texts.values():
            lengths += texts.lengths()
        return lengths

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The columns that this task reads with its settings."""

    @property
    @abstractmethod
    def monitor(self) -> str:
        """The metric by which the best adapter is chosen unless the run says otherwise."""

    @property
    def evaluation_columns(self) -> tuple[tuple[Column, ...], ...]:
        """The forms that an evaluation file may have. The first one is used whose columns the file has."""
        return (self.columns,)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes by name, in order; empty for tasks without classes."""
        return ()

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for this task, for the card of an export; None if the hub has no name."""
        return None

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load the base with a freshly initialised head. The caller has seeded torch.

        Args:
            folder: of the checkpoint.
            dtype: of the frozen weights.
            how: further arguments of `from_pretrained`; see `tsugiki.common.model.device.loading`.
        """

    def put_in_place(self, base: Base, transformer: nn.Module) -> None:
        """Replace the bare transformer by the one with the adapter."""
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

    def logits(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the logits of a batch, shape (rows, classes), float32; only tasks with `HeadedSettings` have them."""
        raise NotImplementedError(f"the task {self.name} has no head with classes")

    def tail(self, base: Base, encoded: Encoded) -> Tail | None:
        """Return the end of the network if all trainable parameters are in it, else None."""
        return None

    @abstractmethod
    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return the metrics over all rows. Higher is better, except for those in `lower_is_better`."""

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The columns that `predict` reads; empty if the task cannot predict."""
        return ()

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return the model's predictions for each row, by name.

        Args:
            base: with the adapter on it, in eval mode.
            shard: has the `prediction_columns`.
            generation: how texts are continued, if the task does that.

        Raises:
            UsageError: this task cannot predict.
        """
        raise UsageError(f"the task {self.name} predicts nothing for rows alone", "a run of a task that predicts")

    @classmethod
    @abstractmethod
    def test_case(cls) -> TinyCase:
        """Return a case for the contract tests."""

    @classmethod
    def extra_cases(cls) -> dict[str, TinyCase]:
        """Return cases for other settings of the task, by name."""
        return {}


TASKS: Registry[type[Task]] = Registry("task", "tsugiki.tasks", Task)


@contextmanager
def at_rest(network: Any) -> Iterator[None]:
    """Put a network in eval mode, without dropout, inside a `with` block; then restore its mode."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
