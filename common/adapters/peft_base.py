"""The base class of adapter methods from the `peft` library."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tsugiki.common.adapters.base import AdapterMethod
from tsugiki.common.adapters.master import keep_masters
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
    """A method for which `peft` provides the layers, the merging and the file format."""

    export_format = "peft"
    tensors_file = "adapter_model.safetensors"
    computes_in_float32: ClassVar[bool] = True
    """Whether the method's layers cast what goes through them, so that peft may hold their tensors in float32."""

    @abstractmethod
    def config(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Return peft's configuration, without `modules_to_save` and `task_type`.

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
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # `_untie` solves this
            model = get_peft_model(transformer, config, autocast_adapter_dtype=self.computes_in_float32)
        # Constants stay frozen, such as A under `freeze_a`.
        for name, value in model.named_parameters():
            if name in self.constants(model):
                value.requires_grad_(False)
        keep_masters(model)
        return model

    @contextmanager
    def disabled(self, transformer: Any) -> Iterator[None]:
        """Switch the adapter off. peft switches the trained heads off too, so they are switched on again."""
        from peft.utils import ModulesToSaveWrapper

        trained = [(value, value.requires_grad) for value in transformer.parameters()]
        try:
            with transformer.disable_adapter():
                wrappers = [module for module in transformer.modules() if isinstance(module, ModulesToSaveWrapper)]
                for wrapper in wrappers:
                    wrapper.enable_adapters(True)
                yield
        finally:
            # peft makes all parameters of an adapter trainable when it switches the adapter on.
            for value, was_trained in trained:
                value.requires_grad_(was_trained)

    def without_heads(self, transformer: Any) -> Any:
        """Return a copy without the heads, which peft keeps in `ModulesToSaveWrapper`s."""
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
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the export has its own

    def saved(self, transformer: Any) -> dict[str, Any]:
        """Return peft's state dict of the adapter and its heads, including frozen projections."""
        from peft import get_peft_model_state_dict

        saved: dict[str, Any] = get_peft_model_state_dict(transformer, save_embedding_layers=False)
        return saved

    def merge(self, transformer: Any) -> Any:
        """Return a copy of the base whose weights carry the adapter, and whose heads are the trained ones.

        The heads are replaced first: with (IA)^3 and VeRA, peft's own unloading fails on heads of more than one layer.
        An adapted output layer that shares the embeddings' weights gets weights of its own.
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
    """Give an adapted output layer weights of its own, so that merging does not change the embeddings."""
    from torch import nn

    layer = getattr(transformer.get_output_embeddings(), "base_layer", None)
    if layer is not None and layer.weight is transformer.get_input_embeddings().weight:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        transformer.config.tie_word_embeddings = False


def _task_type(transformer: Any, heads: tuple[str, ...]) -> str | None:
    """Return peft's task type for a model; None if it reads images, because all of peft's types read tokens."""
    if transformer.main_input_name == "pixel_values":
        return None
    if heads and transformer.base_model is not transformer:  # a bare transformer's head is added by the task
        return "SEQ_CLS"
    return "CAUSAL_LM" if transformer.can_generate() else "FEATURE_EXTRACTION"


def linear_layers(transformer: Any, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return the linear layers by full name, without those in heads, which are trained in full."""
    from torch import nn

    inside_heads = tuple(f"{head}." for head in heads)
    layers = {}
    for name, module in transformer.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # gpt2's linear layers
        if is_linear and not f"{name}.".startswith(inside_heads):
            layers[name] = module
    return layers


def narrower_side(layer: Any) -> int:
    """Return the smaller width of a layer. The weights of a 4-bit layer do not have its shape."""
    if hasattr(layer, "in_features"):
        return int(min(layer.in_features, layer.out_features))
    return int(min(layer.weight.shape))


def check_targets(targets: Collection[str], known: Collection[str], model_type: str, key: str) -> None:
    """Check that there are targets, and that all of them are known.

    Raises:
        ModelError: `adapter-targets`, there are none, or one is unknown.
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
