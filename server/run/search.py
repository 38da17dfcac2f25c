"""Find the site that spoils sums, although only sums are seen: which groups of sites to ask next.

Under secure aggregation nobody can check a single update. A sum that fails its norm test has at least one site in it
that did not clip, sent random numbers, or gave wrong shares. Which one, only other sums can show: this is group testing
(Dorfman 1943, "The Detection of Defective Members of Large Populations"), with groups that must be as large as any sum.

A sum that fails is evidence: one of its sites lied. A sum that passes is a hint only, because a site may lie at times.
So there are two verdicts:

- A *suspect* is the only site of failed sums that was in no sum that passed since. It is left out for `REST` rounds,
  then asked again; each time that it is suspected again, it is left out for twice as long.
- A *liar* is the only site that all failed sums have in common, of two or more, and no sum with it has passed since the
  first. It is left out for the rest of the run. A single liar cannot bring this upon an honest site, however it lies:
  it is in each failed sum itself. Should a sum without the liar fail, there are several, and the verdict is only that
  of a suspect.

Where two or more groups are large enough, the sites are asked in disjoint groups, and the suspected ones are spread
over them: groups that pass make up the round. Where only one is, as many as half of the suspected sites are left out,
others each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

REST = 4
"""For how many rounds a site is left out when it is suspected for the first time."""

Group = tuple[str, ...]
Fits = Callable[[Sequence[str]], bool]
"""Whether sites may form a sum."""


@dataclass(frozen=True)
class Rest:
    """How long a suspect is left out.

    Args:
        until: the first round in which it is asked again.
        times: how often it has been suspected.
    """

    until: int
    times: int


@dataclass(frozen=True)
class Search:
    """What the sums of a run have shown about its sites.

    Args:
        failed: the sites of each failed sum, without sums that hold a liar who is known.
        passed: the sites of all sums that have passed since the first of these.
        cases: for failures that nobody explains yet, the sites that may have caused them; none is empty.
        rests: of suspects, by site name, also of those whose time is over.
        liars: are left out for the rest of the run.
    """

    failed: tuple[frozenset[str], ...] = ()
    passed: frozenset[str] = frozenset()
    cases: tuple[frozenset[str], ...] = ()
    rests: Mapping[str, Rest] = field(default_factory=dict)
    liars: frozenset[str] = frozenset()

    def resting(self, round_number: int) -> set[str]:
        """Return the suspects that are left out of a round."""
        return {site for site, rest in self.rests.items() if rest.until > round_number}

    def after(self, failed: Sequence[Group], passed: Sequence[Group], round_number: int) -> Search:
        """Return what is known after sums over disjoint groups were opened at the same time.

        Args:
            failed: the sites of each sum that failed its norm test.
            passed: the sites of each sum that passed it.
            round_number: counted from 1.
        """
        search = self
        if failed and self.liars:
            doubted = {site: Rest(round_number + REST, 1) for site in self.liars}
            search = replace(self, rests={**self.rests, **doubted}, liars=frozenset())
        for group in failed:
            search = search._after_failure(frozenset(group))
        if not search.failed:
            return search
        cleared = frozenset[str]().union(*passed)
        left = tuple(case - cleared for case in search.cases)
        search = replace(search, passed=search.passed | cleared, cases=tuple(case for case in left if case))
        return search._judged(round_number)

    def _after_failure(self, group: frozenset[str]) -> Search:
        failed = (*self.failed, group)
        fitting = [case for case in self.cases if case & group]
        if len(fitting) == 1:  # one liar explains both failures
            cases = tuple(case & group if case is fitting[0] else case for case in self.cases)
            return replace(self, failed=failed, cases=cases)
        if fitting:  # of several liars: it cannot be said whose failure this is
            return replace(self, failed=failed)
        # nobody is suspected of it: begin with the sites that explain the earlier failures too
        common = frozenset.intersection(*failed)
        case = (common - self.passed) or (group - self.passed) or common or group
        return replace(self, failed=failed, cases=(*self.cases, case))

    def _judged(self, round_number: int) -> Search:
        """Return the search with the verdicts that follow."""
        common = frozenset.intersection(*self.failed)
        if len(self.failed) > 1 and len(common) == 1 and not common & self.passed:
            # this site explains all failures, so they are forgotten: a later one begins a search of its own
            rests = {site: rest for site, rest in self.rests.items() if site not in common}
            return Search(rests=rests, liars=self.liars | common)
        suspects = frozenset[str]().union(*(case for case in self.cases if len(case) == 1))
        rests = dict(self.rests)
        for site in suspects:
            times = rests[site].times if site in rests else 0
            rests[site] = Rest(round_number + REST * 2**times, times + 1)
        return replace(self, rests=rests, cases=tuple(case for case in self.cases if not case & suspects))

    def available(self, sites: Sequence[str], round_number: int, fits: Fits) -> list[str]:
        """Return the sites that may be asked: no liar, and suspects only if a round cannot do without them.

        Args:
            sites: that are connected.
            round_number: counted from 1.
            fits: whether sites may form a sum.
        """
        honest = [site for site in sites if site not in self.liars]
        resting = self.resting(round_number)
        rested = [site for site in honest if site not in resting]
        if fits(rested) and self.groups(rested, fits):
            return rested
        return honest

    def groups(self, sites: Sequence[str], fits: Fits) -> list[Group]:
        """Return the disjoint groups to ask for a sum each; none if no group that is left could tell anything.

        Args:
            sites: that may be asked. Where all else is equal, the first of them are left out first.
            fits: whether sites may form a sum.
        """
        suspected = sorted((site for site in sites if any(site in case for case in self.cases)), key=self._trust)
        if not suspected:
            return [tuple(sites)]
        ordered = suspected + [site for site in sites if site not in suspected]
        for count in range(len(sites) // 2, 1, -1):
            groups = [tuple(sorted(ordered[start::count])) for start in range(count)]
            if all(fits(group) for group in groups):
                return groups
        left_out: list[str] = []
        for site in suspected:
            kept = [other for other in ordered if other not in (*left_out, site)]
            if len(left_out) < (len(suspected) + 1) // 2 and fits(kept):
                left_out.append(site)
        if not left_out:
            return []
        return [tuple(sorted(set(sites) - set(left_out)))]

    def _trust(self, site: str) -> tuple[bool, int]:
        """Return how much speaks for a site; the least comes first."""
        return site in self.passed, -sum(site in group for group in self.failed)
