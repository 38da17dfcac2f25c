"""Encode a vector for Flower and decode it: the only code that interprets received bytes.

An adapter travels as one flat array in the order of an `AdapterSpec`, because Flower sends every array as a separate
object, with a round trip for each.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import WireError
from tsugiki.common.wire.spec import AdapterSpec, Vector, blocks, is_finite

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

ARRAY_KEY = "adapter"

_MAX_HEADER_BYTES = 256  # NumPy's header for a flat array takes 128


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return the array records of a message's content by name.

    `content.array_records` would return a view that refers to itself, and with which the arrays stay in memory until
    Python looks for such circles.
    """
    from flwr.app import ArrayRecord

    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def packed(vector: Vector) -> Vector:
    """Return a copy of a vector in the memory in which it travels: see `packed_blocks`."""
    return packed_blocks(len(vector), lambda part: vector[part])


def packed_blocks(size: int, block_of: Callable[[slice], npt.NDArray[Any]]) -> Vector:
    """Return a vector whose memory is the bytes that travel as float32: `encode` copies nothing of it.

    Args:
        size: of the vector.
        block_of: returns the numbers of a slice; slices come in order.

    Returns:
        Shape (size,), float32. It cannot be written to.
    """
    header = _header(np.dtype("<f4"), size)
    stream = io.BytesIO()
    # the last byte first, so that all of the memory is taken at once and never moved
    stream.seek(len(header) + 4 * size - 1)
    stream.write(bytes(1))
    stream.seek(0)
    stream.write(header)
    for part in blocks(size):
        stream.write(np.ascontiguousarray(block_of(part), "<f4").data)
    return np.frombuffer(stream.getvalue(), "<f4", size, len(header))


def _header(dtype: np.dtype[Any], size: int) -> bytes:
    """Return NumPy's header of a flat array."""
    stream = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _bytes_of(vector: Vector) -> bytes | None:
    """Return the bytes that a vector was packed into; None if it was not."""
    content: object = vector.base
    if not isinstance(content, bytes):
        return None
    header = _header(vector.dtype, vector.size)
    offset = vector.ctypes.data - np.frombuffer(content, np.uint8).ctypes.data
    if (offset, len(content)) != (len(header), len(header) + vector.nbytes) or not content.startswith(header):
        return None
    return content


def encode(vector: Vector, spec: AdapterSpec) -> ArrayRecord:
    """Return the vector as Flower's record, in the spec's wire type.

    Raises:
        WireError: `non-finite` after the cast (float16 ends at 65504).
    """
    from flwr.app import Array, ArrayRecord

    with np.errstate(over="ignore"):  # an overflow is found by the check below, with a better message
        cast = vector.astype(spec.wire_dtype, copy=False)
    if not is_finite(cast):
        raise WireError(
            f"the vector holds values that are not finite in {spec.wire_dtype}",
            "finite values",
            'lower the learning rate, or set adapter.wire_dtype = "float32"',
            code="non-finite",
        )
    content = _bytes_of(cast)
    if content is not None:
        return ArrayRecord({ARRAY_KEY: Array(str(cast.dtype), cast.shape, "numpy.ndarray", content)})
    return ArrayRecord({ARRAY_KEY: Array(cast)})


def decode(record: ArrayRecord, spec: AdapterSpec, *, copy: bool = True) -> Vector:
    """Return a received vector as float32, shape (spec.size,).

    Everything is compared with the spec before a byte is interpreted: keys, declared type and shape, number of bytes,
    then the header inside the bytes. No pickle is read, and the sender does not choose how much memory is allocated.

    Args:
        record: of the message.
        spec: that was agreed.
        copy: if false, what travelled as float32 is returned as it is in the message: it cannot be written to.

    Raises:
        WireError: with the code `keys`, `dtype`, `shape`, `size`, `decode` or `non-finite`.
    """
    vector = _payload(record, np.dtype(spec.wire_dtype), spec.size).astype(np.float32, copy=copy)
    if not is_finite(vector):
        raise WireError("a value is NaN or infinite", "finite values", code="non-finite")
    return vector


def encode_numbers(numbers: npt.NDArray[np.float64]) -> ArrayRecord:
    """Return numbers of shape (size,) as Flower's record, as float64.

    Raises:
        WireError: `non-finite`.
    """
    from flwr.app import Array, ArrayRecord

    if not np.isfinite(numbers).all():
        raise WireError("the numbers are not finite", "finite values", code="non-finite")
    return ArrayRecord({ARRAY_KEY: Array(np.ascontiguousarray(numbers, np.float64))})


def decode_numbers(record: ArrayRecord, size: int) -> npt.NDArray[np.float64]:
    """Return received float64 numbers, shape (size,).

    Raises:
        WireError: as `decode`.
    """
    numbers = _payload(record, np.dtype(np.float64), size)
    if not np.isfinite(numbers).all():
        raise WireError("a value is NaN or infinite", "finite values", code="non-finite")
    return numbers


