"""Build the spec of an adapter, which is on its base or was only read from its export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from tsugiki.common.adapters import AdapterMethod
from tsugiki.common.adapters.base import MERGED
from tsugiki.common.adapters.tensors import tensors_sha256
from tsugiki.common.tasks import Task
from tsugiki.common.tasks.base import Base
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec


def describe(task: Task, method: AdapterMethod, base: Base, identity: str) -> AdapterSpec:
    """Return the spec of an adapter on its base: every parameter with a gradient, sorted by name, and its settings."""
    shapes = {name: tuple(value.shape) for name, value in base.transformer.named_parameters() if value.requires_grad}
    agreed = dict(base.constants)
    if constants := method.constants(base.transformer):
        agreed["constants_sha256"] = tensors_sha256(constants)
    return make_spec(task, method, agreed, identity, shapes, base.heads)


def make_spec(
    task: Task,
    method: AdapterMethod,
    agreed: Mapping[str, str],
    identity: str,
    shapes: Mapping[str, tuple[int, ...]],
    heads: tuple[str, ...],
) -> AdapterSpec:
    """Return the spec of an adapter from the names and shapes of its trained tensors.

    Args:
        task: of the run.
        method: the adapter method.
        agreed: what both sides agree on beside the settings, by name.
        identity: the fingerprint of the base.
        shapes: of the trained tensors, by name.
        heads: modules that are trained in full.
    """
    tensors = (TensorSpec(one, shapes[one], _part(one, heads)) for one in sorted(shapes))
    settings = json.dumps({**method.spec_settings(), **agreed}, sort_keys=True)
    return AdapterSpec(task.name, method.name, settings, identity, method.settings.wire_dtype, tuple(tensors))


def _part(name: str, heads: tuple[str, ...]) -> Literal["adapter", "head", "merged"]:
    if any(f".{head}." in f".{name}" for head in heads):
        return "head"
    return "merged" if f".{MERGED}." in name else "adapter"
