"""Adapter methods that the `peft` library provides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from common.adapters.base import ADAPTERS, AdapterMethod
from common.errors import ModelError
from common.settings import AdapterSettings, Names

_DEFAULT_TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "vit": ("q_proj", "v_proj"),
    "tsugiki-cnn": ("fc",),
}
"""Query and value projections, as in Hu et al. 2021, section 4.2, under the names of each architecture.

A network without attention has its last layer here.
"""


class LoraSettings(AdapterSettings):
    """LoRA: W + (alpha / rank) * B A, with B at zero in the beginning."""

    method: Literal["lora"] = Field(default="lora", description="the adapter method")
    rank: int = Field(default=8, ge=1, le=256, description="rows of A, columns of B")
    alpha: float = Field(default=16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of A")
    target_modules: Names = Field(
        default=(), description="names of the linear layers; empty: query and value projections"
    )
    freeze_a: Literal["auto", "yes", "no"] = Field(
        default="auto", description="keep A at its initial values and exchange B only; auto: under privacy (FFA-LoRA)"
    )


def _task_type(transformer: Any, heads: tuple[str, ...]) -> str | None:
    """Return peft's name for the kind of model; None for those that read images: its named ones all read tokens."""
    if transformer.main_input_name == "pixel_values":
        return None
    if heads:
        return "SEQ_CLS"
    return "CAUSAL_LM" if transformer.can_generate() else "FEATURE_EXTRACTION"


@ADAPTERS.register("lora")
class Lora(AdapterMethod):
    """Low-rank adaptation. Source: Hu et al. 2021, arXiv:2106.09685, section 4.1."""

    name = "lora"
    Settings = LoraSettings
    export_format = "peft"

    def attach(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Wrap the transformer in a `PeftModel` with one LoRA adapter, its heads in `modules_to_save`."""
        from peft import LoraConfig, get_peft_model

        targets = self._targets(transformer, heads)
        config = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules=list(targets),
            modules_to_save=list(heads) or None,
            fan_in_fan_out=transformer.config.model_type == "gpt2",
            task_type=_task_type(transformer, heads),
        )
        model = get_peft_model(transformer, config)
        if self.settings.freeze_a == "yes":
            for value in self.constants(model).values():
                value.requires_grad_(False)
        return model

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return A of every layer if it is frozen: then B A is linear in what is trained, noised and averaged.

        Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (ICLR), section 4.
        """
        if self.settings.freeze_a != "yes":
            return {}
        return {name: value for name, value in transformer.named_parameters() if ".lora_A." in name}

    def _targets(self, transformer: Any, heads: tuple[str, ...]) -> tuple[str, ...]:
        """Return the modules to adapt, after checking that they are there and not narrower than the rank."""
        from torch import nn

        model_type = transformer.config.model_type
        targets = self.settings.target_modules or _DEFAULT_TARGETS.get(model_type, ())
        linear = {
            name.rsplit(".", 1)[-1]: module
            for name, module in transformer.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and not f"{name}.".startswith(tuple(f"{head}." for head in heads))  # trained in full already
        }
        missing = [target for target in targets if target not in linear]
        if missing or not targets:
            raise ModelError(
                f"adapter.target_modules: {', '.join(missing) or 'no default'} for the architecture {model_type!r}",
                f"some of {', '.join(sorted(linear))}",
                "set adapter.target_modules",
                code="adapter-targets",
            )
        narrowest = min(min(linear[target].weight.shape) for target in targets)
        if self.settings.rank > narrowest:
            raise ModelError(
                f"adapter.rank = {self.settings.rank}",
                f"at most {narrowest}, the width of the layers",
                code="adapter-rank",
            )
        return tuple(targets)

    @contextmanager
    def disabled(self, transformer: Any) -> Iterator[None]:
        """Switch LoRA off. peft would switch the heads back as well, so their trained copies are called instead."""
        from peft.utils import ModulesToSaveWrapper

        with transformer.disable_adapter():
            wrappers = [module for module in transformer.modules() if isinstance(module, ModulesToSaveWrapper)]
            for wrapper in wrappers:
                wrapper.enable_adapters(True)
            yield

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write a directory that `PeftModel.from_pretrained` loads."""
        config = transformer.peft_config["default"]
        local_name, config.base_model_name_or_path = config.base_model_name_or_path, base_name
        try:
            # "auto" would ask the hub for the base's vocabulary; embeddings are frozen here anyway.
            transformer.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        finally:
            config.base_model_name_or_path = local_name
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours says what happened

    def merge(self, transformer: Any) -> Any:
        """Return a copy of the base with (alpha / rank) * B A added to its weights."""
        import copy

        return copy.deepcopy(transformer).merge_and_unload(safe_merge=True)
