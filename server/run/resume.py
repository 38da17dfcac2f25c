"""A run that goes on under other settings: which may change, what that means, and what is recorded of it.

`checkpoint.load` refuses changes of the settings that shape the result, `check_plan` those of the privacy plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tsugiki.common.config.files import read
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import StorageError
from tsugiki.common.files import unwritable
from tsugiki.server.run.checkpoint import State

_MAY_CHANGE = ("rounds", "min_clients")
"""The numbers of a privacy plan that may change: the rounds that follow are then accounted anew."""

OTHER_ROWS = "on_other_rows"
"""The mark of a line in metrics.jsonl from which on evaluation is on other rows."""
_ON = " on "


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was when the run last went on, as JSON values."""

    key: str
    before: Any
    now: Any


def changes(folder: Path, config: RunConfig) -> list[Change]:
    """Return the settings that differ from those in a run's config.toml, in file order.

    Settings of [privacy] are left out, because the plan has them, and so is the place of the run's folder.

    Raises:
        ConfigError: config.toml has mistakes.
    """
    before = read(folder / "config.toml").model_dump(mode="json", exclude={"privacy": True})
    now = config.model_dump(mode="json", exclude={"privacy": True})
    return [
        Change(f"{section}.{key}", before[section].get(key), value)
        for section, table in now.items()
        for key, value in table.items()
        if before[section].get(key) != value and f"{section}.{key}" != "run.output_dir"
    ]


def describe(changed: Sequence[Change], config: RunConfig, state: State) -> list[str]:
    """Return a line for the operator about each change, and what it means for the rounds that follow."""
    lines = [f"{one.key}: {one.now} from here on, {one.before} before" for one in changed]
    by_key = {one.key: one for one in changed}
    longer = by_key.get("run.rounds")
    if longer and state.round and follows_rounds(config):
        lines.append(
            f"the learning rate depends on run.rounds: rounds 1 to {state.round} had that of a run of {longer.before}, "
            f"the next ones have that of a run of {longer.now}, which may be higher again; the result is not that of a "
            f"run of {longer.now} rounds from the start"
        )
    if "train.threads" in by_key:
        lines.append("with other train.threads the bytes of the result may differ from those of an unchanged run")
    if state.round and by_key.keys() & {"evaluation.data", "evaluation.monitor", "evaluation.at_sites"}:
        lines.append(f"the best adapter is looked for from round {state.round} on: earlier figures do not compare")
    patience = config.evaluation.early_stopping_patience
    if state.round < config.run.rounds and 0 < patience <= state.evaluations_since_best:
        lines.append(
            f"no further round: the run has stopped early, after {state.evaluations_since_best} evaluations without an "
            "improvement; --set evaluation.early_stopping_patience=0 lets it go on"
        )
    return lines


def follows_rounds(config: RunConfig) -> bool:
    """Return whether the learning rate of a round depends on the number of rounds."""
    return config.train.lr_schedule != "constant" or config.train.warmup_ratio > 0


def measured_by(config: RunConfig) -> str:
    """Return what the best adapter is chosen by: the metric, and the file of rows."""
    return f"{config.monitor}{_ON}{config.evaluation.data}"


def judged_anew(state: State, config: RunConfig) -> State:
    """Return the state with no best adapter but its own, if the run is now measured by something else.

    Its round is evaluated once more. If that is on other rows, its line in metrics.jsonl says so (`OTHER_ROWS`).
    """
    now = measured_by(config)
    if state.measured_by == now:
        return state
    record = dict(state.record)
    if state.round and state.measured_by.partition(_ON)[2] != config.evaluation.data:
        record[OTHER_ROWS] = True
    return replace(
        state,
        measured_by=now,
        best_metric=None,
        best_at_sites={},
        best_round=state.round,
        evaluations_since_best=0,
        record=record,
    )


def comparable(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of metrics.jsonl that were evaluated on the rows of the last one."""
    marks = [number for number, line in enumerate(lines) if OTHER_ROWS in line]
    return list(lines[marks[-1] if marks else 0 :])


def set_results_aside(folder: Path, state: State) -> None:
    """Make room for the results of a run that goes on after its end: its export is kept under another name.

    Raises:
        StorageError: `disk-full` or `not-writable`.
    """
    try:
        (folder / "summary.json").unlink(missing_ok=True)
        if (folder / "adapter").is_dir():
            (folder / "adapter").rename(folder / f"adapter-after-{state.round}")
    except OSError as error:
        raise unwritable(folder, error) from error


def check_plan(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Check that a run is resumed under a plan that its account holds for; return whether anything in it has changed.

    Raises:
        StorageError: `plan-changed`, with each number that differs.
    """
    if before and now and before.get("account", 1) != now["account"]:
        raise StorageError(
            f"the privacy plan follows version {before.get('account', 1)} of the account",
            f"version {now['account']}, which counts no noise that a site of the sum knows",
            "resume with the version of Tsugiki that started the run, or start a new run",
            code="plan-changed",
        )
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if set(names) - set(_MAY_CHANGE):
        raise StorageError(
            "the privacy plan has changed: "
            + ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names),
            "the plan that the run was started with: its account holds for no other",
            "resume with the same [privacy] settings and versions, or start a new run on the same ledger",
            code="plan-changed",
        )
    return bool(names)


def as_records(changed: Sequence[Change]) -> list[dict[str, Any]]:
    """Return the changes for the audit log."""
    return [asdict(one) for one in changed]
