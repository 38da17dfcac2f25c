"""(IA)^3: trained factors on keys, values and the inner activations of the feed-forward layers."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.peft_base import PeftMethod, TargetedSettings, check_targets, linear_layers
from tsugiki.common.settings import Names

_BERT = (("key", "value"), (r"\d+\.output\.dense",))
_LLAMA = (("k_proj", "v_proj"), ("down_proj",))
_DEFAULT_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": (("k_lin", "v_lin"), ("lin2",)),
    "mpnet": (("k", "v"), (r"\d+\.output\.dense",)),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": (("c_attn",), (r"mlp\.c_proj",)),
    "vit": (("k_proj", "v_proj"), ("fc2",)),
    "tsugiki-cnn": ((), ("fc",)),
}
"""For each `config.model_type`: ends of the names of layers whose outputs are scaled, and of those whose inputs are.

gpt2 has queries, keys and values in one layer, so queries are scaled too. In a network without attention, the input of
the last layer is scaled.
"""

_KEYS = "adapter.target_modules and adapter.feedforward_modules"


class Ia3Settings(TargetedSettings):
    """(IA)^3: factors on the outputs of some linear layers and the inputs of others, all 1 in the beginning."""

    method: Literal["ia3"] = Field(default="ia3", description="The adapter method.")
    feedforward_modules: Names = Field(
        default=(),
        description="Names of the linear layers whose inputs are scaled; target_modules names those whose outputs "
        "are. Set both if the base's architecture is not known. Both empty: the choice of the method's "
        "paper.",
    )


@ADAPTERS.register("ia3")
class Ia3(PeftMethod):
    """Infused adapters by inhibiting and amplifying. Source: Liu et al. 2022, arXiv:2205.05638, section 3.3."""

    name = "ia3"
    Settings = Ia3Settings
    rates = RateTable(
        adamw=Rates(encoder=1e-2, decoder=3e-2, vision=1e-2),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=1.0),
    )
    """Liu et al. take 3e-3 with another optimizer, for a much wider base."""
    row_gradients = False  # Opacus finds gradients in layers, and its vectors are no layers

    def config(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Return peft's configuration, with full names, because `output.dense` matches the attention's output too."""
        from peft import IA3Config

        model_type = transformer.config.model_type
        outputs = self.settings.target_modules
        inputs = self.settings.feedforward_modules
        layers = linear_layers(transformer, heads)
        if outputs or inputs or model_type not in _DEFAULT_TARGETS:
            check_targets((*outputs, *inputs), {name.rsplit(".", 1)[-1] for name in layers}, model_type, _KEYS)
        else:
            outputs, inputs = _DEFAULT_TARGETS[model_type]
        scaled_outputs = _ending_with(outputs, layers)
        scaled_inputs = _ending_with(inputs, layers)
        return IA3Config(
            target_modules=scaled_outputs + scaled_inputs,
            feedforward_modules=scaled_inputs,
            fan_in_fan_out=model_type == "gpt2",
        )


def _ending_with(ends: Collection[str], names: Collection[str]) -> list[str]:
    """Return the names that end with one of the patterns; a pattern starts at a dot or at the beginning."""
    if not ends:
        return []
    return [name for name in names if re.search(rf"(^|\.)({'|'.join(ends)})$", name)]
