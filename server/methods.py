"""Which adapter methods go with which tasks on a base, and how much each of them sends in a round."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TsugikiError, UsageError
from tsugiki.common.model.device import weight_bytes
from tsugiki.common.model.find import find
from tsugiki.common.model.fingerprint import check_base, fingerprint
from tsugiki.common.model.load import load_base, quiet_libraries
from tsugiki.common.model.spec import describe
from tsugiki.common.rng import seed_everything
from tsugiki.common.tasks import TASKS, Task
from tsugiki.common.tasks.base import Base
from tsugiki.server.report.tables import size_text

OPTIMISER_BYTES = 4 + 4 + 8
"""Of each trained number while it is trained in float32: itself, its gradient, Adam's two moments."""


@dataclass(frozen=True)
class Pair:
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
class Menu:
    """What can be chosen on a base.

    Args:
        base: its name.
        base_bytes: of its weights in memory.
        pairs: by task and method.
    """

    base: str
    base_bytes: int
    pairs: dict[str, dict[str, Pair]]


def menu(config: RunConfig, watch: Callable[[str], None] = lambda task: None) -> Menu:
    """Return every pair of task and method on the run's base: the run's own settings where it has them, else defaults.

    Args:
        config: the run; its sections model, task and adapter are used.
        watch: told each task as it begins.

    Raises:
        ModelError: the base cannot be found, or no task can load it.
    """
    import torch

    folder, pairs, size = find(config.model.name), {}, 0
    failed: TsugikiError | None = None
    for name in TASKS.names():
        watch(name)
        task = TASKS.get(name)(config.task if config.task.name == name else TASKS.get(name).Settings.model_validate({}))
        seed_everything(0)
        try:
            with quiet_libraries():
                base = load_base(task, folder, getattr(torch, config.model.dtype))
        except TsugikiError as error:
            pairs[name], failed = dict.fromkeys(ADAPTERS.names(), Pair(reason=_reason(error))), error
            continue
        size = max(size, weight_bytes(base, config.model.quantization))
        pairs[name] = {method: _pair(config, task, base, folder, method) for method in ADAPTERS.names()}
    if failed is not None and not size:
        raise failed
    return Menu(config.model.exported_name or config.model.name, size, pairs)


def _pair(config: RunConfig, task: Task, base: Base, folder: Path, name: str) -> Pair:
    """Put a method on a copy of the base's modules, which shares its tensors, and count what is trained."""
    kind = ADAPTERS.get(name)
    if reason := kind.why_not(base.transformer.config.model_type):
        return Pair(reason=reason)
    method = kind(config.adapter if config.adapter.method == name else kind.Settings.model_validate({}))
    shared = {id(value): value for value in (*base.transformer.parameters(), *base.transformer.buffers())}
    asked = [value.requires_grad for value in base.transformer.parameters()]
    try:
        for adapter, wanted in method.bases().items():
            check_base(fingerprint(folder, base), wanted, adapter)
        with quiet_libraries():
            attached = method.attach(copy.deepcopy(base.transformer, shared), base.heads)
        spec = describe(task, method, replace(base, transformer=attached), "")
        return Pair(spec.parameters("adapter"), spec.parameters("head"), spec.size_bytes)
    except TsugikiError as error:
        return Pair(reason=_reason(error))
    finally:
        for value, wanted in zip(base.transformer.parameters(), asked, strict=True):
            value.requires_grad_(wanted)


def _reason(error: TsugikiError) -> str:
    """Return why it does not go, and what would: the first is at times no more than a setting and its value."""
    return f"{error.what}; expected {error.expected}"


def reasons(pairs: Mapping[str, Mapping[str, Pair]]) -> dict[str, int]:
    """Return the reasons why pairs do not go together, numbered from 1 in the order of the table."""
    found = [pair.reason for method in ADAPTERS.names() for row in pairs.values() if (pair := row[method]).reason]
    return {reason: number for number, reason in enumerate(dict.fromkeys(found), 1)}


def show(found: Menu, as_json: bool) -> None:
    """Print the table; each cell is the adapter's numbers, the head's, and the bytes of a round each way."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        body: dict[str, Any] = {"base": found.base, "base_bytes": found.base_bytes}
        body["pairs"] = {task: {name: vars(pair) for name, pair in row.items()} for task, row in found.pairs.items()}
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
        return
    numbers = reasons(found.pairs)
    table = Table(title=f"{found.base}: numbers of the adapter + head, and bytes of a round, each way")
    table.add_column("method")
    for task in found.pairs:
        table.add_column(task, justify="right")
    for method in ADAPTERS.names():
        table.add_row(method, *(_cell(row[method], numbers) for row in found.pairs.values()))
    console = Console(width=max(Console().width, 24 * len(found.pairs)))
    console.print(table)
    for reason, number in numbers.items():
        console.print(f"({number}) {reason}", highlight=False, markup=False, soft_wrap=True)
    most = max(pair.adapter + pair.head for row in found.pairs.values() for pair in row.values())
    trained = size_text(OPTIMISER_BYTES * most)
    console.print(
        f"Memory at a site: {size_text(found.base_bytes)} of frozen weights, at most {trained} for what is trained "
        "(numbers, gradients, Adam's moments), and activations, by batch and length.",
        highlight=False,
        soft_wrap=True,
    )


def _cell(pair: Pair, numbers: Mapping[str, int]) -> str:
    if pair.reason:
        return f"({numbers[pair.reason]})"
    head = f" + {pair.head:,}" if pair.head else ""
    return f"{pair.adapter:,}{head}\n{size_text(pair.size_bytes)}"


def methods(file: Path | None, model: str, overrides: list[str], as_json: bool) -> None:
    """Print what can be chosen on the base of a run, or on a base by its name.

    Raises:
        TsugikiError: the file is wrong, or the base cannot be loaded.
    """
    from rich.console import Console

    from tsugiki.common.config import files as config_file
    from tsugiki.common.config.parse import parse

    if file is None and overrides:
        raise UsageError("--set is given without a file", "a run's TOML file", "give FILE, or --model alone")
    named = [f"model.name={model}"] if model else []
    bare = {"model": {"name": model}} if model else {}
    config = config_file.read(file, [*overrides, *named]) if file else parse(bare)
    console = Console(stderr=True)
    with console.status("looking at each task") as status:
        found = menu(config, lambda task: status.update(f"{task} with each method"))
    show(found, as_json)
