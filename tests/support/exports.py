"""Exported adapters on a tiny base, moved from their first values as training would; what is fused needs some."""

from pathlib import Path
from typing import Any

from common.config import parse
from common.exported import write_exported
from common.model import Graft, load_graft
from tests.support.architectures import stir

BASE_NAME = "tsugiki-tests/base"


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
    folder.mkdir(parents=True, exist_ok=True)
    graft.method.save(graft.base.transformer, folder, BASE_NAME)
    write_exported(folder, graft, "float32", BASE_NAME)
    return graft


def to_fuse(folder: Path, base: Path, **settings: Any) -> tuple[str, ...]:
    """Write two exported Houlsby adapters, of different values and widths; return their folders."""
    for number, width in enumerate((3, 4)):
        adapter = {"method": "houlsby", "bottleneck": width, **settings}
        graft = export_tiny(folder / str(number), base, {"name": "sequence-classification"}, adapter, number)
        assert graft.spec.parameters("adapter")
    return tuple(str(folder / str(number)) for number in range(2))
