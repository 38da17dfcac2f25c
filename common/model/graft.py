"""A base model with an adapter on it: read and write the adapter, switch it off, train a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tsugiki.common.adapters import AdapterMethod
from tsugiki.common.tasks import Task
from tsugiki.common.tasks.base import Base
from tsugiki.common.wire.arrays import packed
from tsugiki.common.wire.spec import AdapterSpec, Vector, pack, unpack


@dataclass
class Graft:
    """A base model with an adapter on it. Each process has one, and its users share it in turn."""

    task: Task
    method: AdapterMethod
    base: Base
    spec: AdapterSpec
    device: Any

    def __post_init__(self) -> None:
        """Keep the initial values before anything trains the graft."""
        self.initial = packed(self.read())

    def forget_initial(self) -> None:
        """Free the memory of the initial values, as much as an adapter takes. Nothing may ask for them afterwards."""
        del self.initial

    @cached_property
    def parameters(self) -> list[Any]:
        """The trainable parameters in spec order."""
        named = dict(self.base.transformer.named_parameters())
        return [named[tensor.name] for tensor in self.spec.tensors]

    def read(self) -> Vector:
        """Return a copy of all trainable numbers, shape (spec.size,)."""
        values = zip(self.spec.tensors, self.parameters, strict=True)
        return pack({tensor.name: value.detach().float().cpu().numpy() for tensor, value in values}, self.spec)

    def write(self, vector: Vector) -> None:
        """Set all trainable numbers from a vector of shape (spec.size,)."""
        import torch

        tensors = unpack(vector, self.spec)
        with torch.no_grad():
            for tensor, value in zip(self.spec.tensors, self.parameters, strict=True):
                value.copy_(torch.from_numpy(np.array(tensors[tensor.name])))

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Switch the adapter off inside a `with` block: the base model's own outputs come back."""
        with self.base.adapter_disabled():
            yield

    @contextmanager
    def training_only(self, part: AdapterSpec) -> Iterator[None]:
        """Freeze all but a part of the adapter inside a `with` block."""
        trained = {tensor.name for tensor in part.tensors}
        named = zip(self.spec.tensors, self.parameters, strict=True)
        held = [value for tensor, value in named if tensor.name not in trained]
        try:
            for value in held:
                value.requires_grad_(False)
            yield
        finally:
            for value in held:
                value.requires_grad_(True)
