"""Bottleneck modules: two small ones in every transformer block (Houlsby), or one (Pfeiffer).

A bottleneck is a child of the module that it follows (`...output.dropout.bottleneck`), and a forward hook on that
module runs it. So the base's tensors keep their names, and this file needs no torch before a model is loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, NamedTuple

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.own_base import OwnMethod
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import AdapterSettings

_DOWN_STD = 0.02
"""BERT's own initial standard deviation (Devlin et al. 2019, `initializer_range`)."""

Placement = Literal["houlsby", "pfeiffer"]


class Place(NamedTuple):
    """The place of a bottleneck: paths inside a block, or the modules at these paths.

    Args:
        after: the module whose output goes through the bottleneck; the block adds its residual to the result.
        projection: the linear layer that made that output.
        norm: the layer norm of this half of the block.
    """

    after: Any
    projection: Any
    norm: Any


_BERT = (
    Place("attention.output.dropout", "attention.output.dense", "attention.output.LayerNorm"),
    Place("output.dropout", "output.dense", "output.LayerNorm"),
)
_DISTILBERT = (
    Place("attention.out_lin", "attention.out_lin", "sa_layer_norm"),
    Place("ffn.dropout", "ffn.lin2", "output_layer_norm"),
)
_LLAMA = (
    Place("self_attn.o_proj", "self_attn.o_proj", "input_layernorm"),
    Place("mlp.down_proj", "mlp.down_proj", "post_attention_layernorm"),
)
_LAYOUTS = {
    "bert": ("encoder.layer", _BERT),
    "roberta": ("encoder.layer", _BERT),
    "xlm-roberta": ("encoder.layer", _BERT),
    "electra": ("encoder.layer", _BERT),
    "distilbert": ("transformer.layer", _DISTILBERT),
    "llama": ("layers", _LLAMA),
}
"""For each `config.model_type`: the list of blocks inside the base model, and the two places in a block."""


class HoulsbySettings(AdapterSettings):
    """Bottlenecks: h + up(activation(down(h))), with `up` at zero in the beginning."""

    method: Literal["houlsby"] = Field(default="houlsby", description="The adapter method.")
    placement: Placement = Field(
        default="houlsby",
        description='"houlsby": a bottleneck after the attention and one after the feed-forward of every block; '
        '"pfeiffer": only the latter. Use "pfeiffer" for half the bytes, or if the adapters are to be '
        "fused.",
    )
    bottleneck: int = Field(
        default=48,
        ge=1,
        le=1024,
        description="Width of the bottlenecks; a base with L blocks of width h gets 2 * L * (2 * h * bottleneck + "
        'bottleneck + h) parameters, half of that with placement = "pfeiffer". Raise it if the adapter '
        "learns too little.",
    )
    activation: Literal["gelu", "relu"] = Field(default="gelu", description="Nonlinearity inside the bottlenecks.")
    train_layer_norm: bool = Field(
        default=False,
        description="Also train and exchange the blocks' layer norms, as the original does. Leave it off if the "
        "adapters are to be fused.",
    )


@ADAPTERS.register("houlsby")
class Houlsby(OwnMethod):
    """Bottleneck modules. Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1.

    They follow the attention's output projection and the second feed-forward projection, each after its dropout and
    before the residual is added and normalised. The original starts near the identity, with both projections close to
    zero (section 3.6). Here the up-projection is zero, so that training starts at the base itself.

    Pfeiffer et al. 2021, arXiv:2005.00247, found the module after the feed-forward to be enough. The placement is
    theirs; their additional layer norm is left out.
    """

    name = "houlsby"
    Settings = HoulsbySettings
    rates = RateTable(
        adamw=Rates(encoder=5e-4, decoder=3e-3, vision=1e-3),
        sgd=Rates(encoder=0.3, decoder=0.3, vision=0.1),
    )
    """Encoders: docs/studies/houlsby_gap.md, where 1e-3 collapsed while the pooler was frozen."""
    model_types = frozenset(_LAYOUTS)

    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Put a bottleneck into each place.

        Raises:
            ModelError: `adapter-unsupported`, the architecture is not in `model_types`.
        """
        for place in places(transformer, self.settings.placement):
            place.after.bottleneck = make_bottleneck(self.settings, place)
            place.after.adapter_on = True
            place.after.register_forward_hook(_through_bottleneck)
        if self.settings.train_layer_norm:
            for place in places(transformer):
                place.norm.requires_grad_(True)


def make_bottleneck(settings: HoulsbySettings, place: Place) -> Any:
    """Return a new bottleneck for a place, with the dtype and device of the projection before it."""
    from torch import nn

    weight = place.projection.weight
    hidden = place.projection.out_features
    down = nn.Linear(hidden, settings.bottleneck)
    up = nn.Linear(settings.bottleneck, hidden)
    nn.init.normal_(down.weight, std=_DOWN_STD)
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    activation = nn.GELU() if settings.activation == "gelu" else nn.ReLU()
    bottleneck = nn.Sequential(OrderedDict(down=down, activation=activation, up=up))
    return bottleneck.to(device=weight.device, dtype=weight.dtype)


def places(transformer: Any, placement: Placement = "houlsby") -> list[Place]:
    """Return the modules at all places of a placement, in the order of the blocks.

    Raises:
        ModelError: `adapter-unsupported`, the architecture is unknown, or its modules are not where its name says.
    """
    model_type = transformer.config.model_type
    try:
        path, layout = _LAYOUTS[model_type]
        blocks = transformer.base_model.get_submodule(path)
        found = [Place(*map(block.get_submodule, place)) for block in blocks for place in layout]
    except (KeyError, AttributeError) as error:
        raise ModelError(
            f"Houlsby modules do not know the architecture {model_type!r} ({type(transformer).__name__})",
            f"one of {', '.join(sorted(_LAYOUTS))}",
            'set adapter.method = "lora"',
            code="adapter-unsupported",
        ) from error
    return found[1::2] if placement == "pfeiffer" else found


def _through_bottleneck(module: Any, inputs: Any, output: Any) -> Any:
    """Forward hook: return h + up(activation(down(h))) for the module's output h."""
    return output + module.bottleneck(output) if module.adapter_on else output
