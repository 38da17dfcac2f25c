"""Find the pairs of LoRA's factors in an adapter; take a part out of an adapter, and put it back.

LoRA adds s * B A to a layer's weight, with A of shape (rank, in) and B of shape (out, rank). The product of the mean
factors is not the mean of the products, so some strategies work on the factors (`lora.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsugiki.common.adapters.base import TRAINED
from tsugiki.common.wire.spec import AdapterSpec, Vector, unpack

A = ".lora_A."
B = ".lora_B."
"""Parts of the tensors' names by which the two factors are recognised."""


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
            a = tensor.name.replace(B, A)  # the two names differ in this part only
            found.append(Pair(a if a in names else "", tensor.name))
    return found


def narrow(vector: Vector, spec: AdapterSpec, part: AdapterSpec) -> Vector:
    """Return a part of an adapter, shape (part.size,), from the whole adapter, shape (spec.size,)."""
    if part == spec:
        return vector
    tensors = unpack(vector, spec)
    return np.concatenate([tensors[tensor.name].ravel() for tensor in part.tensors])


def widen(vector: Vector, part: AdapterSpec, spec: AdapterSpec) -> Vector:
    """Return an update of the whole adapter, shape (spec.size,), from an update of a part; it is zero elsewhere."""
    if part == spec:
        return vector
    whole = np.zeros(spec.size, np.float32)
    tensors = unpack(whole, spec)
    for name, values in unpack(vector, part).items():
        tensors[name][:] = values
    return whole


def truncate(vector: Vector, spec: AdapterSpec, rank: int) -> Vector:
    """Return an adapter with only the first `rank` components of each pair, the others set to zero; 0: all of them.

    Where both factors of a component are zero, so are their gradients, so the component stays zero in training.
    """
    if not rank:
        return vector
    vector = vector.copy()
    tensors = unpack(vector, spec)
    for pair in pairs(spec):
        tensors[pair.a][rank:] = 0
        tensors[pair.b][:, rank:] = 0
    return vector
