"""Integers modulo 2^bits, in which a secure sum is taken, and their bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import SecureAggregationError

Ring = npt.NDArray[np.uint64]
"""Integers modulo 2^bits; shape (size,)."""


def width(bits: int) -> int:
    """Return the bytes of a ring element.

    Raises:
        ValueError: `bits` is not 8, 16, ... or 64. Other moduli would need rejection to be uniform.
    """
    if bits not in range(8, 65, 8):
        raise ValueError(f"a modulus of 2^{bits}, expected 8, 16, ... or 64 bits")
    return bits // 8


def reduce(vector: npt.NDArray[np.int64] | Ring, bits: int) -> Ring:
    """Return integers modulo 2^bits, shape (size,), as a copy; -1 becomes 2^bits - 1.

    Raises:
        ValueError: the vector has another shape or type.
    """
    if vector.ndim != 1 or vector.dtype not in (np.int64, np.uint64):
        raise ValueError(f"a vector of {vector.dtype} with shape {vector.shape}, expected int64 or uint64, (size,)")
    return np.bitwise_and(vector.view(np.uint64), _top(bits))


def signed(vector: Ring, bits: int) -> npt.NDArray[np.int64]:
    """Return ring elements as integers, each as its representative nearest to zero, shape (size,)."""
    return (vector << np.uint64(64 - bits)).view(np.int64) >> (64 - bits)  # the second shift extends the sign


def ring_from_bytes(data: bytes, size: int, bits: int) -> Ring:
    """Return `size` ring elements, shape (size,), from bits / 8 bytes each, little endian.

    Raises:
        SecureAggregationError: `secagg-message`, if there are more or fewer bytes.
    """
    if len(data) != size * width(bits):
        raise SecureAggregationError(
            f"a masked vector has {len(data)} bytes", f"{size * width(bits)} bytes", code="secagg-message"
        )
    # Each element is read as 8 bytes from its offset, then cut: four times as fast as copying byte by byte.
    unaligned: Ring = np.ndarray((size,), "<u8", data + bytes(8 - width(bits)), strides=(width(bits),))
    return np.bitwise_and(unaligned, _top(bits))


def _top(bits: int) -> np.uint64:
    """Return the largest ring element."""
    return np.uint64(256 ** width(bits) - 1)
