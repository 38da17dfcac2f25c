"""AdapterFusion: an attention over bottleneck modules of earlier runs, which stay as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from common.adapters.base import ADAPTERS
from common.adapters.houlsby import Houlsby, HoulsbySettings, Place, make_bottleneck, places
from common.adapters.own import MANIFEST_FILE, OwnMethod
from common.adapters.tensors import fill, read_tensors
from common.errors import ModelError
from common.settings import AdapterSettings, Names

_STD = 0.02
"""Initial standard deviation of queries and keys, as in the authors' code: at first all adapters weigh much alike."""

_FOLDER = "adapters"
"""Where an export keeps the adapters that are fused, by their numbers."""


class FusionSettings(AdapterSettings):
    """AdapterFusion: an attention over exported houlsby adapters, each of which stays as it is."""

    method: Literal["fusion"] = Field(default="fusion", description="the adapter method")
    adapters: Names = Field(
        default=(),
        description="exports of houlsby runs on this base, two or more: folders; a site resolves each name through "
        "[models], as it does for model.name",
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The adapters."""
        return self.adapters

    def resolved(self, source: Callable[[str], str]) -> Self:
        """Return these settings with what stands behind the names of adapters."""
        return self.model_copy(update={"adapters": tuple(map(source, self.adapters))})


@ADAPTERS.register("fusion")
class Fusion(OwnMethod):
    """AdapterFusion. Source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2.

    With h, the output of a half of a block, and z_n, what adapter n makes of it (without its residual h):

        o = h + sum over n of softmax_n(h Q . z_n K) z_n V

    Q, K and V are one square matrix each in every place, trained and exchanged; V is the identity in the beginning. The
    paper's regulariser, which keeps V near it, is left out.
    """

    name = "fusion"
    Settings = FusionSettings
    model_types = Houlsby.model_types
    starts_at_base = False

    def bases(self) -> dict[str, str]:
        """Return the fingerprint of each adapter's base.

        Raises:
            ModelError: as `place`, for what the adapters say of themselves.
        """
        return {str(folder): exported.base_fingerprint for folder, exported in self._read()}

    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Put the adapters and an attention over them in each of their places.

        Raises:
            ModelError: `adapter-fusion`, they are too few, or no two bottleneck modules of one placement;
                `adapter-invalid`, one cannot be read; `adapter-unsupported`, the architecture is not in `model_types`.
        """
        from torch import nn

        adapters = [(folder, _houlsby(exported), exported.heads) for folder, exported in self._read()]
        chosen = places(transformer, adapters[0][1].placement)
        stacks = [nn.ModuleList(make_bottleneck(settings, place) for _, settings, _ in adapters) for place in chosen]
        names = {id(module): name for name, module in transformer.base_model.named_modules()}
        for number, (folder, _, trained_heads) in enumerate(adapters):
            wanted = {
                f"{names[id(place.after)]}.bottleneck.{part}": value
                for place, stack in zip(chosen, stacks, strict=True)
                for part, value in stack[number].named_parameters()
            }
            found = {
                name.removeprefix(f"{transformer.base_model_prefix}."): value
                for name, value in read_tensors(folder / Houlsby.tensors_file).items()
                if not name.startswith(tuple(f"{head}." for head in trained_heads))
            }
            fill(wanted, found)
        for place, stack in zip(chosen, stacks, strict=True):
            _insert(place, stack.requires_grad_(False))

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return the adapters that are fused."""
        return {name: value for name, value in transformer.named_parameters() if ".fusion.bottlenecks." in name}

    def spec_settings(self) -> dict[str, Any]:
        """Return the settings of the adapters; each machine has names of its own for them, and their order counts."""
        return {"adapters": [_houlsby(exported).model_dump(mode="json") for _, exported in self._read()]}

    def exported_settings(self) -> dict[str, Any]:
        """Return the settings with the places that the adapters have in the export."""
        inside = [f"{_FOLDER}/{number}" for number in range(len(self.settings.adapters))]
        return {**super().exported_settings(), "adapters": inside}

    def exported_in(self, folder: Path) -> Self:
        """Return this method with the adapters in the export; of their names nothing but their number counts."""
        inside = [str(folder.absolute() / _FOLDER / str(number)) for number in range(len(self.settings.adapters))]
        return type(self)(self.settings.model_copy(update={"adapters": tuple(inside)}))

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write what is trained, and the adapters that it needs beside it."""
        from common.exported import EXPORTED_FILE

        super().save(transformer, folder, base_name)
        for number, (source, _) in enumerate(self._read()):
            target = folder / _FOLDER / str(number)
            target.mkdir(parents=True)
            for file in (EXPORTED_FILE, MANIFEST_FILE, Houlsby.tensors_file):
                shutil.copyfile(source / file, target / file)

    def _read(self) -> list[tuple[Path, Any]]:
        """Return the folder of each adapter, and what it says of itself, after comparing that.

        Raises:
            ModelError: `adapter-fusion`, `adapter-invalid`, `model-not-found`.
        """
        from common.exported import read_exported  # which knows all methods, this one too
        from common.model import find

        if len(self.settings.adapters) < 2:
            raise _unfit("adapter.adapters names fewer than two")
        folders = [find(name) for name in self.settings.adapters]
        found = [(folder, read_exported(folder)) for folder in folders]
        for name, (_, exported) in zip(self.settings.adapters, found, strict=True):
            if exported.adapter["method"] != Houlsby.name:
                raise _unfit(f"the adapter {name!r} is of the method {exported.adapter['method']!r}")
            if _houlsby(exported).train_layer_norm:
                raise _unfit(f"the adapter {name!r} has layer norms of its own")
        if len({_houlsby(exported).placement for _, exported in found}) > 1:
            raise _unfit("the adapters differ in their placement")
        return found


def _houlsby(exported: Any) -> HoulsbySettings:
    return HoulsbySettings.model_validate(exported.adapter)


def _unfit(what: str) -> ModelError:
    return ModelError(
        what,
        "exports of two or more houlsby runs with one placement, without train_layer_norm",
        "set adapter.adapters to such folders",
        code="adapter-fusion",
    )


def _insert(place: Place, bottlenecks: Any) -> None:
    """Put an attention over frozen bottlenecks in its place, in the type and on the device of the projection."""
    from torch import nn

    weight, hidden = place.projection.weight, place.projection.out_features
    fusion = nn.Module()
    for part in ("query", "key", "value"):
        matrix = nn.Linear(hidden, hidden, bias=False)
        nn.init.eye_(matrix.weight) if part == "value" else nn.init.normal_(matrix.weight, std=_STD)
        fusion.add_module(part, matrix)
    fusion.add_module("bottlenecks", bottlenecks)
    place.after.fusion = fusion.to(device=weight.device, dtype=weight.dtype)
    place.after.adapter_on = True
    place.after.register_forward_hook(_through_fusion)


def _through_fusion(module: Any, inputs: Any, output: Any) -> Any:
    """Forward hook: return the fused output for the module's output h, of shape (rows, tokens, width)."""
    import torch

    if not module.adapter_on:
        return output
    fusion = module.fusion
    made = torch.stack([bottleneck(output) for bottleneck in fusion.bottlenecks], dim=-2)  # (rows, tokens, n, width)
    scores = fusion.key(made) @ fusion.query(output).unsqueeze(-1)  # (rows, tokens, n, 1)
    return output + (scores.softmax(dim=-2) * fusion.value(made)).sum(dim=-2)
