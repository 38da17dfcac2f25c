"""Read the files of a saved adapter, which may come from elsewhere, and set its tensors."""

from __future__ import annotations

import errno
import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsugiki.common.errors import ModelError

MANIFEST_LIMIT_BYTES = 16 * 2**20
"""Far more than a manifest needs, and small enough for memory."""


def read_manifest(path: Path) -> bytes:
    """Return the content of a small file of an export.

    Raises:
        OSError: the file is missing; is a link, which may lead anywhere on this machine; is no regular file, because
            others may never end; or is larger than `MANIFEST_LIMIT_BYTES`.
    """
    if _regular_bytes(path) > MANIFEST_LIMIT_BYTES:
        raise OSError(errno.EFBIG, f"more than {MANIFEST_LIMIT_BYTES // 2**20} MiB", str(path))
    return path.read_bytes()


def _regular_bytes(path: Path) -> int:
    """Return the size of a file in bytes; refuse links, devices and pipes."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a link, or no regular file", str(path))
    return found.st_size


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ModelError: `adapter-invalid`, the file cannot be read, is a link, or is no regular file.
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
    """Set each tensor in `wanted` to the tensor of the same name in `found`, after comparing all names and shapes.

    The libraries' own loaders leave missing tensors at their random values, and ignore unknown ones.

    Raises:
        ModelError: `adapter-invalid`, a tensor is missing, extra or of another shape; the error names the first one,
            and nothing was set.
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
    """Return the SHA-256 over `start` and the names and float32 values of tensors, sorted by name."""
    digest = hashlib.sha256(start)
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
