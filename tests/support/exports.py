"""Exported adapters on a tiny base, moved from their first values as training would; what is fused needs some."""

from pathlib import Path
from typing import Any

import torch

from tests.support.architectures import stir
from tsugiki.common.adapters import AdapterMethod
from tsugiki.common.config.parse import parse
from tsugiki.common.model.exported import Exported, load_exported, write_exported
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import TinyCase

BASE_NAME = "tsugiki-tests/base"

_NO_FILES = "0" * 64
"""In the place of a fingerprint, for transformers that were not loaded from files."""


def export_tiny(folder: Path, base: Path, task: dict[str, Any], adapter: dict[str, Any], seed: int = 1) -> Graft:
    """Write an export of an adapter on a base, as `tsugiki export` does but unproved; return its graft.

    Args:
        folder: made; holds the export.
        base: folder of the base.
        task: settings of the task.
        adapter: settings of the adapter.
        seed: for its values.
    """
    sections = {"task": task, "adapter": adapter, "train": {"device": "cpu"}}
    graft = load_graft(parse({"model": {"name": str(base)}, **sections}), str(base), seed)
    stir(graft.base.transformer)
    _write(folder, graft)
    return graft


def export_of(base: Path, folder: Path, task: dict[str, Any], step: float = 0.1, **adapter: Any) -> Path:
    """Write an adapter whose values were drawn at random, and those of its head; return its folder.

    Args:
        base: the folder of its base.
        folder: made if it is not there.
        task: its name and settings.
        step: standard deviation of the draws.
        adapter: method and settings; by default a small LoRA.
    """
    sections = {"task": task, "adapter": adapter or {"method": "lora", "rank": 2}, "train": {"device": "cpu"}}
    graft = load_graft(parse({"model": {"name": str(base)}, **sections}), str(base), 1)
    numbers = torch.Generator().manual_seed(5)
    graft.write(step * torch.randn(graft.spec.size, generator=numbers).numpy())
    _write(folder, graft)
    return folder


def _write(folder: Path, graft: Graft) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    graft.method.save(graft.base.transformer, folder, BASE_NAME)
    write_exported(folder, graft, "float32", BASE_NAME)


def save_alone(method: AdapterMethod, transformer: Any, folder: Path) -> None:
    """Write an export of an adapter of our own on a transformer without a run, and without files of a base."""
    method.save(transformer, folder, BASE_NAME)
    said = {
        "task": {"name": "sequence-classification"},
        "adapter": method.exported_settings(),
        "heads": transformer.adapter_heads,
        "base_name": BASE_NAME,
        "base_fingerprint": _NO_FILES,
        "dtype": "float32",
        "spec_sha256": _NO_FILES,
    }
    Exported.model_validate(said).write(folder)


def load_alone(transformer: Any, folder: Path) -> Any:
    """Put what `save_alone` wrote on a fresh transformer."""
    return load_exported(folder, transformer, fingerprint=_NO_FILES)


def settings_of(case: TinyCase, base: Path) -> dict[str, Any]:
    """Return a case's settings, with the exports that they name written beside the base, once."""
    found = dict(case.settings)
    for setting, task in case.exports.items():
        folder = base.parent / f"{base.name}-{setting}"
        found[setting] = str(folder if folder.exists() else export_of(base, folder, task))
    return found


def to_fuse(folder: Path, base: Path, **settings: Any) -> tuple[str, ...]:
    """Write two exported Houlsby adapters, of different values and widths; return their folders."""
    for number, width in enumerate((3, 4)):
        adapter = {"method": "houlsby", "bottleneck": width, **settings}
        graft = export_tiny(folder / str(number), base, {"name": "sequence-classification"}, adapter, number)
        assert graft.spec.parameters("adapter")
    return tuple(str(folder / str(number)) for number in range(2))
