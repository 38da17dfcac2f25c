"""The files of a saved adapter, which may come from elsewhere; its tensors are set if all are there and no others."""

from __future__ import annotations

import errno
import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsugiki.common.errors import ModelError

MANIFEST_LIMIT_BYTES = 16 * 2**20
"""Many times what a manifest needs, and no burden on memory."""


def read_manifest(path: Path) -> bytes:
    """Return what stands in a small file of an export.

    Raises:
        OSError: it is not there, is a link, which may lead anywhere on this machine, is no regular file, of which some
            never end, or has more than `MANIFEST_LIMIT_BYTES`.
    """
    if _regular_bytes(path) > MANIFEST_LIMIT_BYTES:
        raise OSError(errno.EFBIG, f"more than {MANIFEST_LIMIT_BYTES // 2**20} MiB", str(path))
    return path.read_bytes()


def _regular_bytes(path: Path) -> int:
    """Return the size of a file that is neither a link nor a device or pipe."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a link, or no regular file", str(path))
    return found.st_size


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ModelError: `adapter-invalid`, also for a link and for what is no regular file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        _regular_bytes(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"no tensors can be read from {path.name} of the adapter in {str(path.parent)!r}",
            "a whole safetensors file, and no link to one",
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
        has, takes = (f"shape {tuple(group[name].shape)}" if name in group else "nothing" for group in (found, wanted))
        if has != takes:
            raise ModelError(
                f"the adapter has {has} for the tensor {name!r}",
                f"{takes} on this base",
                "load the base, and the class of model, with which the adapter was trained",
                code="adapter-invalid",
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def tensors_sha256(tensors: Mapping[str, Any], start: bytes = b"") -> str:
    """Return the SHA-256 over `start`, and names and float32 values of tensors, in the order of their names."""
    digest = hashlib.sha256(start)
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
