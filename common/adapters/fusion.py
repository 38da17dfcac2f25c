"""AdapterFusion: train an attention over frozen bottleneck modules of earlier runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.houlsby import Houlsby, HoulsbySettings, Place, make_bottleneck, places
from tsugiki.common.adapters.own_base import OwnMethod
from tsugiki.common.adapters.tensors import fill, read_tensors
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import STARTS, AdapterSettings, Names

_STD = 0.02
"""Initial standard deviation of queries and keys, as in the authors' code: all adapters start with similar weights."""

_FOLDER = "adapters"
"""The folder of an export in which the fused adapters are, by their numbers."""


class FusionSettings(AdapterSettings):
    """AdapterFusion: an attention over exported houlsby adapters, each of which stays as it is."""

    method: Literal["fusion"] = Field(default="fusion", description="The adapter method.")
    adapters: Names = Field(
        default=(),
        description="Folders of two or more exported houlsby runs on this base. A deployed site loads them only if "
        "its own [models] has these names.",
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The adapters."""
        return self.adapters

    def resolved(self, source: Callable[[str], str]) -> Self:
        """Return these settings with the source behind each adapter's name."""
        return self.model_copy(update={"adapters": tuple(map(source, self.adapters))})


@dataclass(frozen=True)
class _Part:
    """A fused adapter: the content of its `tsugiki.json`, its settings, and its tensors by name, heads included."""

    name: str
    exported: Any
    settings: HoulsbySettings
    tensors: dict[str, Any]


@ADAPTERS.register("fusion")
class Fusion(OwnMethod):
    """AdapterFusion. Source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2.

    With h, the output of a half of a block, and z_n, the output of adapter n for h (without its residual h):

        o = h + sum over n of softmax_n(h Q . z_n K) z_n V

    Each place has its own square matrices Q, K and V, which are trained and exchanged. V starts at the identity. The
    paper's regulariser, which keeps V near the identity, is left out.
    """

    name = "fusion"
    Settings = FusionSettings
    rates = RateTable(
        adamw=Rates(encoder=2e-4, decoder=1e-3, vision=2e-4),
        sgd=Rates(encoder=0.1, decoder=0.1, vision=0.1),
    )
    """Pfeiffer et al. take 5e-5 for a base that is twice as wide, in one place. Not tried here."""
    model_types = Houlsby.model_types
    starts_at_base = False

    def bases(self) -> dict[str, str]:
        """Return the fingerprint of each adapter's base.

        Raises:
            ModelError: an adapter cannot be read or fused, as in `place`.
        """
        return {part.name: part.exported.base_fingerprint for part in self._parts}

    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Put the adapters, and an attention over them, into each of their places.

        Raises:
            ModelError: `adapter-fusion`, there are fewer than two, or they are no bottleneck modules of one placement;
                `adapter-invalid`, one cannot be read; `adapter-unsupported`, the architecture is not in `model_types`.
        """
        from torch import nn

        # All adapters have the placement of the first one (`_parts`).
        chosen = places(transformer, self._parts[0].settings.placement)
        stacks = [nn.ModuleList(make_bottleneck(part.settings, place) for part in self._parts) for place in chosen]
        names = {id(module): name for name, module in transformer.base_model.named_modules()}
        # An export names its tensors by their place in the transformer, so the wanted ones are named in that way.
        for number, part in enumerate(self._parts):
            wanted = {
                f"{names[id(place.after)]}.bottleneck.{name}": value
                for place, stack in zip(chosen, stacks, strict=True)
                for name, value in stack[number].named_parameters()
            }
            found = {
                name.removeprefix(f"{transformer.base_model_prefix}."): value
                for name, value in part.tensors.items()
                if not name.startswith(tuple(f"{head}." for head in part.exported.heads))
            }
            fill(wanted, found)
        for place, stack in zip(chosen, stacks, strict=True):
            _insert(place, stack.requires_grad_(False))

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return the tensors of the fused adapters."""
        return {name: value for name, value in transformer.named_parameters() if ".fusion.bottlenecks." in name}

    def spec_settings(self) -> dict[str, Any]:
        """Return the adapters' settings in their order, without their names, which differ between machines."""
        return {"adapters": [part.settings.model_dump(mode="json", exclude=set(STARTS)) for part in self._parts]}

    def exported_settings(self) -> dict[str, Any]:
        """Return the settings with the adapters' folders inside the export."""
        inside = [f"{_FOLDER}/{number}" for number in range(len(self.settings.adapters))]
        return {**super().exported_settings(), "adapters": inside}

    def exported_in(self, folder: Path) -> Self:
        """Return this method with the adapters in the export. Their names in the settings are ignored, except how many.

        Raises:
            ModelError: `adapter-invalid`, a link leads out of the export.
        """
        home = folder.resolve() / _FOLDER
        inside = [home / str(number) for number in range(len(self.settings.adapters))]
        if any(place.resolve() != place for place in inside):
            raise ModelError(
                f"the adapters in {str(folder)!r} are links",
                "folders inside the export",
                "export the adapter again",
                code="adapter-invalid",
            )
        return type(self)(self.settings.model_copy(update={"adapters": tuple(map(str, inside))}))

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write the trained tensors, and copies of the fused adapters from the checked content."""
        super().save(transformer, folder, base_name)
        for number, part in enumerate(self._parts):
            target = folder / _FOLDER / str(number)
            Houlsby(part.settings).write(part.tensors, target)
            part.exported.write(target)

    @cached_property
    def _parts(self) -> tuple[_Part, ...]:
        """The adapters, read once and compared.

        Raises:
            ModelError: `adapter-fusion`, as in `place`; `adapter-missing`; `adapter-invalid`, one cannot be read.
        """
        if len(self.settings.adapters) < 2:
            raise _unfit("adapter.adapters names fewer than two")
        parts = tuple(map(_read, self.settings.adapters))
        if len({part.settings.placement for part in parts}) > 1:
            raise _unfit("the adapters differ in their placement")
        return parts


def _read(name: str) -> _Part:
    # Imported here, because that module imports all methods.
    from tsugiki.common.model.exported import find_export, read_exported

    folder = find_export(name, "adapter.adapters")
    exported = read_exported(folder)
    if exported.adapter["method"] != Houlsby.name:
        raise _unfit(f"the adapter {name!r} is of the method {exported.adapter['method']!r}")
    settings = HoulsbySettings.model_validate(exported.adapter)
    if settings.train_layer_norm:
        raise _unfit(f"the adapter {name!r} has layer norms of its own")
    tensors = read_tensors(folder / Houlsby.tensors_file)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    exported.check_spec(exported.spec_of(Houlsby(settings), shapes), folder)
    return _Part(name, exported, settings, tensors)


def _unfit(problem: str) -> ModelError:
    return ModelError(
        problem,
        "exports of two or more houlsby runs with one placement, without train_layer_norm",
        "set adapter.adapters to such folders",
        code="adapter-fusion",
    )


def _insert(place: Place, bottlenecks: Any) -> None:
    """Put an attention over frozen bottlenecks into a place, with the dtype and device of the projection."""
    from torch import nn

    weight = place.projection.weight
    hidden = place.projection.out_features
    fusion = nn.Module()
    for part in ("query", "key", "value"):
        matrix = nn.Linear(hidden, hidden, bias=False)
        if part == "value":
            nn.init.eye_(matrix.weight)
        else:
            nn.init.normal_(matrix.weight, std=_STD)
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
