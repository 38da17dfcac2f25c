"""LoRA's factors in an adapter: which tensors are a pair, and a part of an adapter taken out and put back.

A layer's weight gets s * B A, with A of shape (rank, in) and B of shape (out, rank). A mean of the factors is not the
factors of the mean, which is why some strategies look into an adapter (`lora.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsugiki.common.adapters.base import TRAINED
from tsugiki.common.wire.spec import AdapterSpec, Vector, unpack

A = ".lora_A."
B = ".lora_B."
"""What the names of the two factors have in them."""


@dataclass(frozen=True)
class Pair:
    """The names of a layer's two factors in a spec; `a` is empty where A is frozen and not exchanged."""

    a: str
    b: str


def pairs(spec: AdapterSpec, which: str = TRAINED) -> list[Pair]:
    """Return the LoRA pairs of a spec, in its order: one for each adapted layer."""
    names = {tensor.name for tensor in spec.tensors}
    found = []
    for tensor in spec.tensors:
        if B in tensor.name and f"{B}{which}." in tensor.name:
            a = tensor.name.replace(B, A)
            found.append(Pair(a if a in names else "", tensor.name))
    return found


def narrow(vector: Vector, spec: AdapterSpec, part: AdapterSpec) -> Vector:
    """Return the numbers of a part of an adapter, shape (part.size,), from those of the whole, shape (spec.size,)."""
    if part == spec:
        return vector
    tensors = unpack(vector, spec)
    return np.concatenate([tensors[tensor.name].ravel() for tensor in part.tensors])


def widen(vector: Vector, part: AdapterSpec, spec: AdapterSpec) -> Vector:
    """Return an update of the whole adapter, shape (spec.size,), from one of a part: zero elsewhere."""
    if part == spec:
        return vector
    whole = np.zeros(spec.size, np.float32)
    tensors = unpack(whole, spec)
    for name, values in unpack(vector, part).items():
        tensors[name][:] = values
    return whole


def truncate(vector: Vector, spec: AdapterSpec, rank: int) -> Vector:
    """Return an adapter of which only the first `rank` components are left in each pair; 0: all of them.

    Where both factors of a component are zero, so are their gradients: it stays zero in training.
    """
    if not rank:
        return vector
    vector = vector.copy()
    tensors = unpack(vector, spec)
    for pair in pairs(spec):
        tensors[pair.a][rank:] = 0
        tensors[pair.b][:, rank:] = 0
    return vector
