"""BitFit: train only the bias terms of the base."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.own_base import OwnMethod
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import AdapterSettings

NO_BIASES = "it has no bias terms"


class BitfitSettings(AdapterSettings):
    """BitFit: every bias term, those of the layer norms included."""

    method: Literal["bitfit"] = Field(default="bitfit", description="The adapter method.")


@ADAPTERS.register("bitfit")
class Bitfit(OwnMethod):
    """Training of the bias terms. Source: Ben Zaken et al. 2022, arXiv:2106.10199, section 3.

    The biases of keys are trained too, as in the paper, although they do not change a softmax.
    """

    name = "bitfit"
    Settings = BitfitSettings
    rates = RateTable(
        adamw=Rates(encoder=5e-3, decoder=2e-2, vision=5e-3),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=0.1),
    )
    unfit = dict.fromkeys(("llama", "mistral"), NO_BIASES)

    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Let the biases require a gradient, except in heads and in the pooler of a bare transformer.

        Raises:
            ModelError: `adapter-unsupported`, there are no biases.
        """
        outside = tuple(f"{head}." for head in heads)
        if transformer.base_model is transformer:
            outside += ("pooler.",)  # the outputs of a bare transformer do not depend on it
        biases = [
            value
            for name, value in transformer.named_parameters()
            if name.endswith("bias") and not name.startswith(outside)
        ]
        if not biases:
            raise ModelError(
                f"adapter.method = {self.name!r} does not fit {type(transformer).__name__}: {NO_BIASES}",
                "a base whose layers have bias terms, such as BERT",
                'set adapter.method = "layernorm", which is as small, or "lora"',
                code="adapter-unsupported",
            )
        for value in biases:
            value.requires_grad_(True)

    def merge(self, transformer: Any) -> Any:
        """Return a copy without the kept values of the base: the trained tensors are already the base's own."""
        import copy

        merged = copy.deepcopy(transformer)
        del merged.base_values, merged.adapter_heads
        return merged
