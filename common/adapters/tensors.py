"""The tensors of a saved adapter: read from their file, and set only if they are all there and no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ModelError


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ModelError: `adapter-invalid`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"no tensors can be read from {path.name} of the adapter in {str(path.parent)!r}",
            "a whole safetensors file",
            "export the adapter again",
            code="adapter-invalid",
        ) from error


def fill(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Set each of the tensors `wanted` to the one of its name in `found`, after comparing all names and shapes.

    Libraries' own loads leave at chance what a file lacks, and drop what they do not know.

    Raises:
        ModelError: `adapter-invalid`, naming the first tensor that is missing, extra or of another shape; nothing was
            set then.
    """
    import torch

    for name in sorted(wanted.keys() | found.keys()):
        has, takes = (f"shape {tuple(group[name].shape)}" if name in group else "none" for group in (found, wanted))
        if has != takes:
            raise ModelError(
                f"the adapter's tensor {name!r}: {has}",
                f"{takes} on this base",
                "load the base, and the class of model, with which the adapter was trained",
                code="adapter-invalid",
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
