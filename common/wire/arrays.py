"""What crosses the network, and the only code that touches received bytes.

An adapter travels as one flat array in the order of an `AdapterSpec`, because Flower sends every array as an object of
its own, each a round trip. Both sides build the spec from what they loaded themselves and compare its hash, so a reply
says nothing about shapes that has to be believed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import SpecError, WireError

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

Vector = npt.NDArray[np.float32]
"""All trainable numbers of an adapter in spec order; shape (size,)."""

ARRAY_KEY = "adapter"
FORMAT_VERSION = 1
_MAX_HEADER_BYTES = 256  # NumPy's header for a flat array takes 128


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor: its name, shape, and to what it belongs.

    That is the adapter, the task's head, or what is `merged`: exchanged with the rest, and trained by no site.
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
        tensors: in the order in which they are packed.
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
        raise SpecError(f"a vector of shape {vector.shape}", f"({spec.size},)")
    tensors, start = {}, 0
    for tensor in spec.tensors:
        tensors[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return tensors


def encode(vector: Vector, spec: AdapterSpec) -> ArrayRecord:
    """Return the vector as Flower's record, in the spec's wire type.

    Raises:
        WireError: `non-finite` after the cast (float16 ends at 65504).
    """
    from flwr.app import Array, ArrayRecord

    with np.errstate(over="ignore"):  # an overflow is found by the check below, with a better message
        cast = vector.astype(spec.wire_dtype)
    if not np.isfinite(cast).all():
        raise WireError(
            f"the vector holds values that are not finite in {spec.wire_dtype}",
            "finite values",
            'lower the learning rate, or set adapter.wire_dtype = "float32"',
            code="non-finite",
        )
    return ArrayRecord({ARRAY_KEY: Array(cast)})


def decode(record: ArrayRecord, spec: AdapterSpec) -> Vector:
    """Return a received vector as float32, shape (spec.size,).

    Everything is compared with the spec before a byte is interpreted: keys, declared type and shape, number of bytes,
    then the header inside the bytes. No pickle, and no allocation that the sender chooses.

    Raises:
        WireError: with the code `keys`, `dtype`, `shape`, `size`, `decode` or `non-finite`.
    """
    vector = _payload(record, np.dtype(spec.wire_dtype), spec.size).astype(np.float32)
    if not np.isfinite(vector).all():
        raise WireError("a value is NaN or infinite", "finite values", code="non-finite")
    return vector


def encode_levels(levels: npt.NDArray[np.int64], bits: int) -> ArrayRecord:
    """Return integers modulo 2^bits as Flower's record, bits / 8 bytes each, little endian.

    Args:
        levels: shape (size,); also unsigned integers below 2^bits, reinterpreted.
        bits: a multiple of 8, at most 64.
    """
    from flwr.app import Array, ArrayRecord

    wide = np.ascontiguousarray(levels, "<i8").view(np.uint8).reshape(-1, 8)
    return ArrayRecord({ARRAY_KEY: Array(np.ascontiguousarray(wide[:, : bits // 8]).reshape(-1))})


def decode_levels(record: ArrayRecord, size: int, bits: int) -> npt.NDArray[np.int64]:
    """Return received integers, shape (size,), each as the one of its class modulo 2^bits that is nearest to zero.

    Raises:
        WireError: as `decode`; every value that fits is allowed.
    """
    from tsugiki.common.privacy.secagg.primitives import ring_from_bytes, signed

    octets = _payload(record, np.dtype(np.uint8), size * (bits // 8))
    return signed(ring_from_bytes(octets.tobytes(), size, bits), bits)


def _payload(record: ArrayRecord, dtype: np.dtype[Any], size: int) -> npt.NDArray[Any]:
    """Return the one array of a record, shape (size,), after comparing everything about it with what was agreed."""
    if list(record) != [ARRAY_KEY]:
        raise WireError(f"{len(record)} arrays", f"one, named {ARRAY_KEY!r}", code="keys")
    array = record[ARRAY_KEY]
    if array.stype != "numpy.ndarray" or array.dtype != str(dtype):
        raise WireError("the declared type differs", str(dtype), code="dtype")
    if tuple(array.shape) != (size,):
        raise WireError(f"shape {tuple(array.shape)!r:.60}", f"({size},)", code="shape")
    payload = size * dtype.itemsize
    if not payload < len(array.data) <= payload + _MAX_HEADER_BYTES:
        raise WireError(f"{len(array.data)} bytes", f"{payload} and a header", code="size")
    start = _check_header(array.data, dtype, size)
    if len(array.data) - start != payload:
        raise WireError(f"{len(array.data) - start} bytes after the header", f"{payload}", code="size")
    return np.frombuffer(array.data, dtype, size, start)


def _check_header(data: bytes, dtype: np.dtype[Any], size: int) -> int:
    """Compare NumPy's header with what was agreed; return where the numbers start."""
    stream = io.BytesIO(data[: _MAX_HEADER_BYTES + 16])
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another format version")
        shape, fortran_order, found = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # NumPy raises many kinds here (ValueError, SyntaxError, tokenize's own)
        raise WireError("the bytes are no NumPy array", "format 1.0", code="decode") from error
    if found != dtype:
        raise WireError("the type inside the bytes differs", str(dtype), code="dtype")
    if shape != (size,) or fortran_order:
        raise WireError("the shape inside the bytes differs", f"({size},)", code="shape")
    return stream.tell()


def l2_norm(vector: npt.NDArray[Any]) -> float:
    """Return the Euclidean norm, summed in float64 and without BLAS, whose threads cost more than they save here."""
    return float(np.sqrt(np.square(vector, dtype=np.float64).sum()))


def sha256(vector: Vector) -> str:
    """Return the SHA-256 of a vector's bytes (little endian float32): the name by which adapters are compared."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").tobytes()).hexdigest()
