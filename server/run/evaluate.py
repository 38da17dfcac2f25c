"""Central evaluation, on rows that the operator holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.errors import ConfigError, DataError, Problem
from tsugiki.common.model.device import computing
from tsugiki.common.model.graft import Graft
from tsugiki.common.tasks import Task
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.wire.spec import Vector

Evaluator = Callable[[Vector], dict[str, float]]

_FEW = 4
"""Number of rows that is enough to learn which metrics a file gives. Their values do not matter."""


def make_evaluator(graft: Graft, config: RunConfig) -> Evaluator | None:
    """Return a function from an adapter to its metrics, or None if the run names no evaluation data.

    Raises:
        DataError: the file cannot be used.
        ConfigError: the file does not give the metric that the run monitors.
    """
    if not config.evaluation.data:
        return None
    import torch

    shard = read_evaluation(Path(config.evaluation.data), graft.task, config)
    encoded = graft.task.encode(shard, graft.base)
    if not config.monitors_sites:
        _check_monitor(graft, config, encoded)

    def evaluate(vector: Vector) -> dict[str, float]:
        torch.set_num_threads(config.train.threads)
        graft.write(vector)
        with torch.no_grad(), computing(config.train, graft.device.type):
            return graft.task.evaluate(graft.base, encoded, config.evaluation.batch_size)

    return evaluate


def _check_monitor(graft: Graft, config: RunConfig, encoded: Encoded) -> None:
    """Check that these rows give the metric that the run monitors, before any site is contacted.

    Raises:
        ConfigError: they do not.
    """
    import torch

    # only a trial shows which metrics the rows give
    with torch.no_grad(), computing(config.train, graft.device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few rows may have no correlation
        names = graft.task.evaluate(graft.base, encoded.first(_FEW), _FEW)
    if config.monitor not in names:
        problem = Problem(
            "evaluation.monitor", repr(config.monitor), f"one of {', '.join(names)}", "choose one of these"
        )
        raise ConfigError("run file", [problem])


def evaluate_base(graft: Graft, config: RunConfig) -> dict[str, float]:
    """Return the metrics of the base model with the adapter switched off, and its head as it was before training."""
    import torch

    shard = read_evaluation(Path(config.evaluation.data), graft.task, config)
    graft.write(graft.initial)
    with torch.no_grad(), computing(config.train, graft.device.type), graft.adapter_disabled():
        return graft.task.evaluate(graft.base, graft.task.encode(shard, graft.base), config.evaluation.batch_size)


def read_evaluation(path: Path, task: Task, config: RunConfig) -> Shard:
    """Read an evaluation file, in the first of the task's forms whose columns it has."""
    forms = task.evaluation_columns
    # a file that lacks a form's columns may have those of the next form
    for form in forms[:-1]:
        try:
            return read(path, form, config.data, labels=task.labels)
        except DataError as error:
            if error.code != "shard-columns":
                raise
    return read(path, forms[-1], config.data, labels=task.labels)
