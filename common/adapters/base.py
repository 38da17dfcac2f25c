"""The interface of an adapter method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from tsugiki.common.errors import ModelError
from tsugiki.common.registry import Registry
from tsugiki.common.settings import STARTS, AdapterSettings

if TYPE_CHECKING:
    from torch import nn

TRAINED = "default"
MERGED = "merged"
"""Names of LoRA pairs: sites train `TRAINED`, which is peft's default name; `MERGED` is the frozen pair of `flora`."""

REFUSED: Mapping[str, tuple[str, str]] = {
    "adalora": (
        "another method: adalora's shapes change during training, so updates of different sites cannot be averaged",
        'choose "lora": its rank stays',
    ),
    "pissa": (
        "another method: pissa rewrites the base's weights, which every site and the fingerprint count on",
        'choose "lora", with init = "orthogonal" if a start away from zero is what you want',
    ),
}
"""Known methods that do not work in a federation: the expected value with the reason, and what to do instead."""


Optimizer = Literal["adamw", "sgd"]
BaseKind = Literal["encoder", "decoder", "vision"]


class Rates(NamedTuple):
    """The default peak learning rate of a method for each kind of base: what `train.learning_rate = "auto"` takes.

    Args:
        encoder: models that read text. With AdamW for a width of `TRIED_WIDTHS`; other widths scale it.
        decoder: models that continue text. As `encoder`.
        vision: models that read images; not scaled.
    """

    encoder: float
    decoder: float
    vision: float


class RateTable(NamedTuple):
    """Default peak learning rates by optimizer."""

    adamw: Rates
    sgd: Rates


TRIED_WIDTHS: Mapping[BaseKind, int] = {"encoder": 384, "decoder": 64}
"""The hidden sizes for which the rates of AdamW are given: all-MiniLM's and stories260K's."""

HEAD_RATES = RateTable(
    adamw=Rates(encoder=2e-3, decoder=1e-2, vision=5e-3),
    sgd=Rates(encoder=1.0, decoder=1.0, vision=0.1),
)
"""Default peak learning rates of a task's head, whatever the method beside it: it is a new layer in all of them."""

_WIDTH_EXPONENT = 0.78


def scaled_rate(table: RateTable, optimizer: Optimizer, kind: BaseKind, width: int = 0, factor: float = 1.0) -> float:
    """Return a default peak learning rate, scaled to the base's width, with two significant digits.

    AdamW moves each number by the rate, however small its gradient is, and an output of a wide layer sums up more of
    them. So a wide base takes a smaller rate. Source of the exponent: Schulman and Thinking Machines 2025, "LoRA
    Without Regret", whose rates for Llama fall with the hidden size to the power of 0.78.

    Args:
        table: of a method, or of heads.
        optimizer: of the local steps.
        kind: of the base.
        width: the base's hidden size; 0 if it is not known.
        factor: of the task.
    """
    rate: float = factor * getattr(getattr(table, optimizer), kind)
    if optimizer == "adamw" and width and kind in TRIED_WIDTHS:
        rate *= (TRIED_WIDTHS[kind] / width) ** _WIDTH_EXPONENT
    return float(f"{rate:.2g}")


