"""Compatibility of adapter methods and tasks on a base, and the bytes that each pair sends in a round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TsugikiError
from tsugiki.common.model.device import weight_bytes
from tsugiki.common.model.find import find
from tsugiki.common.model.fingerprint import check_base, fingerprint
from tsugiki.common.model.load import load_base, quiet_libraries
from tsugiki.common.model.spec import describe
from tsugiki.common.rng import seed_everything
from tsugiki.common.tasks import TASKS, Task
from tsugiki.common.tasks.base import Base

OPTIMISER_BYTES = 4 + 4 + 8
"""Bytes for each number trained in float32: the number, its gradient, Adam's two moments."""


@dataclass(frozen=True)
class Combination:
    """A task with a method on a base.

    Args:
        adapter: number of trained parameters of the adapter.
        head: number of trained parameters of the task's head.
        size_bytes: bytes of both in a message, which is sent once each way in a round.
        reason: why the method and the task do not go together on this base; empty if they do.
    """

    adapter: int = 0
    head: int = 0
    size_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Compatibility:
    """The combinations of task and method on a base.

    Args:
        base: name of the base.
        base_bytes: bytes of its weights in memory.
        pairs: combinations by task, then by method.
    """

    base: str
    base_bytes: int
    pairs: dict[str, dict[str, Combination]]

    @property
    def trained_bytes(self) -> int:
        """Memory for the trained numbers of the largest pair during training, in bytes."""
        pairs = [pair for row in self.pairs.values() for pair in row.values()]
        return OPTIMISER_BYTES * max(pair.adapter + pair.head for pair in pairs)

    def as_json(self) -> dict[str, Any]:
        """Return the combinations as plain values, for scripts."""
        pairs = {task: {name: vars(pair) for name, pair in row.items()} for task, row in self.pairs.items()}
        return {"base": self.base, "base_bytes": self.base_bytes, "pairs": pairs}


def compatibility(config: RunConfig, watch: Callable[[str], None] = lambda task: None) -> Compatibility:
    """Return every pair of task and method on the run's base.

    The run's own task and method keep their settings; all others have defaults.

    Args:
        config: the run; its sections model, task and adapter are used.
        watch: called with the name of each task as it begins.

    Raises:
        ModelError: the base cannot be found, or no task can load it.
    """
    import torch

    folder = find(config.model.name)
    pairs = {}
    size = 0
    failed: TsugikiError | None = None
    for name in TASKS.names():
        watch(name)
        kind = TASKS.get(name)
        task = kind(config.task if config.task.name == name else kind.Settings.model_validate({}))
        seed_everything(0)
        try:
            with quiet_libraries():
                base = load_base(task, folder, getattr(torch, config.model.dtype))
        except TsugikiError as error:
            # This task cannot use the base, so no method can; other tasks may.
            pairs[name] = dict.fromkeys(ADAPTERS.names(), Combination(reason=_reason(error)))
            failed = error
            continue
        size = max(size, weight_bytes(base, config.model.quantization))
        pairs[name] = {method: _pair(config, task, base, folder, method) for method in ADAPTERS.names()}
    if failed is not None and not size:
        raise failed
    return Compatibility(config.model.exported_name or config.model.name, size, pairs)


def _pair(config: RunConfig, task: Task, base: Base, folder: Path, name: str) -> Combination:
    """Attach a method to a copy of the base's modules that shares its tensors, and count the trained parameters."""
    kind = ADAPTERS.get(name)
    if reason := kind.why_not(base.transformer.config.model_type):
        return Combination(reason=reason)
    method = kind(config.adapter if config.adapter.method == name else kind.Settings.model_validate({}))
    # With the tensors as its memo, deepcopy copies the modules around them only.
    shared = {id(value): value for value in (*base.transformer.parameters(), *base.transformer.buffers())}
    requires_grad = [value.requires_grad for value in base.transformer.parameters()]
    try:
        for adapter, expected in method.bases().items():
            check_base(fingerprint(folder, base), expected, adapter)
        with quiet_libraries():
            attached = method.attach(copy.deepcopy(base.transformer, shared), base.heads)
        spec = describe(task, method, replace(base, transformer=attached), "")
        return Combination(spec.parameters("adapter"), spec.parameters("head"), spec.size_bytes)
    except TsugikiError as error:
        return Combination(reason=_reason(error))
    finally:
        # Methods freeze the shared tensors: give each its flag back for the next method.
        for value, flag in zip(base.transformer.parameters(), requires_grad, strict=True):
            value.requires_grad_(flag)


def _reason(error: TsugikiError) -> str:
    """Return an error's problem and what was expected; the problem alone may be only a setting and its value."""
    return f"{error.problem}; expected {error.expected}"


def reasons(pairs: Mapping[str, Mapping[str, Combination]]) -> dict[str, int]:
    """Return the reasons why pairs do not go together, numbered from 1 in the order of the table."""
    found = dict.fromkeys(row[method].reason for method in ADAPTERS.names() for row in pairs.values())
    return {reason: number for number, reason in enumerate(filter(None, found), 1)}
