"""The operator's part of privacy: check the budget before a round, charge it before anything is sent, noise the sum."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.audit import AuditLog
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import BudgetError, StorageError
from tsugiki.common.privacy.clipping import LEVELS, Levels, to_float
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import Adversary, mean_noise, mechanism_of, releases_of
from tsugiki.common.privacy.noise import noise_generator
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.wire.spec import Vector, l2_norm
from tsugiki.server.run.sums import narrowed


@dataclass(frozen=True)
class Privacy:
    """The plan and the ledger of a private run.

    Args:
        plan: of the run; it does not change while the run goes on.
        ledger: of the clients, shared by all runs on them.
        run: name of the run.
        insecure_noise_seed: tests only.
    """

    plan: Plan
    ledger: Ledger
    run: str
    insecure_noise_seed: int

    def check_budget(self, searching: bool = False) -> None:
        """Check that the budget allows one more round. Call it before any client is asked.

        Args:
            searching: whether the round is asked for again because a site has spoiled a sum.

        Raises:
            BudgetError: it does not.
        """
        try:
            self._check(1)
        except BudgetError as error:
            if not searching:
                raise
            problem = f"a site has spoiled a sum, and there is no budget to find it: {error.problem}"
            raise BudgetError(
                problem, error.expected, f"see audit.jsonl for the sites of the sum; {error.hint}"
            ) from None

    def check_rest(self, rounds_done: int, rounds: int) -> None:
        """Check that the budget allows the rest of a run whose plan was changed after it began.

        Args:
            rounds_done: of the run.
            rounds: that it is to have.

        Raises:
            BudgetError: it does not.
        """
        left = rounds - rounds_done
        if left <= 0:
            return
        try:
            self._check(left)
        except BudgetError as error:
            most = bisect_left(range(left), True, key=lambda count: not self._allows(count)) - 1
            raise BudgetError(
                f"with run.rounds = {rounds} and strategy.min_clients = {self.plan.min_clients}, {left} rounds are "
                f"left, and the budget does not allow them; {error.problem}",
                f"at most {self.plan.target_epsilon:g}, which is privacy.target_epsilon",
                f"--set run.rounds={rounds_done + most}, the most that it allows under this plan",
            ) from None

    def _allows(self, rounds: int) -> bool:
        try:
            self._check(rounds)
        except BudgetError:
            return False
        return True

    def _check(self, rounds: int) -> None:
        """Check that the budget allows so many more rounds; 0 are always allowed."""
        if rounds:
            self.ledger.check({adversary: (release, rounds) for adversary, release in releases_of(self.plan).items()})

    def exhausted(self) -> bool:
        """Return whether the budget allows no further round."""
        try:
            self.check_budget()
        except BudgetError:
            return True
        return False

    def charge(self, adversary: Adversary, round_number: int, attempt: int = 0) -> None:
        """Charge this round to an adversary's ledger before anything is sent. No-op if the adversary learns nothing.

        Args:
            adversary: whose ledger.
            round_number: counted from 1.
            attempt: at this round, from 0.

        Raises:
            BudgetError: the budget does not allow it: another run has used it up meanwhile.
            StorageError: the ledger cannot be written; nothing may be sent.
        """
        release = releases_of(self.plan).get(adversary)
        if release is None:
            return
        self.ledger.charge(
            adversary, release, run=self.run, round=round_number, attempt=attempt, private=self.plan.private
        )

    def sampled(self, clients: int, site: str, round_number: int) -> list[int]:
        """Draw a site's clients for a round: each is in it with the plan's probability, by a secret coin.

        The coin comes from the operating system, because all sites know the run's seed: amplification by sampling holds
        only against an adversary that does not know the cohort.

        Args:
            clients: of the site.
            site: its name.
            round_number: counted from 1.
        """
        draw = noise_generator(self.insecure_noise_seed, "cohort", site, round_number)
        return [int(client) for client in (draw.random(clients) < self.plan.sampling_probability).nonzero()[0]]

    def mean(self, total: Levels, clients: int, round_number: int) -> tuple[Vector, dict[str, Any]]:
        """Return the noisy mean update of a round, shape (size,), and the figures of its noise.

        Args:
            total: the sum of protected updates, in levels. The mean takes its memory, and its values are lost.
            clients: in the sum.
            round_number: counted from 1.
        """
        draw = noise_generator(self.insecure_noise_seed, "server", round_number)
        denominator = self.plan.denominator or clients

        # block by block: all of the noise at once would take twice the memory of the mean
        def noisy(part: slice) -> npt.NDArray[np.float32]:
            noise = mechanism_of(self.plan).server_noise(self.plan, draw, part.stop - part.start)
            return to_float(total[part] + noise, self.plan.clip_norm, denominator)

        mean = narrowed(total, noisy)
        return mean, self._report(mean, clients, denominator)

    def _report(self, mean: Vector, clients: int, denominator: float) -> dict[str, Any]:
        """Return the figures of a round: the noise in the sum (`z_eff`), and how much of the mean is noise."""
        plan = self.plan
        kind = mechanism_of(plan)
        clients = clients or 1  # a sampled cohort may be empty; its figures are withheld
        variance = plan.honest_fraction * clients * kind.client_variance(plan) + kind.server_variance(plan)
        noise_norm = mean_noise(plan, clients) * clients / denominator * math.sqrt(plan.dimension)
        report: dict[str, Any] = {
            "private": plan.private,
            "clients": clients,
            "noise_multiplier": plan.noise_multiplier,
            "effective_noise_multiplier": math.sqrt(variance) / LEVELS,
            "noise_norm": noise_norm,
            "mean_norm": l2_norm(mean),
            "epsilon": self.epsilons(),
            "delta": plan.delta,
        }
        # in a sampled cohort, the number of clients would say something about who took part
        if plan.sampling_probability < 1:
            report |= dict.fromkeys(("clients", "effective_noise_multiplier", "noise_norm"))
        return report

    def epsilons(self) -> dict[str, float | None]:
        """Return each adversary's epsilon so far, by the ledger."""
        return {adversary: _finite(value) for adversary, value in self.ledger.epsilons().items()}

    def summary(self) -> dict[str, Any]:
        """Return the privacy section of summary.json, with each adversary's epsilon so far."""
        return {**describe_plan(self.plan), "epsilon": self.epsilons(), "ledger": self.ledger.path.name}


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return the figures of a plan for the privacy section of summary.json."""
    return {
        "mode": plan.mode,
        "private": plan.private,
        "secure_aggregation": plan.secure_aggregation,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "sampling_probability": plan.sampling_probability,
        "honest_fraction": plan.honest_fraction,
        "target_epsilon": plan.target_epsilon,
        "plan_sha256": plan.sha256,
    }


def rows_summary(folder: Path, delta: float, seeded: bool = False) -> dict[str, Any]:
    """Return the epsilons of rows under DP-SGD, from the ledgers of a simulation's sites; empty without a ledger.

    This promise protects one row, the plan's a whole client; the two are never added. A real site keeps its ledger to
    itself.

    Args:
        folder: the run's.
        delta: of `[privacy.examples]`.
        seeded: whether the run's noise was seeded.
    """
    spent = [Ledger(path, delta, {}, seeded).epsilons() for path in sorted((folder / "site-ledgers").glob("*.jsonl"))]
    rows = [epsilons["rows"] for epsilons in spent if "rows" in epsilons]
    if not rows:
        return {}
    return {"sites": len(rows), "delta": delta, "largest": _finite(max(rows)), "median": _finite(median(rows))}


def _finite(value: float) -> float | None:
    """Return None for an infinite epsilon, because JSON has no infinity."""
    return value if math.isfinite(value) else None


def open_privacy(
    plan: Plan | None, config: RunConfig, path: Path, audit: AuditLog, rounds_done: int = 0
) -> Privacy | None:
    """Return the operator's part of a private run; None for a run without a plan.

    Args:
        plan: of the run.
        config: of the run.
        path: of the ledger.
        audit: receives an event with what the ledger contains so far.
        rounds_done: of this run, before it was resumed.

    Raises:
        StorageError: the ledger was tampered with, or lacks rounds of this run.
    """
    if plan is None:
        return None
    budgets: dict[Adversary, float] = {}
    if plan.target_epsilon:
        budgets |= dict.fromkeys(mechanism_of(plan).budgeted, plan.target_epsilon)
    ledger = Ledger(path, plan.delta, budgets, seeded=config.privacy.insecure_noise_seed > 0)
    # with a lost or older ledger, rounds of this run would be free
    if ledger.rounds(config.run.name) < rounds_done:
        raise StorageError(
            f"the ledger {path} has {ledger.rounds(config.run.name)} rounds of {config.run.name!r}",
            f"the {rounds_done} that it has released",
            "put the ledger back where it was: what was spent cannot be forgotten",
            code="ledger-behind",
        )
    privacy = Privacy(plan, ledger, config.run.name, config.privacy.insecure_noise_seed)
    audit.write("privacy", plan_sha256=plan.sha256, private=plan.private, spent_before=privacy.epsilons())
    return privacy
