"""The fingerprint of a frozen base: client and server compare it, and so does the loader of an export."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tsugiki.common.errors import ModelError

if TYPE_CHECKING:
    from tsugiki.common.tasks.base import Base  # tasks read fingerprints


def fingerprint(folder: Path, base: Base) -> str:
    """Return the SHA-256 over the backbone's tensors as the checkpoint stores them, sorted by name.

    Heads are left out (they are random or trained). So is the prefix that a model with a head puts before the
    backbone's names: a backbone has the same fingerprint with and without a head.

    Raises:
        ModelError: no tensor of the checkpoint belongs to the backbone.
    """
    from safetensors import safe_open

    backbone = getattr(base.transformer, "base_model", base.transformer)
    heads = tuple(f"{head}." for head in base.heads)  # a bare transformer can have a head too
    named = (*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False))
    wanted = {name for name, _ in named if not name.startswith(heads)}
    wanted &= set(backbone.state_dict())  # drops buffers that are not saved; names of 4-bit state are not added
    prefix = f"{getattr(base.transformer, 'base_model_prefix', '')}."
    stored_as: dict[str, tuple[Path, str]] = {}
    whole = folder / "model.safetensors"  # transformers loads no other file if this one exists
    for file in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                stored_as[stored.removeprefix(prefix)] = (file, stored)
    found = {name: place for name, place in stored_as.items() if name in wanted}
    if not found:
        raise ModelError(f"no tensor in {folder.name} belongs to the backbone", "a checkpoint of this architecture")
    if wanted - found.keys():
        # The checkpoint has older names, which transformers translates (ViT's): then all its backbone tensors count.
        prefixed = any(stored.startswith(prefix) for _, stored in stored_as.values())
        found |= {name: place for name, place in stored_as.items() if not prefixed or place[1].startswith(prefix)}
    digest = hashlib.sha256()
    for name in sorted(found):
        file, stored = found[name]
        dtype, shape, content = _stored_tensor(file, stored)
        digest.update(json.dumps([name, dtype, shape, len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()


def check_base(found: str, wanted: str, name: str) -> None:
    """Refuse a base that is not the one on which an adapter was trained.

    Args:
        found: the fingerprint of the base that was loaded.
        wanted: the fingerprint of the base that the adapter was trained on.
        name: the name of the adapter, for the error.

    Raises:
        ModelError: `adapter-other-base`.
    """
    if found != wanted:
        raise ModelError(
            f"the base that was loaded has the fingerprint {found[:12]}",
            f"{wanted[:12]}, of the base on which the adapter {name!r} was trained",
            "load that base, or an adapter of this one",
            code="adapter-other-base",
        )


def _stored_tensor(file: Path, name: str) -> tuple[str, list[int], bytes]:
    """Return type, shape and raw bytes of a tensor in a safetensors file, whatever its type (NumPy has no bfloat16)."""
    content = np.memmap(file, np.uint8, "r")
    header_bytes = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + header_bytes].tobytes())[name]
    start, stop = (8 + header_bytes + offset for offset in header["data_offsets"])
    return header["dtype"], header["shape"], content[start:stop].tobytes()
