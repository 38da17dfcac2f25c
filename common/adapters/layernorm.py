"""LN tuning: train only the layer norms."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.peft_base import PeftMethod, check_targets
from tsugiki.common.settings import AdapterSettings


class LayerNormSettings(AdapterSettings):
    """LN tuning: a trained copy of every layer norm (or RMS norm)."""

    method: Literal["layernorm"] = Field(default="layernorm", description="The adapter method.")


@ADAPTERS.register("layernorm")
class LayerNorm(PeftMethod):
    """LN tuning. Source: Zhao et al. 2024, arXiv:2312.11420; peft's `LNTuningModel`."""

    name = "layernorm"
    Settings = LayerNormSettings
    computes_in_float32 = False  # a norm of float32 gives the next layer float32, which a base of 16 bits cannot read
    rates = RateTable(
        adamw=Rates(encoder=5e-3, decoder=2e-2, vision=5e-3),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=0.1),
    )
    """Not measured."""
    unfit = {"tsugiki-cnn": "it has no layer norms"}  # noqa: RUF012  (declared a ClassVar in the base)

    def config(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Return peft's configuration with every norm of the transformer, by full name."""
        from peft import LNTuningConfig

        inside = tuple(f"{head}." for head in heads)
        norms = [
            name
            for name, module in transformer.named_modules()
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and not f"{name}.".startswith(inside)
        ]
        check_targets(norms, norms, transformer.config.model_type, "adapter.method")
        return LNTuningConfig(target_modules=norms)
