"""Exported adapters for tests, without a run before them: put on a tiny base, moved a little, saved."""

from pathlib import Path
from typing import Any

import torch

from common.config import parse
from common.exported import write_exported
from common.model import load_graft
from common.tasks.base import TinyCase


def export_of(base: Path, folder: Path, task: dict[str, Any], step: float = 0.1, **adapter: Any) -> Path:
    """Write an adapter whose values were drawn at random, and those of its head; return its folder.

    Args:
        base: the folder of its base.
        folder: made if it is not there.
        task: its name and settings.
        step: standard deviation of the draws.
        adapter: method and settings; by default a small LoRA.
    """
    sections = {"model": {"name": str(base)}, "task": task, "adapter": adapter or {"method": "lora", "rank": 2}}
    graft = load_graft(parse({**sections, "train": {"device": "cpu"}}), str(base), 1)
    numbers = torch.Generator().manual_seed(5)
    graft.write(step * torch.randn(graft.spec.size, generator=numbers).numpy())
    folder.mkdir(parents=True, exist_ok=True)
    graft.method.save(graft.base.transformer, folder, "tsugiki-tests/tiny")
    write_exported(folder, graft, "float32", "tsugiki-tests/tiny")
    return folder


def settings_of(case: TinyCase, base: Path) -> dict[str, Any]:
    """Return a case's settings, with the exports that they name written beside the base, once."""
    found = dict(case.settings)
    for setting, task in case.exports.items():
        folder = base.parent / f"{base.name}-{setting}"
        found[setting] = str(folder if folder.exists() else export_of(base, folder, task))
    return found