def encode_levels(levels: npt.NDArray[np.int64], bits: int) -> ArrayRecord:
    """Return integers modulo 2^bits as Flower's record, bits / 8 bytes each, little endian.

    Args:
        levels: shape (size,); also unsigned integers below 2^bits, reinterpreted.
        bits: a multiple of 8, at most 64.
    """
    from flwr.app import Array, ArrayRecord

    # Of an integer's 8 bytes, the low ones come first; modulo 2^bits, the high ones do not matter.
    wide = np.ascontiguousarray(levels, "<i8").view(np.uint8).reshape(-1, 8)
    return ArrayRecord({ARRAY_KEY: Array(np.ascontiguousarray(wide[:, : bits // 8]).reshape(-1))})


@dataclass(frozen=True)
class PackedLevels:
    """Received integers modulo 2^bits, as they travel. They are unpacked block by block, where they are used.

    Args:
        octets: bits / 8 bytes for each integer, little endian; shape (size * bits / 8,).
        bits: a multiple of 8, at most 64.
    """

    octets: npt.NDArray[np.uint8]
    bits: int

    @property
    def size(self) -> int:
        """How many integers there are."""
        return len(self.octets) * 8 // self.bits

    def block(self, part: slice) -> npt.NDArray[Any]:
        """Return the integers of a slice with a start and a stop, each as its representative nearest to zero.

        Returns:
            Of type int32 where the modulus allows it, else int64; shape (stop - start,).
        """
        width = self.bits // 8
        word = np.dtype("<i4") if width <= 4 else np.dtype("<i8")
        octets = self.octets[part.start * width : part.stop * width]
        # each integer is read as a whole word from its offset, so the last one needs more bytes after it
        padded = octets.tobytes() + bytes(word.itemsize - width)
        words = np.ndarray((part.stop - part.start,), word, padded, strides=(width,))
        shift = 8 * word.itemsize - self.bits
        return (words << shift) >> shift  # drops the bytes of the next integer; the second shift extends the sign

    def unpacked(self) -> npt.NDArray[np.int64]:
        """Return all integers, shape (size,)."""
        return self.block(slice(0, self.size)).astype(np.int64)

    def l2_norm(self) -> float:
        """Return the Euclidean norm of the integers, summed in float64."""
        squares = (np.square(self.block(part), dtype=np.float64).sum() for part in blocks(self.size))
        return math.sqrt(sum(map(float, squares)))


def decode_levels(record: ArrayRecord, size: int, bits: int) -> PackedLevels:
    """Return received integers modulo 2^bits, still packed. They share the memory of the message.

    Args:
        record: of the message.
        size: how many integers were agreed.
        bits: of the modulus that was agreed.

    Raises:
        WireError: as `decode`; every value that fits is allowed.
    """
    return PackedLevels(_payload(record, np.dtype(np.uint8), size * (bits // 8)), bits)


def _payload(record: ArrayRecord, dtype: np.dtype[Any], size: int) -> npt.NDArray[Any]:
    """Return the one array of a record, shape (size,), after comparing everything about it with what was agreed."""
    if list(record) != [ARRAY_KEY]:
        raise WireError(f"the record has {len(record)} arrays", f"one, named {ARRAY_KEY!r}", code="keys")
    array = record[ARRAY_KEY]
    if array.stype != "numpy.ndarray" or array.dtype != str(dtype):
        raise WireError("the declared type differs", str(dtype), code="dtype")
    if tuple(array.shape) != (size,):
        raise WireError(f"the declared shape is {tuple(array.shape)!r:.60}", f"({size},)", code="shape")
    payload = size * dtype.itemsize
    if not payload < len(array.data) <= payload + _MAX_HEADER_BYTES:
        raise WireError(f"the array has {len(array.data)} bytes", f"{payload} and a header", code="size")
    start = _check_header(array.data, dtype, size)
    if len(array.data) - start != payload:
        raise WireError(f"{len(array.data) - start} bytes follow the header", f"{payload}", code="size")
    return np.frombuffer(array.data, dtype, size, start)


def _check_header(data: bytes, dtype: np.dtype[Any], size: int) -> int:
    """Compare NumPy's header with what was agreed, and return the offset of the first number."""
    stream = io.BytesIO(data[: _MAX_HEADER_BYTES + 16])
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another format version")
        shape, fortran_order, found = np.lib.format.read_array_header_1_0(stream, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # NumPy raises many kinds here (ValueError, SyntaxError, tokenize's own)
        raise WireError("the bytes are no NumPy array", "NumPy's format 1.0", code="decode") from error
    if found != dtype:
        raise WireError("the type inside the bytes differs", str(dtype), code="dtype")
    if shape != (size,) or fortran_order:
        raise WireError("the shape inside the bytes differs", f"({size},)", code="shape")
    return stream.tell()
