"""Which adapter methods go with which tasks on a base, and how much each of them sends in a round."""

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
"""Of each trained number while it is trained in float32: itself, its gradient, Adam's two moments."""


@dataclass(frozen=True)
class Combination:
    """A task with a method on a base.

    Args:
        adapter: trained numbers of the adapter.
        head: and of the task's head.
        size_bytes: of both as they travel, each way and round.
        reason: why the two do not go together on this base; empty where they do.
    """

    adapter: int = 0
    head: int = 0
    size_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Compatibility:
    """What can be chosen on a base.

    Args:
        base: its name.
        base_bytes: of its weights in memory.
        pairs: by task and method.
    """

    base: str
    base_bytes: int
    pairs: dict[str, dict[str, Combination]]

    @property
    def trained_bytes(self) -> int:
        """Memory for the trained numbers of the largest pair, while they are trained."""
        return OPTIMISER_BYTES * max(pair.adapter + pair.head for row in self.pairs.values() for pair in row.values())

    def as_json(self) -> dict[str, Any]:
        """Return the same for scripts."""
        pairs = {task: {name: vars(pair) for name, pair in row.items()} for task, row in self.pairs.items()}
        return {"base": self.base, "base_bytes": self.base_bytes, "pairs": pairs}


def compatibility(config: RunConfig, watch: Callable[[str], None] = lambda task: None) -> Compatibility:
    """Return every pair of task and method on the run's base: the run's own settings where it has them, else defaults.

    Args:
        config: the run; its sections model, task and adapter are used.
        watch: told each task as it begins.

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
        task = TASKS.get(name)(config.task if config.task.name == name else TASKS.get(name).Settings.model_validate({}))
        seed_everything(0)
        try:
            with quiet_libraries():
                base = load_base(task, folder, getattr(torch, config.model.dtype))
        except TsugikiError as error:
            pairs[name] = dict.fromkeys(ADAPTERS.names(), Combination(reason=_reason(error)))
            failed = error
            continue
        size = max(size, weight_bytes(base, config.model.quantization))
        pairs[name] = {method: _pair(config, task, base, folder, method) for method in ADAPTERS.names()}
    if failed is not None and not size:
        raise failed
    return Compatibility(config.model.exported_name or config.model.name, size, pairs)


def _pair(config: RunConfig, task: Task, base: Base, folder: Path, name: str) -> Combination:
    """Put a method on a copy of the base's modules, which shares its tensors, and count what is trained."""
    kind = ADAPTERS.get(name)
    if reason := kind.why_not(base.transformer.config.model_type):
        return Combination(reason=reason)
    method = kind(config.adapter if config.adapter.method == name else kind.Settings.model_validate({}))
    shared = {id(value): value for value in (*base.transformer.parameters(), *base.transformer.buffers())}
    asked = [value.requires_grad for value in base.transformer.parameters()]
    try:
        for adapter, wanted in method.bases().items():
            check_base(fingerprint(folder, base), wanted, adapter)
        with quiet_libraries():
            attached = method.attach(copy.deepcopy(base.transformer, shared), base.heads)
        spec = describe(task, method, replace(base, transformer=attached), "")
        return Combination(spec.parameters("adapter"), spec.parameters("head"), spec.size_bytes)
    except TsugikiError as error:
        return Combination(reason=_reason(error))
    finally:
        for value, wanted in zip(base.transformer.parameters(), asked, strict=True):
            value.requires_grad_(wanted)


def _reason(error: TsugikiError) -> str:
    """Return why it does not go, and what would: the first is at times no more than a setting and its value."""
    return f"{error.problem}; expected {error.expected}"


def reasons(pairs: Mapping[str, Mapping[str, Combination]]) -> dict[str, int]:
    """Return the reasons why pairs do not go together, numbered from 1 in the order of the table."""
    found = [pair.reason for method in ADAPTERS.names() for row in pairs.values() if (pair := row[method]).reason]
    return {reason: number for number, reason in enumerate(dict.fromkeys(found), 1)}
