"""A running privacy account on disk: one line for every release, written and flushed before it leaves.

A ledger belongs to a group of clients, not to a run: later runs on the same clients go on with it, and so do runs at
the same time. A round that is voided, repeated or lost in a crash stays charged to whoever may have seen it. Lines are
chained by hashes, as in the audit log.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.errors import BudgetError, Code
from tsugiki.common.files import locked
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.mechanisms import ADVERSARIES, Adversary

EVENT = "charged"
_EXHAUSTED: dict[Adversary, Code] = {"rows": "rows-exhausted"}


class Ledger:
    """What was spent on some clients.

    Args:
        path: the file; its folder exists.
        delta: of every epsilon.
        budgets: the most epsilon of some adversaries.
        seeded: whether the run at hand has seeded noise itself, and counts such rounds as they were planned; for any
            other run they have shown everything.
    """

    def __init__(self, path: Path, delta: float, budgets: Mapping[Adversary, float], seeded: bool = False) -> None:
        self.path = path
        self.delta = delta
        self.budgets = dict(budgets)
        self.seeded = seeded

    def spent(self) -> dict[Adversary, Counter[Release]]:
        """Return all releases so far and how often, by adversary.

        Raises:
            StorageError: the file was tampered with.
        """
        found: dict[Adversary, Counter[Release]] = {who: Counter() for who in ADVERSARIES}
        for line in verify(self.path):
            if line["event"] == EVENT:
                release = Release(**line["release"])
                if line.get("private") is False and not self.seeded:
                    release = replace(release, noise_multiplier=0.0)  # anybody can draw its noise too
                found[line["adversary"]][release] += line["count"]
        return found

    def rounds(self, run: str) -> int:
        """Return how many rounds of a run have been charged as released, whoever else is on the ledger.

        Raises:
            StorageError: the file was tampered with.
        """
        lines = [line for line in verify(self.path) if line["event"] == EVENT and line.get("run") == run]
        return len({line["round"] for line in lines if line["adversary"] == "release"})

    def epsilons(self) -> dict[Adversary, float]:
        """Return the epsilon of each adversary who has seen anything; infinite where there was no noise."""
        return {who: epsilon(releases, self.delta) for who, releases in self.spent().items() if releases}

    def check(self, seen: Mapping[Adversary, tuple[Release, int]]) -> None:
        """Do nothing if so many more releases are within all budgets.

        Raises:
            BudgetError: it is not.
        """
        spent = self.spent()
        for who in sorted(self.budgets.keys() & seen.keys()):
            self._check(who, spent[who], *seen[who])

    def charge(self, who: Adversary, release: Release, count: int = 1, **details: Any) -> float:
        """Write down one release, before it leaves; return the epsilon with it.

        Args:
            who: sees it.
            release: what is seen.
            count: how many of them.
            details: run, round and attempt, for the reader; private, False where the noise is seeded.

        Raises:
            BudgetError: it would exceed the budget; nothing was written, and nothing may leave.
            StorageError: it cannot be written; nothing may leave either.
        """
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            spent = self.spent()[who]
            total = self._check(who, spent, release, count)
            told = {"delta": self.delta, "epsilon": total if math.isfinite(total) else None}
            AuditLog(self.path).write(EVENT, adversary=who, release=asdict(release), count=count, **told, **details)
        return total

    def _check(self, who: Adversary, spent: Counter[Release], release: Release, count: int) -> float:
        total = epsilon(spent + Counter({release: count}), self.delta)
        budget = self.budgets.get(who, math.inf)
        if total > budget:
            raise BudgetError(
                f"by the ledger {self.path.name}, epsilon would be {total:.4g} for {ADVERSARIES[who]}",
                f"at most {budget:g}",
                "a larger budget, if these clients agree to it; the last model is kept",
                code=_EXHAUSTED.get(who),
            )
        return total
