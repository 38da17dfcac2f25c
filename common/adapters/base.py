"""What an adapter method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from tsugiki.common.errors import ModelError
from tsugiki.common.registry import Registry
from tsugiki.common.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import nn

TRAINED = "default"
MERGED = "merged"
"""The LoRA pair that sites train, by the name that peft gives to an only adapter; and the frozen one of `flora`."""

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
"""Methods that people ask for and that a federation cannot have: what is expected and why, and what to do."""


class AdapterMethod(ABC):
    """One way to put few trainable parameters on a frozen transformer.

    What is exchanged is every parameter of the transformer that requires a gradient after `attach`, by name.
    Instances hold settings only; the parameters live in the transformer.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[AdapterSettings]]
    model_types: ClassVar[frozenset[str] | None] = None
    """The `config.model_type`s that this method knows; None for all."""
    unfit: ClassVar[Mapping[str, str]] = {}
    """The `config.model_type`s on which this method cannot work, and why, in words that go on from "because"."""
    starts_at_base: ClassVar[bool] = True
    """Whether the outputs are the base's own before anything is trained."""
    export_format: ClassVar[Literal["peft", "tsugiki"]]
    tensors_file: ClassVar[str]
    """What `save` calls the file with the tensors."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def why_not(cls, model_type: str) -> str:
        """Return why this method does not go on such a model, in a few words; empty where it does."""
        if model_type in cls.unfit:
            return cls.unfit[model_type]
        if cls.model_types is not None and model_type not in cls.model_types:
            return f"it knows {', '.join(sorted(cls.model_types))} only"
        return ""

    @property
    def positions(self) -> int:
        """Return how many of the base's positions this method takes up; a text has so many fewer."""
        return 0

    @property
    def loads_anywhere(self) -> bool:
        """Return whether transformers itself, and so `SentenceTransformer(folder)`, loads a PEFT directory whole."""
        return True

    @property
    def row_gradients(self) -> bool:
        """Return whether Opacus can tell the gradient of each row: DP-SGD needs that."""
        return True

    def bases(self) -> dict[str, str]:
        """Return the fingerprint of the base that a part of this method was trained on, by name; most bring no such."""
        return {}

    def spec_settings(self) -> dict[str, Any]:
        """Return the settings on which both sides of a run have to agree, for their `AdapterSpec`."""
        settings: dict[str, Any] = self.settings.model_dump(mode="json", exclude={"method", "wire_dtype"})
        return settings

    def exported_settings(self) -> dict[str, Any]:
        """Return the settings as an export has them: nothing of this machine is in them."""
        settings: dict[str, Any] = self.settings.model_dump(mode="json")
        return settings

    def exported_in(self, folder: Path) -> Self:
        """Return this method, read from the export in a folder, with what else lies there and belongs to it."""
        return self

    @abstractmethod
    def attach(self, transformer: Any, heads: tuple[str, ...]) -> nn.Module:
        """Freeze `transformer`, put the adapter on it, and make its heads trainable.

        The caller has seeded torch; random initial values come from its global generator.

        Args:
            transformer: a `transformers.PreTrainedModel`.
            heads: names of modules of `transformer` that are trained and exchanged in full.

        Returns:
            What stands in the transformer's place from now on; the same object if it was changed in place.

        Raises:
            ModelError: the transformer has nothing that this method could be attached to.
        """

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return the parameters that this method drew and does not train, by name: both sides compare their hash."""
        return {}

    @abstractmethod
    def disabled(self, transformer: Any) -> AbstractContextManager[None]:
        """Switch the adapter off inside a `with` block: the base's own outputs come back. Heads stay."""

    @abstractmethod
    def without_heads(self, transformer: Any) -> Any:
        """Return a copy with the adapter and without its heads, for a model whose outputs do not come from them."""

    @abstractmethod
    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write the adapter and its heads as safetensors into `folder`.

        Args:
            transformer: with the adapter on it.
            folder: made if it is not there.
            base_name: under which others find the base, for a file that names it.
        """

    @abstractmethod
    def saved(self, transformer: Any) -> dict[str, Any]:
        """Return the tensors that `save` writes, by their names in its file: the transformer's own, not copies."""

    @abstractmethod
    def merge(self, transformer: Any) -> Any:
        """Return a plain `PreTrainedModel` whose own weights carry the adapter.

        Raises:
            ExportError: this method cannot be merged into the base's weights.
        """


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method", "tsugiki.adapters", AdapterMethod)


def require_heads(transformer: Any, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return the modules of a transformer by name, the heads among them.

    Raises:
        ModelError: `head-missing`.
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
