"""The last layer of a model's head, if it is one linear layer from features to classes, and its initial values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tsugiki.common.head_sums import MOST_NUMBERS, MOST_WIDTH, ClosedFormHead, numbers_of
from tsugiki.common.settings import HeadedSettings
from tsugiki.common.wire.arrays import packed
from tsugiki.common.wire.spec import Vector, unpack

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
    from tsugiki.common.model.graft import Graft


@dataclass(frozen=True)
class LinearHead:
    """A head that is one linear layer, and so has a solution in closed form.

    Args:
        name: of the layer in the transformer.
        layer: the `nn.Linear`.
        width: number of its features.
        classes: number of its outputs.
        bias: whether it has a bias.
    """

    name: str
    layer: Any
    width: int
    classes: int
    bias: bool

    @property
    def numbers(self) -> int:
        """How many numbers a site sends."""
        return numbers_of(self.width, self.classes)


def linear_head(graft: Graft) -> LinearHead | None:
    """Return the head if all of it is one linear layer to the task's classes, else None.

    Further trained layers before it would have random values, and so would the features that it reads.
    """
    from torch import nn

    tensors = {tensor.name for tensor in graft.spec.tensors if tensor.part == "head"}
    layers = {name.rpartition(".")[0] for name in tensors}
    if len(layers) != 1 or not graft.task.labels:
        return None
    name = layers.pop()
    layer = graft.base.transformer.get_submodule(name)
    if not isinstance(layer, nn.Linear) or layer.out_features != len(graft.task.labels):
        return None
    return LinearHead(name, layer, layer.in_features, layer.out_features, f"{name}.bias" in tensors)


def _ruled_out_by(config: RunConfig) -> str:
    """Return why the run itself cannot compute a head; empty: it can, if its model has such a head."""
    if config.privacy.mode != "none" or config.privacy.examples.enabled:
        return "the run is private, and the sums of features would have no noise"
    if config.adapter.start_sha256:
        return "the run starts from an exported adapter, and keeps its head"
    return ""


def warm_head_of(graft: Graft, config: RunConfig) -> LinearHead | str:
    """Return the head that a run computes before round 1, or the reason why it computes none.

    The reason is empty if nobody would expect such a head: it is off, or the task has no classes.
    """
    settings = config.task
    if not isinstance(settings, HeadedSettings) or settings.warm_head == "off":
        return ""
    reason = _ruled_out_by(config)
    if reason:
        return reason
    head = linear_head(graft)
    if head is None:
        return "this model's head is not one linear layer"
    if head.width > MOST_WIDTH or head.numbers > MOST_NUMBERS:
        return f"{head.width} features and {head.classes} classes are too many"
    return head


def with_head(vector: Vector, graft: Graft, head: LinearHead, values: ClosedFormHead) -> Vector:
    """Return a copy of an adapter's vector, shape (spec.size,), with new values of the head."""
    changed = np.array(vector)
    tensors = unpack(changed, graft.spec)  # views: what is written there is in the copy
    tensors[f"{head.name}.weight"][:] = values.weight
    if head.bias:
        tensors[f"{head.name}.bias"][:] = values.bias
    return packed(changed)
