"""A running privacy account on disk: one line for every release, written and flushed before it leaves.

A ledger belongs to a group of clients, not to a run: later and simultaneous runs on the same clients continue it. A
round that is voided, repeated or lost in a crash stays charged to every adversary that may have seen it. Lines are
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
from tsugiki.common.files import lock_of, locked
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.mechanisms import ADVERSARIES, Adversary

EVENT = "charged"
_EXHAUSTED: dict[Adversary, Code] = {"rows": "rows-exhausted"}


class Ledger:
    """The privacy account of a group of clients.

    Args:
        path: the ledger's file; its folder exists.
        delta: the delta of every epsilon.
        budgets: the largest epsilon allowed, for some adversaries.
        seeded: whether the current run has seeded noise itself. If so, it counts rounds with seeded noise as they were
            planned; any other run counts them as rounds without noise.
    """

    def __init__(self, path: Path, delta: float, budgets: Mapping[Adversary, float], seeded: bool = False) -> None:
        self.path = path
        self.delta = delta
        self.budgets = dict(budgets)
        self.seeded = seeded

    @property
    def lock_path(self) -> Path:
        """The file that a process locks while it reads or writes the ledger."""
        return lock_of(self.path)

    def spent(self) -> dict[Adversary, Counter[Release]]:
        """Return all releases so far, with their counts, by adversary.

        Raises:
            StorageError: the file was tampered with.
        """
        found: dict[Adversary, Counter[Release]] = {adversary: Counter() for adversary in ADVERSARIES}
        for line in verify(self.path):
            if line["event"] == EVENT:
                release = Release(**line["release"])
                if line.get("private") is False and not self.seeded:
                    release = replace(release, noise_multiplier=0.0)  # its noise is known to anybody with the seed
                found[line["adversary"]][release] += line["count"]
        return found

    def rounds(self, run: str) -> int:
        """Return the number of rounds of a run that are charged as released; other runs on the ledger do not count.

        Raises:
            StorageError: the file was tampered with.
        """
        lines = [line for line in verify(self.path) if line["event"] == EVENT and line.get("run") == run]
        return len({line["round"] for line in lines if line["adversary"] == "release"})

    def epsilons(self) -> dict[Adversary, float]:
        """Return the epsilon of each adversary that has seen a release; infinite if a release had no noise."""
        spent = self.spent().items()
        return {adversary: epsilon(releases, self.delta) for adversary, releases in spent if releases}

    def check(self, seen: Mapping[Adversary, tuple[Release, int]]) -> None:
        """Check that these further releases are within all budgets.

        Args:
            seen: by adversary, a release and the number of times that it is to be made.

        Raises:
            BudgetError: a budget would be exceeded.
        """
        spent = self.spent()
        for adversary in sorted(self.budgets.keys() & seen.keys()):
            self._check(adversary, spent[adversary], *seen[adversary])

    def note(self, event: str, **details: Any) -> None:
        """Write a line that costs nothing.

        Raises:
            StorageError: the ledger cannot be written.
        """
        with locked(self.lock_path):
            AuditLog(self.path).write(event, **details)

    def charge(self, who: Adversary, release: Release, count: int = 1, **details: Any) -> float:
        """Write a release to the ledger before it leaves, and return the epsilon that includes it.

        Args:
            who: the adversary that sees the release.
            release: what the adversary sees.
            count: the number of such releases.
            details: run, round and attempt, for the reader; `private`, False if the noise is seeded.

        Raises:
            BudgetError: the release would exceed the budget; nothing was written, and nothing may leave.
            StorageError: the ledger cannot be written; nothing may leave either.
        """
        # Two runs must not both spend what is left, so the check and the line share a lock.
        with locked(self.lock_path):
            spent = self.spent()[who]
            total = self._check(who, spent, release, count)
            cost = {"delta": self.delta, "epsilon": total if math.isfinite(total) else None}  # JSON has no infinity
            AuditLog(self.path).write(EVENT, adversary=who, release=asdict(release), count=count, **cost, **details)
        return total

    def _check(self, adversary: Adversary, spent: Counter[Release], release: Release, count: int) -> float:
        """Return the epsilon with `count` more releases, after checking it against the budget."""
        total = epsilon(spent + Counter({release: count}), self.delta)
        budget = self.budgets.get(adversary, math.inf)
        if total > budget:
            raise BudgetError(
                f"by the ledger {self.path.name}, epsilon would be {total:.4g} for {ADVERSARIES[adversary]}",
                f"at most {budget:g}",
                "a larger budget, if these clients agree to it; the last model is kept",
                code=_EXHAUSTED.get(adversary),
            )
        return total
