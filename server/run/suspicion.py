"""What a run knows about sites that spoil sums, applied to the sites that are connected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.secagg.counts import check_sum, counted_on
from tsugiki.server.run.roster import Member
from tsugiki.server.run.search import Fits, Group, Rest, Search

SUSPECTED = "suspected"
"""The audit log's event of a site that is left out. `until` is the first round in which it is asked again; 0: none."""


class Suspicion:
    """The search of a run for sites that spoil sums. It changes in the course of the run.

    Args:
        events: of the run's audit log, if it is resumed: its verdicts hold; a search that was under way begins anew.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        rests: dict[str, Rest] = {}
        liars: set[str] = set()
        for event in events:
            if event["event"] == SUSPECTED:
                site = event["site"]
                rests.pop(site, None)
                liars.discard(site)
                if event["until"]:
                    rests[site] = Rest(event["until"], event["times"])
                else:
                    liars.add(site)
        self.search = Search(rests=rests, liars=frozenset(liars))
        self._counts_on: dict[str, int] = {}

    def counts_on(self, counts: Mapping[str, int]) -> None:
        """Remember how many clients at another site each site counts on at most, as its keys come with it."""
        self._counts_on |= counts

    def left_out(self, round_number: int) -> set[str]:
        """Return the sites that a round does without, as far as it can."""
        return self.search.resting(round_number) | self.search.liars

    def available(self, members: list[Member], plan: Plan, round_number: int) -> list[Member]:
        """Return the sites that may be asked in a round; see `Search.available`."""
        names = self.search.available([one.name for one in members], round_number, self._fits(members, plan))
        return [one for one in members if one.name in names]

    def groups(self, cohort: Sequence[Member], plan: Plan) -> list[Group]:
        """Return the groups of a cohort to ask for a sum each; see `Search.groups`."""
        return self.search.groups([one.name for one in cohort], self._fits(cohort, plan))

    def learn(self, failed: Sequence[Group], passed: Sequence[Group], round_number: int) -> dict[str, Rest | None]:
        """Take in the sums of an attempt; return the new verdicts by site name. None: left out for the rest of the run.

        Args:
            failed: the sites of each sum that failed its norm test.
            passed: the sites of each sum that passed it.
            round_number: counted from 1.
        """
        before = self.search
        self.search = before.after(failed, passed, round_number)
        verdicts: dict[str, Rest | None] = dict.fromkeys(self.search.liars - before.liars)
        verdicts |= {site: rest for site, rest in self.search.rests.items() if before.rests.get(site) != rest}
        return dict(sorted(verdicts.items()))

    def _fits(self, members: Sequence[Member], plan: Plan) -> Fits:
        """Return whether sites may form a sum, by the server's counts and by what each of them counts on."""
        clients = {member.name: member.clients for member in members}

        def fits(names: Sequence[str]) -> bool:
            counts = {name: clients[name] for name in names}
            views = [counted_on(counts, name, self._counts_on[name]) for name in names if name in self._counts_on]
            try:
                for view in (counts, *views):
                    check_sum(view, plan.min_clients, plan.min_sites)
            except SecureAggregationError:
                return False
            return True

        return fits
