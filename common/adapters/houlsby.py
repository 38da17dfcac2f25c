"""Houlsby modules: two small bottlenecks in every transformer block.

A bottleneck is a child of the module after which it stands (`...output.dropout.bottleneck`), run by a forward hook on
that module. So the base's own tensors keep their names, and nothing here needs torch before a model is loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from common.adapters.base import ADAPTERS, AdapterMethod
from common.errors import ExportError, ModelError
from common.settings import AdapterSettings, Section

TENSORS_FILE = "tsugiki_adapter.safetensors"
MANIFEST_FILE = "tsugiki_adapter.json"

_DOWN_STD = 0.02
"""BERT's own initial standard deviation (Devlin et al. 2019, `initializer_range`)."""

_BASE_NORM = "base_norm_"


class _Place(NamedTuple):
    """Where a bottleneck goes: paths inside a block, or the modules that were found there.

    Args:
        after: the module whose output goes through the bottleneck; the block adds its residual to the result.
        projection: the linear layer that made that output.
        norm: the layer norm of this half of the block.
    """

    after: Any
    projection: Any
    norm: Any


_BERT = (
    _Place("attention.output.dropout", "attention.output.dense", "attention.output.LayerNorm"),
    _Place("output.dropout", "output.dense", "output.LayerNorm"),
)
_DISTILBERT = (
    _Place("attention.out_lin", "attention.out_lin", "sa_layer_norm"),
    _Place("ffn.dropout", "ffn.lin2", "output_layer_norm"),
)
_LLAMA = (
    _Place("self_attn.o_proj", "self_attn.o_proj", "input_layernorm"),
    _Place("mlp.down_proj", "mlp.down_proj", "post_attention_layernorm"),
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
    """Houlsby modules: h + up(activation(down(h))), twice in each block, with `up` at zero in the beginning."""

    method: Literal["houlsby"] = Field(default="houlsby", description="the adapter method")
    bottleneck: int = Field(
        default=48,
        ge=1,
        le=1024,
        description="width of the bottlenecks; a base with L blocks of width h gets "
        "2 * L * (2 * h * bottleneck + bottleneck + h) parameters",
    )
    activation: Literal["gelu", "relu"] = Field(default="gelu", description="the nonlinearity inside the bottlenecks")
    train_layer_norm: bool = Field(
        default=False, description="also train and exchange the blocks' layer norms, as the original does"
    )


class _Manifest(Section):
    """What stands beside the tensors of a saved adapter."""

    format: Literal[1] = 1
    method: Literal["houlsby"] = "houlsby"
    settings: HoulsbySettings
    base_model_name_or_path: str
    tensors: dict[str, tuple[int, ...]]
    heads: tuple[str, ...]


@ADAPTERS.register("houlsby")
class Houlsby(AdapterMethod):
    """Bottleneck modules. Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1.

    They stand after the attention's output projection and after the second feed-forward projection, each with its
    dropout, and before the residual is added and normalised. The original starts near the identity, with both
    projections close to zero (section 3.6); here the up-projection is zero, so that the start is the base itself.
    """

    name = "houlsby"
    Settings = HoulsbySettings
    model_types = frozenset(_LAYOUTS)
    export_format = "tsugiki"

    def attach(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Put the bottlenecks into the transformer, which is changed in place and returned.

        Raises:
            ModelError: `adapter-unsupported`, the architecture is not in `model_types`; `adapter-attached`, there are
                bottlenecks already; `head-missing`, a head is not there. The transformer is unchanged then.
        """
        places = _places(transformer)
        modules = dict(transformer.named_modules())
        missing = [head for head in heads if head not in modules]
        if missing:
            raise ModelError(
                f"{type(transformer).__name__} has no module {missing[0]!r}",
                "a model with this head",
                "load the class of model with which the adapter was trained",
                code="head-missing",
            )
        if hasattr(places[0].after, "bottleneck"):
            raise ModelError(
                "the transformer has Houlsby modules already",
                "a bare one",
                "load the base anew",
                code="adapter-attached",
            )
        transformer.requires_grad_(False)
        for place in places:
            self._insert(place)
        for head in heads:
            modules[head].requires_grad_(True)
        transformer.bottleneck_heads = heads  # for `save`, which is told nothing but the transformer
        return transformer

    def _insert(self, place: _Place) -> None:
        """Put one bottleneck in its place, in the type and on the device of the projection before it."""
        from torch import nn

        weight, hidden = place.projection.weight, place.projection.out_features
        down, up = nn.Linear(hidden, self.settings.bottleneck), nn.Linear(self.settings.bottleneck, hidden)
        nn.init.normal_(down.weight, std=_DOWN_STD)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        activation = nn.GELU() if self.settings.activation == "gelu" else nn.ReLU()
        bottleneck = nn.Sequential(OrderedDict(down=down, activation=activation, up=up))
        place.after.bottleneck = bottleneck.to(device=weight.device, dtype=weight.dtype)
        place.after.bottleneck_on = True
        place.after.register_forward_hook(_through_bottleneck)
        if self.settings.train_layer_norm:
            for name, parameter in place.norm.named_parameters():
                # Not on the norm itself: Opacus refuses trainable modules with buffers.
                place.after.register_buffer(_BASE_NORM + name, parameter.detach().clone(), persistent=False)
                parameter.requires_grad_(True)

    @contextmanager
    def disabled(self, transformer: Any) -> Iterator[None]:
        """Switch the bottlenecks off and put the base's own layer norms in the place of trained ones."""
        from torch import nn

        places = _places(transformer)
        switches = [(place.after, place.after.bottleneck_on) for place in places]
        base_norms = [
            (place.norm, name, trained, getattr(place.after, _BASE_NORM + name))
            for place in places
            for name, trained in place.norm.named_parameters()
            if hasattr(place.after, _BASE_NORM + name)
        ]
        try:
            for module, _ in switches:
                module.bottleneck_on = False
            for norm, name, _, base in base_norms:
                # The parameter is exchanged, not its values: a graph made before this block can still run backward.
                setattr(norm, name, nn.Parameter(base, requires_grad=False))
            yield
        finally:
            for module, was_on in switches:
                module.bottleneck_on = was_on
            for norm, name, trained, _ in base_norms:
                setattr(norm, name, trained)

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write what `load_adapter` reads: every trained tensor by name, and a JSON file that describes them."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(transformer).items()}
        manifest = _Manifest(
            settings=self.settings,
            base_model_name_or_path=base_name,
            tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            heads=transformer.bottleneck_heads,
        )
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def merge(self, transformer: Any) -> Any:
        """Refuse.

        Raises:
            ExportError: always; no weights of the base compute what a nonlinearity between two of its layers does.
        """
        raise ExportError(
            "Houlsby modules have a nonlinearity and cannot be merged into the base's weights",
            "an export that keeps them apart",
            "export without --merged, and load the export with common.adapters.houlsby.load_adapter",
            code="merge-unsupported",
        )


def load_adapter(transformer: Any, folder: str | Path) -> Any:
    """Put an adapter that `Houlsby.save` wrote on a freshly loaded base.

    Args:
        transformer: a `PreTrainedModel` of the same base and class as the one that was trained; a bare `AutoModel`
            where that was one.
        folder: holds `tsugiki_adapter.safetensors` and `tsugiki_adapter.json`.

    Returns:
        The same transformer, in eval mode, with the adapter on.

    Raises:
        ModelError: `adapter-invalid`, the files cannot be read, or a tensor is missing, extra or of another shape; and
            what `attach` raises. After a wrong tensor the transformer is of no use; load it anew.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        manifest = _Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, ValidationError, SafetensorError) as error:
        raise ModelError(
            f"no Houlsby adapter can be read from {str(folder)!r}",
            f"a readable {MANIFEST_FILE} of format 1 and {TENSORS_FILE}",
            "export the adapter again",
            code="adapter-invalid",
        ) from error
    Houlsby(manifest.settings).attach(transformer, manifest.heads)
    trained = _trained(transformer)
    _compare(tensors, trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    return transformer.eval()


def _compare(tensors: dict[str, Any], trained: dict[str, Any]) -> None:
    """Refuse tensors whose names and shapes are not those of the trained parameters, naming the first difference."""
    for name in sorted(tensors.keys() | trained.keys()):
        found, wanted = (
            f"shape {tuple(group[name].shape)}" if name in group else "none" for group in (tensors, trained)
        )
        if found != wanted:
            raise ModelError(
                f"the adapter's tensor {name!r}: {found}",
                f"{wanted} on this base",
                "load the base, and the class of model, with which the adapter was trained",
                code="adapter-invalid",
            )


def _places(transformer: Any) -> list[_Place]:
    """Return the modules at all places, two for each block, in the order of the blocks.

    Raises:
        ModelError: the architecture is unknown, or is not laid out as its name says.
    """
    model_type = transformer.config.model_type
    try:
        path, layout = _LAYOUTS[model_type]
        blocks = transformer.base_model.get_submodule(path)
        return [_Place(*map(block.get_submodule, place)) for block in blocks for place in layout]
    except (KeyError, AttributeError) as error:
        raise ModelError(
            f"Houlsby modules do not know the architecture {model_type!r} ({type(transformer).__name__})",
            f"one of {', '.join(sorted(_LAYOUTS))}",
            'set adapter.method = "lora"',
            code="adapter-unsupported",
        ) from error


def _trained(transformer: Any) -> dict[str, Any]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def _through_bottleneck(module: Any, inputs: Any, output: Any) -> Any:
    """Forward hook: return h + up(activation(down(h))) for the module's output h."""
    return output + module.bottleneck(output) if module.bottleneck_on else output
