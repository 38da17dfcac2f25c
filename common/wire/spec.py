"""The manifest of an adapter, which says what is exchanged in which order, and an adapter's numbers as one vector.

Both sides build the spec from the model that they loaded themselves, and compare its hash. So neither has to trust the
other about shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import SpecError

Vector = npt.NDArray[np.float32]
"""All trainable numbers of an adapter in spec order; shape (size,)."""

FORMAT_VERSION = 1

BLOCK = 65_536
"""How many numbers are worked on at once. In float64 a block takes 512 KiB, which fits a processor's cache."""


@dataclass(frozen=True)
class TensorSpec:
    """One exchanged tensor: its name, its shape, and the part that it belongs to.

    Sites train the adapter and the task's head. A `merged` tensor is exchanged with the rest, but no site trains it.
    """

    name: str
    shape: tuple[int, ...]
    part: Literal["adapter", "head", "merged"]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterSpec:
    """The manifest of an adapter: what is exchanged, in which order, for which base.

    Args:
        task: name of the task.
        method: name of the adapter method.
        settings: the method's settings, as sorted JSON.
        base_fingerprint: SHA-256 of the frozen base (`common/model/fingerprint.py`).
        wire_dtype: the type of the numbers that travel.
        tensors: all exchanged tensors, in the order in which they are packed.
    """

    task: str
    method: str
    settings: str
    base_fingerprint: str
    wire_dtype: Literal["float32", "float16"]
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def size(self) -> int:
        """Number of elements of the packed vector."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of the packed vector as it travels."""
        return self.size * np.dtype(self.wire_dtype).itemsize

    def parameters(self, part: Literal["adapter", "head"]) -> int:
        """Number of elements that belong to the adapter, or to the head."""
        return sum(tensor.size for tensor in self.tensors if tensor.part == part)

    @cached_property
    def sha256(self) -> str:
        """Hash over everything above; two sides with the same hash may exchange vectors."""
        body = json.dumps([FORMAT_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()


def pack(tensors: Mapping[str, npt.NDArray[np.float32]], spec: AdapterSpec) -> Vector:
    """Return the named tensors as one vector in spec order.

    Raises:
        SpecError: a name is missing or extra, or a shape differs.
    """
    expected = {tensor.name for tensor in spec.tensors}
    if set(tensors) != expected:
        first = min(set(tensors) ^ expected)
        raise SpecError(f"tensor {first!r} is {'missing' if first in expected else 'not part of the spec'}")
    for tensor in spec.tensors:
        if tensors[tensor.name].shape != tensor.shape:
            raise SpecError(f"tensor {tensor.name!r} has shape {tensors[tensor.name].shape}", f"{tensor.shape}")
    return np.concatenate([tensors[tensor.name].ravel() for tensor in spec.tensors]).astype(np.float32, copy=False)


def unpack(vector: Vector, spec: AdapterSpec) -> dict[str, npt.NDArray[np.float32]]:
    """Return views into `vector`, one for each tensor of the spec.

    Raises:
        SpecError: the vector has another length.
    """
    if vector.shape != (spec.size,):
        raise SpecError(f"the vector has the shape {vector.shape}", f"({spec.size},)")
    tensors = {}
    start = 0
    for tensor in spec.tensors:
        tensors[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return tensors


def blocks(size: int, length: int = BLOCK) -> Iterator[slice]:
    """Yield the slices of at most `length` numbers that together cover a vector of `size` numbers, in order."""
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def l2_norm(vector: npt.NDArray[Any]) -> float:
    """Return the Euclidean norm, summed in float64 and without BLAS, whose threads cost more than they save here.

    It works in blocks, because the squares of a large vector in float64 would take twice its memory.
    """
    flat = vector.reshape(-1)
    return math.sqrt(sum(float(np.square(flat[part], dtype=np.float64).sum()) for part in blocks(flat.size)))


def is_finite(vector: npt.NDArray[Any]) -> bool:
    """Return whether no number of a vector is NaN or infinite."""
    return all(bool(np.isfinite(vector[part]).all()) for part in blocks(vector.size))


def sha256(vector: Vector) -> str:
    """Return the SHA-256 of a vector's bytes (little endian float32), by which adapters are compared."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").data).hexdigest()
