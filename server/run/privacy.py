"""The operator's part of privacy: the budget before a round, the account before anything leaves, noise on the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tsugiki.common.audit import AuditLog
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import BudgetError, StorageError
from tsugiki.common.privacy.clipping import LEVELS, Levels, to_float
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import Adversary, mean_noise, mechanism_of, releases_of
from tsugiki.common.privacy.noise import noise_generator
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.spec import Vector, l2_norm


@dataclass(frozen=True)
class Privacy:
    """What a private run's loop works with.

    Args:
        plan: the frozen plan.
        ledger: of the clients, shared by all runs on them.
        run: the run's name.
        insecure_noise_seed: tests only.
    """

    plan: Plan
    ledger: Ledger
    run: str
    insecure_noise_seed: int

    def check_budget(self) -> None:
        """Do nothing if one more round is within the budget; to be asked before the clients are.

        Raises:
            BudgetError: it is not.
        """
        self.ledger.check({who: (release, 1) for who, release in releases_of(self.plan).items()})

    def exhausted(self) -> bool:
        """Return whether the budget allows no further round."""
        try:
            self.check_budget()
        except BudgetError:
            return True
        return False

    def charge(self, who: Adversary, number: int, attempt: int = 0) -> None:
        """Write down, before it happens, that an adversary sees a round, if the plan shows it anything.

        Raises:
            BudgetError: the budget does not allow it (another run has used it up meanwhile).
            StorageError: the ledger cannot be written; nothing may leave.
        """
        release = releases_of(self.plan).get(who)
        if release is not None:
            self.ledger.charge(who, release, run=self.run, round=number, attempt=attempt, private=self.plan.private)

    def sampled(self, clients: int, site: str, number: int) -> list[int]:
        """Return which of a site's clients are in a round: each with the plan's probability, by a secret coin.

        The coin is the operating system's: the run's seed is known to all sites, and amplification by sampling holds
        only against whoever does not know the cohort.
        """
        draw = noise_generator(self.insecure_noise_seed, "cohort", site, number)
        return [int(client) for client in (draw.random(clients) < self.plan.sampling_probability).nonzero()[0]]

    def mean(self, total: Levels, clients: int, number: int) -> tuple[Vector, dict[str, Any]]:
        """Return the noisy mean update of a round, shape (size,), and what is known about its noise.

        Args:
            total: the sum of protected updates, in levels.
            clients: that are in it.
            number: of the round.
        """
        draw = noise_generator(self.insecure_noise_seed, "server", number)
        noise = mechanism_of(self.plan).server_noise(self.plan, draw)
        denominator = self.plan.denominator or clients
        mean = to_float(total + noise, self.plan.clip_norm, denominator)
        return mean, self._report(mean, clients, denominator)

    def _report(self, mean: Vector, clients: int, denominator: float) -> dict[str, Any]:
        """Return the round's figures: the noise that was there (`z_eff`), and how much of the mean it is."""
        plan, kind = self.plan, mechanism_of(self.plan)
        withheld = plan.sampling_probability < 1  # how many there were would tell something about who was there
        clients = clients or 1  # of a sampled cohort there may be none; nothing of it is told
        variance = plan.honest_fraction * clients * kind.client_variance(plan) + kind.server_variance(plan)
        noise_norm = mean_noise(plan, clients) * clients / denominator * math.sqrt(plan.dimension)
        return {
            "private": plan.private,
            "clients": None if withheld else clients,
            "noise_multiplier": plan.noise_multiplier,
            "effective_noise_multiplier": None if withheld else math.sqrt(variance) / LEVELS,
            "noise_norm": None if withheld else noise_norm,
            "mean_norm": l2_norm(mean),
            "epsilon": {who: _finite(value) for who, value in self.ledger.epsilons().items()},
            "delta": plan.delta,
        }

    def summary(self) -> dict[str, Any]:
        """Return what summary.json and the report say of privacy: each adversary's epsilon so far, by the ledger."""
        return {
            "mode": self.plan.mode,
            "private": self.plan.private,
            "secure_aggregation": self.plan.secure_aggregation,
            "delta": self.plan.delta,
            "noise_multiplier": self.plan.noise_multiplier,
            "clip_norm": self.plan.clip_norm,
            "sampling_probability": self.plan.sampling_probability,
            "honest_fraction": self.plan.honest_fraction,
            "target_epsilon": self.plan.target_epsilon,
            "epsilon": {who: _finite(value) for who, value in self.ledger.epsilons().items()},
            "plan_sha256": self.plan.sha256,
            "ledger": self.ledger.path.name,
        }


def rows_summary(folder: Path, delta: float, seeded: bool = False) -> dict[str, Any]:
    """Return what DP-SGD has cost the rows of a simulation's sites, by the sites' own ledgers; empty without any.

    It is another promise than the client's, and is never added to it. A real site keeps its ledger to itself.

    Args:
        folder: the run's.
        delta: of `[privacy.examples]`.
        seeded: whether the run's noise was.
    """
    spent = [Ledger(path, delta, {}, seeded).epsilons() for path in sorted((folder / "site-ledgers").glob("*.jsonl"))]
    rows = [epsilons["rows"] for epsilons in spent if "rows" in epsilons]
    if not rows:
        return {}
    return {"sites": len(rows), "delta": delta, "largest": _finite(max(rows)), "median": _finite(median(rows))}


def _finite(value: float) -> float | None:
    """Return None for an infinite epsilon, which JSON cannot say."""
    return value if math.isfinite(value) else None


def open_privacy(config: RunConfig, dimension: int, path: Path, audit: AuditLog, rounds: int = 0) -> Privacy | None:
    """Return the private part of a run; None for a run without.

    Args:
        config: resolved (`tsugiki.common.privacy.planning.resolve`).
        dimension: coordinates of an update.
        path: the ledger's.
        audit: told what the ledger holds already.
        rounds: that the run has done before it was resumed.

    Raises:
        StorageError: the ledger was tampered with, or lacks rounds that this run has done.
    """
    plan = make_plan(config, dimension)
    if plan is None:
        return None
    budgets = dict.fromkeys(mechanism_of(plan).budgeted, plan.target_epsilon) if plan.target_epsilon else {}
    ledger = Ledger(path, plan.delta, budgets, seeded=config.privacy.insecure_noise_seed > 0)
    if ledger.rounds(config.run.name) < rounds:
        raise StorageError(
            f"the ledger {path} has {ledger.rounds(config.run.name)} rounds of {config.run.name!r}",
            f"the {rounds} that it has released",
            "put the ledger back where it was: what was spent cannot be forgotten",
            code="ledger-behind",
        )
    spent = {who: _finite(value) for who, value in ledger.epsilons().items()}
    audit.write("privacy", plan_sha256=plan.sha256, private=plan.private, spent_before=spent)
    return Privacy(plan, ledger, config.run.name, config.privacy.insecure_noise_seed)
