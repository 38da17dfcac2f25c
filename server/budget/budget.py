"""Privacy planning before training: the cost of a run's plan, and whether the model can learn under it.

    run file -> the plan that the run itself would make -> Budget, all numbers -> words, JSON, a figure
    assessment.py: that plan    alternatives.py: others    words.py: words    figure.py: the figure

docs/privacy.md explains the symbols in brackets.
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
from tsugiki.server.budget.assessment import Assessment, assess, clients_asked

ASSUMED_EPSILON = 8.0
"""Epsilon that is planned for if a run file has no budget: usual in the literature, and a weak promise."""


@dataclass(frozen=True)
class Size:
    """The number of parameters in an update.

    Args:
        total: all parameters (d).
        adapter: parameters of the adapter; None if only the total was given.
        head: parameters of the task's head; None if only the total was given.
        freeze_a: whether LoRA's A is frozen, "yes" or "no"; None for other methods, or if only the total was given.
        otherwise: the total with the other choice of `freeze_a`; None if that is None.
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
        run: name of the run.
        mode: privacy mode of the run file.
        target_epsilon: epsilon that the table's noise is calibrated for.
        assumed: whether the target was assumed, because the run file has no budget and no noise.
        clients: number of clients asked in a round (n); under Poisson sampling, the average.
        size: size of an update.
        base: the plan that the table varies; the run's own, if it has one.
        assessment: assessment of the run's plan; None in mode none.
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
        """Return the numbers as plain values for JSON; None replaces infinity, which JSON does not have."""
        found: dict[str, Any] = _plain(asdict(self))
        base = found.pop("base")
        return {**found, **{name: base[name] for name in ("rounds", "clip_norm", "delta")}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return None
    return value


def make_budget(config: RunConfig, size: Size, mode: str, assumed: bool) -> Budget:
    """Return all numbers.

    Args:
        config: a run with a privacy mode.
        size: size of an update.
        mode: mode of the run file; if it is none, `config` has another mode, for comparison.
        assumed: whether the run file has no budget.

    Raises:
        ConfigError: the budget cannot be kept, or integers are too narrow for the plan.
    """
    plan = make_plan(config, size.total)
    assert plan is not None  # noqa: S101  # for the type checker: the mode is not none
    clients = clients_asked(plan, config.strategy.fraction_train)
    target = _target(plan)
    # The plan has noise that the run file does not name: it was calibrated from the budget.
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
    """Return the epsilon to compare at: the budget if the noise keeps it, else the epsilon of that noise."""
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
    if not isinstance(given, Mapping):
        given = {}  # `config_file.read` reports the mistake
    mode = given.get("mode", "none")
    assumed = [f"privacy.target_epsilon={ASSUMED_EPSILON}"]
    if mode == "none":
        config = config_file.read(file, overrides)
        assumed += ["privacy.mode=central", "privacy.sampling=fixed", "privacy.honest_fraction=1.0"]
        if config.simulation.partition == "by-column" and not config.privacy.enrolled_clients:
            # The column says how many sites there are, but it is not read here.
            assumed.append(f"privacy.enrolled_clients={config.strategy.min_clients}")
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
