"""A site's own account: what its updates have cost it so far, in all runs, written down before one leaves.

The server keeps accounts too (`server/run/privacy.py`), but a site believes its own. It charges a masked upload when it
is
sent: whether the sum is opened afterwards is not in this site's hands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tsugiki.client.site.policy import SitePolicy
from tsugiki.common.errors import BudgetError, Code, PolicyError
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import Adversary, mechanism_of
from tsugiki.common.privacy.plan import Plan


def site_ledger(path: Path, policy: SitePolicy, plan: Plan | None, seeded: bool = False) -> Ledger:
    """Return a site's ledger with the budgets of its policy.

    Args:
        path: the file.
        policy: its `delta` counts, not that of a run.
        plan: `max_epsilon` bounds what those adversaries see against whom the plan's mode is meant; without secure
            aggregation also what the server sees of a distributed share.
        seeded: whether anybody can draw the run's noise too.
    """
    budgets: dict[Adversary, float] = {}
    if policy.max_epsilon and plan is not None:
        budgets |= dict.fromkeys(mechanism_of(plan).budgeted, policy.max_epsilon)
        if plan.mode == "distributed" and not plan.secure_aggregation:
            budgets["uploads"] = policy.max_epsilon  # the noise of the others is beyond what this site can see to
    if policy.max_row_epsilon:
        budgets["rows"] = policy.max_row_epsilon
    return Ledger(path, policy.delta, budgets, seeded)


def spend(ledger: Ledger, releases: Mapping[Adversary, tuple[Release, int]], run: str, round_: int) -> None:
    """Write down what the next upload shows, and to whom.

    Args:
        ledger: of the site.
        releases: by adversary, each with how often it is made.
        run: the run's name.
        round_: counted from 1.

    Raises:
        PolicyError: `policy-epsilon` or `policy-row-epsilon`; the upload must not leave.
        StorageError: it cannot be written; the upload must not leave either.
    """
    try:
        ledger.check(releases)  # all of them, before one is written down
        for who, (release, count) in releases.items():
            ledger.charge(who, release, count, run=run, round=round_, private=not ledger.seeded)
    except BudgetError as error:
        code: Code = "policy-row-epsilon" if error.code == "rows-exhausted" else "policy-epsilon"
        raise PolicyError(
            error.what, error.expected, "change [policy] in site.toml, if you agree", code=code
        ) from error
