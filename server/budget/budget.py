"""Privacy planning: what a run's plan costs, and whether anything can be learned under it, before anybody trains.

    run file -> the plan that the run itself would make -> Budget, all numbers -> words, JSON, a figure
    assessment.py: that plan    alternatives.py: others    text.py: words    figure.py: the figure

Symbols in brackets are those of docs/privacy.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsugiki.common.config import files as config_file
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError
from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.server.budget.alternatives import Row, budgeted_release, table
from tsugiki.server.budget.assessment import Assessment, assess

ASSUMED_EPSILON = 8.0
"""Planned for where a run file has no budget: usual in the literature, and a weak promise."""


@dataclass(frozen=True)
class Size:
    """How many numbers an update has.

    Args:
        total: all of them (d).
        adapter: of them, the adapter's; None where only the total was given.
        head: of them, the task head's; None likewise.
        freeze_a: whether LoRA's A is frozen, "yes" or "no"; None for other methods, and where the total was given.
        otherwise: the total with LoRA's A the other way; None likewise.
    """

    total: int
    adapter: int | None = None
    head: int | None = None
    freeze_a: str | None = None
    otherwise: int | None = None


@dataclass(frozen=True)
class Budget:
    """All numbers of `tsugiki budget`.

    Args:
        run: its name.
        mode: of the run file.
        target_epsilon: that the table's noise is found for.
        assumed: whether the run file has no budget and no noise, and the target was assumed.
        clients: asked in a round (n); under Poisson sampling, on average.
        size: of an update.
        base: the plan that the table varies; the run's own, if it has one.
        assessment: of the run's plan; None in mode none.
        table: other modes and numbers of clients.
    """

    run: str
    mode: str
    target_epsilon: float
    assumed: bool
    clients: int
    size: Size
    base: Plan
    assessment: Assessment | None
    table: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values; None for what is infinite, which JSON cannot say."""
        found: dict[str, Any] = _plain(asdict(self))
        base = found.pop("base")
        return {**found, **{name: base[name] for name in ("rounds", "clip_norm", "delta")}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def make_budget(config: RunConfig, size: Size, mode: str, assumed: bool) -> Budget:
    """Return all numbers.

    Args:
        config: of a run with a privacy mode.
        size: of an update.
        mode: of the run file; in mode none, `config` has another, for comparison.
        assumed: whether the run file has no budget.

    Raises:
        ConfigError: the budget cannot be kept, or integers are too narrow for the plan.
    """
    plan = make_plan(config, size.total)
    assert plan is not None  # noqa: S101  # for the type checker: the mode is not none
    asked = plan.denominator or max(plan.min_clients, round(config.strategy.fraction_train * plan.enrolled_clients))
    clients = max(1, round(asked))
    target = _target(plan)
    calibrated = plan.noise_multiplier > 0 and config.privacy.noise_multiplier == 0
    return Budget(
        run=config.run.name,
        mode=mode,
        target_epsilon=target,
        assumed=assumed or plan.noise_multiplier == 0,
        clients=clients,
        size=size,
        base=plan,
        assessment=None if mode == "none" else assess(plan, clients, calibrated, target),
        table=table(plan, target, clients),
    )


def _target(plan: Plan) -> float:
    """Return the epsilon to compare at: the budget if the noise keeps it, else what the noise comes to."""
    spent = epsilon({budgeted_release(plan): plan.rounds}, plan.delta)
    if plan.target_epsilon >= spent:
        return plan.target_epsilon
    return spent if math.isfinite(spent) else ASSUMED_EPSILON


def read(file: Path, overrides: Sequence[str]) -> tuple[RunConfig, str, bool]:
    """Return a run with a privacy mode and a budget, the mode of its file, and whether the budget was assumed.

    Raises:
        ConfigError: the file has problems, or would have with privacy.
    """
    given = config_file.override(config_file.read_toml(file), overrides).get("privacy", {})
    given = given if isinstance(given, Mapping) else {}  # `config_file.read` says what is wrong with it
    mode = given.get("mode", "none")
    assumed = [f"privacy.target_epsilon={ASSUMED_EPSILON}"]
    if mode == "none":
        config = config_file.read(file, overrides)
        assumed += ["privacy.mode=central", "privacy.sampling=fixed", "privacy.honest_fraction=1.0"]
        if config.simulation.partition == "by-column" and not config.privacy.enrolled_clients:
            assumed.append(f"privacy.enrolled_clients={config.strategy.min_clients}")  # the column is not read here
    elif any(given.get(name) for name in ("target_epsilon", "noise_multiplier", "secure_aggregation")):
        return config_file.read(file, overrides), mode, False
    try:
        return config_file.read(file, [*overrides, *assumed]), mode, True
    except ConfigError as error:
        raise ConfigError(f"{file} with {', '.join(assumed)}", list(error.problems)) from error


def measure(config: RunConfig) -> Size:
    """Return the size of an update, from the base model and the adapter as the run would load them.

    Raises:
        ModelError: the base cannot be found or is not to be trusted, or the adapter does not fit it.
    """
    from tsugiki.common.model.load import load_graft

    freeze_a = getattr(config.adapter, "freeze_a", None)
    otherwise = None
    if freeze_a is not None:
        other = changed(config, {"adapter.freeze_a": "no" if freeze_a == "yes" else "yes"})
        otherwise = load_graft(other, config.model.name, config.run.seed).spec.size
    spec = load_graft(config, config.model.name, config.run.seed).spec
    return Size(spec.size, spec.parameters("adapter"), spec.parameters("head"), freeze_a, otherwise)
