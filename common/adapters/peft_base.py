"""What the adapter methods that the `peft` library provides have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from tsugiki.common.adapters.base import AdapterMethod
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import AdapterSettings, Names


class TargetedSettings(AdapterSettings):
    """What the methods have that change chosen linear layers."""

    target_modules: Names = Field(
        default=(),
        description='Names of the linear layers to adapt, as ["query", "value"]. Set it to adapt more layers, or if '
        "the base's architecture is not known. Empty: the choice of the method's paper, by architecture.",
    )


class PeftMethod(AdapterMethod):
    """A method whose layers, merging and files are those of `peft`."""

    export_format = "peft"
    tensors_file = "adapter_model.safetensors"

    @abstractmethod
    def config(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Return peft's configuration, without heads and kind of model.

        Raises:
            ModelError: `adapter-targets`, `adapter-rank`: the settings do not fit the transformer.
        """

    def attach(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Wrap the transformer in a `PeftModel` with one adapter, its heads in `modules_to_save`."""
        import warnings

        from peft import get_peft_model

        config = self.config(transformer, heads)
        config.modules_to_save = list(heads) or None
        config.task_type = _task_type(transformer, heads)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # norms have no width for peft
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # `_untie` sees to it
            model = get_peft_model(transformer, config)
        for name, value in model.named_parameters():
            if name in self.constants(model):
                value.requires_grad_(False)
        return model

    @contextmanager
    def disabled(self, transformer: Any) -> Iterator[None]:
        """Switch the adapter off. peft would switch the heads back as well, so their trained copies are called."""
        from peft.utils import ModulesToSaveWrapper

        trained = [(value, value.requires_grad) for value in transformer.parameters()]
        try:
            with transformer.disable_adapter():
                wrappers = [module for module in transformer.modules() if isinstance(module, ModulesToSaveWrapper)]
                for wrapper in wrappers:
                    wrapper.enable_adapters(True)
                yield
        finally:
            for value, was_trained in trained:  # peft lets all of an adapter be trained that it switches on
                value.requires_grad_(was_trained)

    def without_heads(self, transformer: Any) -> Any:
        """Return a copy without the modules that peft saves beside its own."""
        import copy

        from peft.utils import ModulesToSaveWrapper

        bare = copy.deepcopy(transformer)
        plain = bare.get_base_model()
        for name, module in list(plain.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, own_name = name.rpartition(".")
                delattr(plain.get_submodule(parent), own_name)
        bare.peft_config["default"].modules_to_save = None
        return bare

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write a directory that `PeftModel.from_pretrained` loads."""
        config = transformer.peft_config["default"]
        local_name = config.base_model_name_or_path
        config.base_model_name_or_path = base_name
        try:
            # "auto" would ask the hub for the base's vocabulary; embeddings are frozen here anyway.
            transformer.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        finally:
            config.base_model_name_or_path = local_name
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours says what happened

    def saved(self, transformer: Any) -> dict[str, Any]:
        """Return what peft makes of the adapter and its heads for a file; frozen projections are among it."""
        from peft import get_peft_model_state_dict

        saved: dict[str, Any] = get_peft_model_state_dict(transformer, save_embedding_layers=False)
        return saved

    def merge(self, transformer: Any) -> Any:
        """Return a copy of the base whose weights carry the adapter, and whose heads are the trained ones.

        The heads come first: peft's own unloading fails on heads of more than one layer beside (IA)^3 and VeRA. An
        output layer that is adapted and shares the embeddings' weights gets weights of its own.
        """
        import copy

        from peft.utils import ModulesToSaveWrapper

        merged = copy.deepcopy(transformer)
        plain = merged.get_base_model()
        for name, module in list(plain.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                plain.set_submodule(name, module.modules_to_save["default"])
        _untie(plain)
        return merged.merge_and_unload(safe_merge=True)


def _untie(transformer: Any) -> None:
    """Give an adapted output layer weights of its own: what is merged into them is not for the embeddings."""
    from torch import nn

    layer = getattr(transformer.get_output_embeddings(), "base_layer", None)
    if layer is not None and layer.weight is transformer.get_input_embeddings().weight:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        transformer.config.tie_word_embeddings = False


def _task_type(transformer: Any, heads: tuple[str, ...]) -> str | None:
    """Return peft's name for the kind of model; None for those that read images: its named ones all read tokens."""
    if transformer.main_input_name == "pixel_values":
        return None
    if heads and transformer.base_model is not transformer:  # on a bare one, a head is of the task's own
        return "SEQ_CLS"
    return "CAUSAL_LM" if transformer.can_generate() else "FEATURE_EXTRACTION"


def linear_layers(transformer: Any, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return the linear layers by full name, without those of heads, which are trained in full already."""
    from torch import nn

    return {
        name: module
        for name, module in transformer.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not f"{name}.".startswith(tuple(f"{head}." for head in heads))
    }


def narrower_side(layer: Any) -> int:
    """Return the lesser of a layer's widths; the weights of one in 4 bits lie in another shape."""
    sides = (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else layer.weight.shape
    return int(min(sides))


def check_targets(targets: Collection[str], known: Collection[str], model_type: str, key: str) -> None:
    """Refuse targets that are not known, and none at all.

    Raises:
        ModelError: `adapter-targets`.
    """
    missing = [target for target in targets if target not in known]
    if missing or not targets:
        given = f"names {', '.join(missing)}" if missing else "has no default"
        raise ModelError(
            f"{key} {given} for the architecture {model_type!r}",
            f"some of {', '.join(sorted(known))}",
            f"set {key}",
            code="adapter-targets",
        )
