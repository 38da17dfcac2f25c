"""What is known of a run: of one that has ended its summary.json, of any other the same figures as far as they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsugiki.common.config.files import read
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import StorageError
from tsugiki.common.files import read_json, read_lines
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.tasks import TASKS
from tsugiki.server.run import checkpoint
from tsugiki.server.run.at_sites import results
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.loop import evaluated
from tsugiki.server.run.privacy import describe_plan
from tsugiki.server.run.resume import judged_anew

UNFINISHED = "unfinished"
"""The value of `stopped` in the summary of a run that has not ended."""


def summary_of(folder: Path) -> dict[str, Any]:
    """Return summary.json of a run that has ended; of any other what is known so far.

    Raises:
        StorageError: `run-missing`, there is no run, or it has not begun; `run-corrupt` or `checkpoint-corrupt`, a file
            is damaged.
        ConfigError: config.toml has mistakes.
    """
    if (folder / "summary.json").is_file():
        return read_json(folder / "summary.json")
    for name in ("config.toml", "spec.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise StorageError(
                f"there is no {name} in {folder}",
                "the folder of a run that has begun",
                "start the run",
                code="run-missing",
            )
    return _so_far(folder, read(folder / "config.toml"), read_json(folder / "spec.json"))


def describe_unfinished(summary: dict[str, Any]) -> str:
    """Return a line about a run that has not ended; empty for one that has."""
    if summary.get("stopped") != UNFINISHED:
        return ""
    return f"the run is unfinished: {summary['rounds']} of {summary['planned_rounds']} rounds are done"


def best_so_far(folder: Path, config: RunConfig, spec_sha256: str) -> State:
    """Return a run's last state, with the evaluation of its round: its `best_round` is the best so far.

    Raises:
        StorageError: as `checkpoint.load`.
    """
    state = judged_anew(checkpoint.load(folder / "checkpoint", config.fixed, spec_sha256), config)
    lower_is_better = config.metric in _lower_is_better(config)
    for line in read_lines(folder / "metrics.jsonl"):
        if line["round"] == state.round and not line.get("voided"):
            state = evaluated(state, line, config.monitor, lower_is_better)
    return state


def _lower_is_better(config: RunConfig) -> frozenset[str]:
    return frozenset(TASKS.get(config.task.name)(config.task).lower_is_better)


def _so_far(folder: Path, config: RunConfig, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of summary.json that people read, of a run that has not ended."""
    lines = read_lines(folder / "metrics.jsonl")
    state = best_so_far(folder, config, spec["sha256"])
    rounds = [line for line in lines if not line.get("voided")]
    return {
        "name": config.run.name,
        "rounds": state.round,
        "planned_rounds": config.run.rounds,
        "stopped": UNFINISHED,
        "task": config.task.name,
        "method": config.adapter.method,
        "agreed": spec["constants"],
        "strategy": config.strategy.name,
        "monitor": config.monitor,
        "lower_is_better": sorted(_lower_is_better(config)),
        **results(rounds, state.best_round, config.metric, config.metric in _lower_is_better(config)),
        "best_round": state.best_round,
        "adapter_parameters": spec["adapter_parameters"],
        "head_parameters": spec["head_parameters"],
        "base_fingerprint": spec["base_fingerprint"],
        "threads": config.train.threads,
        "bytes_down": sum(line.get("bytes_down", 0) for line in lines),
        "bytes_up": sum(line.get("bytes_up", 0) for line in lines),
        "seconds": sum(sum(line["seconds"].values()) for line in lines),
        "privacy": _privacy(state, rounds),
    }


def _privacy(state: State, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the privacy section of the summary; its epsilons are those after the last round."""
    if state.plan is None:
        return {"mode": "none"}
    spent = [line["privacy"]["epsilon"] for line in rounds if "privacy" in line]
    return {**describe_plan(Plan(**state.plan)), "epsilon": spent[-1] if spent else {}}
