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
from tsugiki.common.errors import BudgetError, Code, StorageError
from tsugiki.common.files import lock_of, locked
from tsugiki.common.privacy.accounting import ACCOUNT, LARGEST, Release, epsilon
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
            StorageError: the file was tampered with; `ledger-older`, an older version has charged too little.
        """
        found: dict[Adversary, Counter[Release]] = {adversary: Counter() for adversary in ADVERSARIES}
        for line in verify(self.path):
            if line.get("event") == EVENT:
                adversary, release, count = self._charge_of(line)
                self._check_account(line, release)
                if line.get("private") is False and not self.seeded:
                    release = replace(release, noise_multiplier=0.0)  # its noise is known to anybody with the seed
                found[adversary][release] += count
                # Where the noise is not in shares, outsiders see what a site sees, and have no line of their own.
                if adversary == "release" and release.noise != "skellam":
                    found["outsiders"][release] += count
        return found

    def _charge_of(self, line: Mapping[str, Any]) -> tuple[Adversary, Release, int]:
        """Return who saw which release in a line, and how often.

        Raises:
            StorageError: `run-corrupt`, the line is no charge: a chain that is intact does not ensure that.
        """
        adversary, count = line.get("adversary"), line.get("count")
        try:
            if adversary not in ADVERSARIES or type(count) is not int or not 1 <= count <= LARGEST:
                raise ValueError("no adversary, or no count")
            return adversary, Release.from_json(line.get("release")), count
        except (TypeError, ValueError) as error:
            raise StorageError(
                f"a line of the ledger {self.path} is no charge",
                "the file as it was written",
                "put the file back from a backup",
                code="run-corrupt",
            ) from error

    def _check_account(self, line: Mapping[str, Any], release: Release) -> None:
        """Check that a line was not charged as if a site's own noise hid the others from it.

        The line does not say how much of the noise that was, so it cannot be corrected.

        Raises:
            StorageError: `ledger-older`, it was.
        """
        if line["adversary"] == "release" and release.noise == "skellam" and line.get("account", 1) < ACCOUNT:
            raise StorageError(
                f"in the ledger {self.path}, a version before {ACCOUNT} of the account charged a distributed run",
                "releases without the noise that a site of the sum knows",
                "keep the file elsewhere, begin a new ledger, and lower its budget by what the old one has spent",
                code="ledger-older",
            )

    def rounds(self, run: str) -> int:
        """Return the number of rounds of a run that are charged as released; other runs on the ledger do not count.

        Raises:
            StorageError: the file was tampered with.
        """
        lines = [line for line in verify(self.path) if line.get("event") == EVENT and line.get("run") == run]
        released = [line for line in lines if self._charge_of(line)[0] == "release"]
        return len({str(line.get("round")) for line in released})

    def epsilons(self) -> dict[Adversary, float]:
        """Return the epsilon of each adversary that has seen a release; infinite if a release had no noise.

        `outsiders` is left out where it is the same as `release`.
        """
        spent = self.spent()
        if spent["outsiders"] == spent["release"]:
            del spent["outsiders"]
        return {adversary: epsilon(releases, self.delta) for adversary, releases in spent.items() if releases}

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
            line = {"adversary": who, "release": asdict(release), "count": count, "account": ACCOUNT}
            AuditLog(self.path).write(EVENT, **line, **cost, **details)
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
