"""A site's own privacy account: what its uploads have cost so far, in all runs, charged before an upload leaves.

The server keeps accounts too (`server/run/privacy.py`), but a site trusts its own alone. It charges a masked upload
before sending it: whether the sum is opened afterwards does not depend on this site alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsugiki.client.site.policy import SitePolicy
from tsugiki.common.errors import BudgetError, Code, PolicyError
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import Adversary, mechanism_of, releases_of
from tsugiki.common.privacy.plan import Plan


def site_ledger(path: Path, policy: SitePolicy, plan: Plan | None, seeded: bool = False) -> Ledger:
    """Return a site's ledger with the budgets of its policy.

    Args:
        path: the file.
        policy: has the budgets, and the delta at which epsilon is measured; a run's own delta does not count.
        plan: `max_epsilon` bounds what an adversary sees, for each adversary that the plan's mode protects against;
            without secure aggregation also what the server sees of a distributed share.
        seeded: whether the run's noise follows from a seed, which anybody can know.
    """
    # `max_epsilon` needs a plan: without one, `SitePolicy.check_privacy` has refused the run.
    budgets: dict[Adversary, float] = {}
    if policy.max_epsilon and plan is not None:
        budgets |= dict.fromkeys(mechanism_of(plan).budgeted, policy.max_epsilon)
        if plan.mode == "distributed" and not plan.secure_aggregation:
            budgets["uploads"] = policy.max_epsilon  # this site cannot ensure the noise of the others
    if policy.max_row_epsilon:
        budgets["rows"] = policy.max_row_epsilon
    return Ledger(path, policy.delta, budgets, seeded)


def seen_of_site(plan: Plan) -> dict[Adversary, Release]:
    """Return the release that each adversary sees in a round, by what this site can check.

    Without secure aggregation a site cannot check that any other client adds its share of the noise, or exists. So the
    models count as its own upload: the budgets of all runs together then hold whatever the server said in one of them.
    """
    # A site that is asked knows that it is in the round: nothing is amplified for it.
    seen = {adversary: replace(release, sampling_probability=1.0) for adversary, release in releases_of(plan).items()}
    if plan.mode == "distributed" and not plan.secure_aggregation:
        return dict.fromkeys(seen, seen["uploads"])
    return seen


UNPROTECTED = "unprotected"
"""The event of an upload without any protection. It costs nothing, because no epsilon would be finite."""


def spend(
    ledger: Ledger,
    releases: Mapping[Adversary, tuple[Release, int]],
    run: str,
    round_number: int,
    anchor: Mapping[str, Any] | None = None,
) -> None:
    """Charge what the next upload shows, to each adversary.

    An upload without protection gets a line too, so that the ledger remembers the audit log of every round.

    Args:
        ledger: of the site.
        releases: by adversary, each with the number of times that it is made.
        run: name of the run.
        round_number: counted from 1.
        anchor: fields for each line, from `Site.charging`.

    Raises:
        PolicyError: `policy-epsilon` or `policy-row-epsilon`; the upload must not leave.
        StorageError: the ledger cannot be written; the upload must not leave.
    """
    fields = {"run": run, "round": round_number, **(anchor or {})}
    if not releases:
        ledger.note(UNPROTECTED, **fields)
    check_budget(ledger, releases)  # all of them, before the first is charged
    with _as_policy():
        for adversary, (release, count) in releases.items():
            ledger.charge(adversary, release, count, private=not ledger.seeded, **fields)


def check_budget(ledger: Ledger, releases: Mapping[Adversary, tuple[Release, int]]) -> None:
    """Check that the site's budgets allow the next upload; nothing is charged.

    Args:
        ledger: of the site.
        releases: by adversary, each with the number of times that it is made.

    Raises:
        PolicyError: `policy-epsilon` or `policy-row-epsilon`.
    """
    with _as_policy():
        ledger.check(releases)


@contextmanager
def _as_policy() -> Iterator[None]:
    """Turn the error of a spent budget into that of the site's policy."""
    try:
        yield
    except BudgetError as error:
        code: Code = "policy-row-epsilon" if error.code == "rows-exhausted" else "policy-epsilon"
        raise PolicyError(
            error.problem, error.expected, "change [policy] in site.toml, if you agree", code=code
        ) from error