class AdapterMethod(ABC):
    """One way to put few trainable parameters on a frozen transformer.

    All parameters of the transformer that require a gradient after `attach` are exchanged, by name.
    Instances hold settings only; the parameters live in the transformer.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[AdapterSettings]]
    model_types: ClassVar[frozenset[str] | None] = None
    """The `config.model_type`s that this method supports; None for all."""
    unfit: ClassVar[Mapping[str, str]] = {}
    """The reason why this method cannot work, by `config.model_type`; it continues a sentence after "because"."""
    starts_at_base: ClassVar[bool] = True
    """Whether the untrained adapter leaves the base's outputs unchanged."""
    export_format: ClassVar[Literal["peft", "tsugiki"]]
    tensors_file: ClassVar[str]
    """The name of the file into which `save` writes the tensors."""
    rates: ClassVar[RateTable] = RateTable(
        adamw=Rates(encoder=2e-3, decoder=1e-2, vision=5e-3),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=0.1),
    )
    """What `train.learning_rate = "auto"` takes. These are LoRA's; a method with other needs sets its own."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def why_not(cls, model_type: str) -> str:
        """Return in a few words why this method does not fit such a model; empty if it fits."""
        if model_type in cls.unfit:
            return cls.unfit[model_type]
        if cls.model_types is not None and model_type not in cls.model_types:
            return f"it knows {', '.join(sorted(cls.model_types))} only"
        return ""

    @classmethod
    def default_rate(cls, optimizer: Optimizer, kind: BaseKind, width: int = 0, factor: float = 1.0) -> float:
        """Return the peak learning rate that "auto" takes for this method.

        Args:
            optimizer: of the local steps.
            kind: of the base.
            width: the base's hidden size; 0 if it is not known.
            factor: of the task.
        """
        return scaled_rate(cls.rates, optimizer, kind, width, factor)

    @property
    def positions(self) -> int:
        """Return the number of the base's positions that this method takes from a text."""
        return 0

    @property
    def loads_anywhere(self) -> bool:
        """Return whether transformers, and so `SentenceTransformer(folder)`, loads a PEFT directory in full."""
        return True

    @property
    def row_gradients(self) -> bool:
        """Return whether Opacus can compute the gradient of each row: DP-SGD needs that."""
        return True

    def bases(self) -> dict[str, str]:
        """Return the base fingerprint of each trained part that this method brings along, by name; empty for most."""
        return {}

    def spec_settings(self) -> dict[str, Any]:
        """Return the settings on which both sides of a run must agree, for their `AdapterSpec`."""
        settings: dict[str, Any] = self.settings.model_dump(mode="json", exclude={"method", "wire_dtype", *STARTS})
        return settings

    def exported_settings(self) -> dict[str, Any]:
        """Return the settings for an export; they contain nothing of this machine."""
        settings: dict[str, Any] = self.settings.model_dump(mode="json", exclude=set(STARTS))
        return settings

    def exported_in(self, folder: Path) -> Self:
        """Return this method as the export in a folder has it, with the further files there that belong to it."""
        return self

    @abstractmethod
    def attach(self, transformer: Any, heads: tuple[str, ...]) -> nn.Module:
        """Freeze `transformer`, put the adapter on it, and make its heads trainable.

        The caller has seeded torch; random initial values come from its global generator.

        Args:
            transformer: a `transformers.PreTrainedModel`.
            heads: names of modules of `transformer` that are trained and exchanged in full.

        Returns:
            The module that replaces the transformer; the same object if it was changed in place.

        Raises:
            ModelError: this method finds nothing in the transformer to be attached to.
        """

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return the random parameters that this method does not train, by name; both sides compare their hash."""
        return {}

    @abstractmethod
    def disabled(self, transformer: Any) -> AbstractContextManager[None]:
        """Switch the adapter off inside a `with` block: the base's own outputs come back. Heads stay."""

    @abstractmethod
    def without_heads(self, transformer: Any) -> Any:
        """Return a copy with the adapter but without heads, for a model whose outputs do not use them."""

    @abstractmethod
    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write the adapter and its heads as safetensors into `folder`.

        Args:
            transformer: with the adapter on it.
            folder: created if it is missing.
            base_name: the name under which others find the base, for the files that contain it.
        """

    @abstractmethod
    def saved(self, transformer: Any) -> dict[str, Any]:
        """Return the tensors that `save` writes, by their names in the file: the transformer's own, not copies."""

    @abstractmethod
    def merge(self, transformer: Any) -> Any:
        """Return a plain `PreTrainedModel` whose own weights carry the adapter.

        Raises:
            ExportError: this method cannot be merged into the base's weights.
        """


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method", "tsugiki.adapters", AdapterMethod)


def require_heads(transformer: Any, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return the modules of a transformer by name, after checking that the heads are there.

    Raises:
        ModelError: `head-missing`, a head is not there.
    """
    modules = dict(transformer.named_modules())
    if missing := [head for head in heads if head not in modules]:
        raise ModelError(
            f"{type(transformer).__name__} has no module {missing[0]!r}",
            "a model with this head",
            "load the class of model with which the adapter was trained",
            code="head-missing",
        )
    return modules
