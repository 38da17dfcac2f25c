"""VeRA: trained vectors between frozen random projections that all layers share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.lora import attention_targets
from tsugiki.common.adapters.peft_base import PeftMethod, TargetedSettings


class VeraSettings(TargetedSettings):
    """VeRA: W + diag(b) B diag(d) A, with A and B random and frozen, b at zero and d at d_initial in the beginning."""

    method: Literal["vera"] = Field(default="vera", description="The adapter method.")
    rank: int = Field(
        default=256,
        ge=1,
        le=4096,
        description="Rows of A, columns of B; each layer trains rank numbers and its width. Raise it if the adapter "
        "learns too little.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the input of A. Raise it, for example to 0.1, if sites overfit.",
    )
    d_initial: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="Initial value of every number in d. Lower it if the loss jumps in the first rounds.",
    )


@ADAPTERS.register("vera")
class Vera(PeftMethod):
    """Vector-based random matrix adaptation. Source: Kopiczko et al. 2024, arXiv:2310.11454, section 3.1.

    It needs a higher learning rate than LoRA, because the trained factors multiply small numbers.
    """

    name = "vera"
    Settings = VeraSettings
    rates = RateTable(
        adamw=Rates(encoder=2e-2, decoder=5e-2, vision=2e-2),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=1.0),
    )
    """Kopiczko et al., table 8, take 4e-3 to 1e-2 for RoBERTa, which is twice as wide."""
    loads_anywhere = False  # transformers refuses tensors that layers share; `PeftModel` loads them
    row_gradients = False  # Opacus finds gradients in layers, and its vectors are no layers

    def config(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Return peft's configuration. The projections are drawn from torch's generator and saved with the adapter."""
        import torch
        from peft import VeraConfig

        return VeraConfig(
            r=self.settings.rank,
            vera_dropout=self.settings.dropout,
            d_initial=self.settings.d_initial,
            target_modules=list(attention_targets(self.settings, transformer, heads)),
            fan_in_fan_out=transformer.config.model_type == "gpt2",
            projection_prng_key=int(torch.randint(2**31, ())),
            save_projection=True,
        )

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return the shared projections A and B."""
        return {name: value for name, value in transformer.named_buffers() if ".vera_A." in name or ".vera_B." in name}
