"""Sites that are connected and do not answer: when they are asked again, and how long a round waits for them.

A site that was silent until a round closed is not asked in the next 1, 2, 4, ... rounds. Once a round has its quorum,
it waits for the silent site after the last answer of the others. Such waits add up to one `strategy.round_timeout_s`
at most; from then on the site is asked, but not waited for. An accepted update ends this. A new hello gives the site
half of that time again, the next one a quarter, and so on: two time-outs in all. A round without a quorum charges
nobody, because it would have been open for as long without the silent site.

All of it is forgotten with the process: a resumed run gives each site its patience anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from tsugiki.common.settings import FIRST_TIMEOUT_S
from tsugiki.server.engines.grid import RETURN_S, Deadline

LONGEST_REST = 16
"""Most rounds for which a silent site is not asked."""
LEAST_GRACE_S = 30.0
"""With `strategy.grace_s = "auto"`: how long a round stays open after its quorum at least."""
LEAST_TIMEOUT_S = 600.0
PACE_FACTOR = 4.0
"""With `strategy.round_timeout_s = "auto"`: a round lasts this many times as long as the slowest site needed, or
`LEAST_TIMEOUT_S` if that is longer."""
USUAL_FACTOR = 2.0
"""With `strategy.grace_s = "auto"`: a site may take this many times as long as it took the last time."""

Duty = Literal["train", "evaluate"]
_FINISHED: dict[str, Duty] = {"train": "train", "query.unmask": "train", "evaluate": "evaluate"}
"""The messages whose answer shows that a site does its duty, by their types. Other answers are steps on the way."""


@dataclass(frozen=True)
class _Silent:
    """A site that was silent, and has not done its duty since.

    Args:
        misses: how often in a row it was silent.
        asked_from: the round from which it is asked again.
        missed_in: the last round in which it was silent; -1 before the first.
        waited_s: how long it was waited for, after all others.
        hellos: how often it has said hello since; each halves how long it may be waited for.
    """

    misses: int = 0
    asked_from: int = 0
    missed_in: int = -1
    waited_s: float = 0.0
    hellos: int = 0


class Silence:
    """The silent sites of a run, and how long each site took when it last answered."""

    def __init__(self) -> None:
        self._silent: dict[tuple[Duty, str], _Silent] = {}
        self._usual_s: dict[tuple[str, str], float] = {}
        self._quorum_s: dict[str, float] = {}
        self._trained: set[str] = set()

    def resting(self, duty: Duty, round_number: int) -> dict[str, int]:
        """Return the sites that are not to be asked in a round, each with the round from which it is asked again."""
        return {
            site: one.asked_from
            for (kind, site), one in sorted(self._silent.items())
            if kind == duty and one.asked_from > round_number
        }

    def not_evaluating(self, round_number: int) -> dict[str, int]:
        """Return the sites that are not to be asked to evaluate after a round, each with its next possible round.

        They were silent in evaluation and are resting, or they were silent when they last trained.
        """
        found = self.resting("evaluate", round_number)
        for (duty, site), one in self._silent.items():
            if duty == "train":
                found[site] = max(found.get(site, 0), one.asked_from, round_number + 1)
        return dict(sorted(found.items()))

    def is_silent(self, duty: Duty, site: str) -> bool:
        """Return whether the site was silent when it was last asked to do this."""
        return (duty, site) in self._silent

    def has_trained(self, site: str) -> bool:
        """Return whether the site has handed in an update, as far as this process knows."""
        return site in self._trained

    def usual_s(self, kind: str, site: str) -> float | None:
        """Return how long the site took for its last answer to such a message; None: it has never answered one."""
        return self._usual_s.get((kind, site))

    def timeout_s(self) -> float:
        """Return how long a round may last at the pace of the sites, with `strategy.round_timeout_s = "auto"`."""
        trained_s = [seconds for (kind, _), seconds in self._usual_s.items() if kind.startswith("train")]
        if not trained_s:
            return FIRST_TIMEOUT_S
        return max(LEAST_TIMEOUT_S, PACE_FACTOR * max(trained_s))

    def quorum_came(self, kind: str, seconds: float) -> None:
        """Take note of how long the quorum of the answers to such messages took, if it has answered in full."""
        self._quorum_s[kind] = seconds

    def deadline_s(self, site: str, timeout_s: float, grace_s: float | Literal["auto"]) -> float:
        """Return by when a site's update should be here, in seconds from the request, at the pace of the last round.

        Args:
            site: its name.
            timeout_s: of the round.
            grace_s: `strategy.grace_s`.
        """
        quorum_s = self._quorum_s.get("train")
        usual_s = self.usual_s("train", site)
        # a site that was in the quorum decides when that is there: it must not be hurried by its own pace
        if quorum_s is None or (usual_s is not None and usual_s <= quorum_s):
            return timeout_s
        closes_s = self.closes_s("train", "train", site, quorum_s, timeout_s, grace_s)
        return min(timeout_s, closes_s, quorum_s + self.patience_s("train", site, timeout_s))

    def closes_s(
        self, duty: Duty, kind: str, site: str, quorum_s: float, timeout_s: float, grace_s: float | Literal["auto"]
    ) -> float:
        """Return when a round stops waiting for a site, in seconds from the request, whatever its patience.

        Args:
            duty: what the site is asked to do.
            kind: the message type.
            site: its name.
            quorum_s: when the quorum was in.
            timeout_s: of the round.
            grace_s: `strategy.grace_s`.
        """
        if grace_s != "auto":
            return quorum_s + grace_s
        usual_s = self.usual_s(kind, site)
        # a site that never answered may be slow, and one that was silent may have become slow: their patience counts
        if usual_s is None or self.is_silent(duty, site):
            return timeout_s
        return max(quorum_s + max(quorum_s, LEAST_GRACE_S), USUAL_FACTOR * usual_s)

    def patience_s(self, duty: Duty, site: str, whole_s: float) -> float:
        """Return how long a round may still wait for the site after all others.

        Args:
            duty: what it is asked to do.
            site: its name.
            whole_s: for a site that was never silent.
        """
        mine = self._silent.get((duty, site), _Silent())
        waited_s = mine.waited_s
        # a site that has not trained yet is waited for once, not once for each duty
        if duty == "train" and site not in self._trained:
            waited_s += self._silent.get(("evaluate", site), _Silent()).waited_s
        return max(0.0, whole_s * 0.5**mine.hellos - waited_s)

    def answered(self, kind: str, site: str, seconds: float) -> None:
        """Take note of an accepted answer to a message of this type."""
        self._usual_s[kind, site] = seconds
        duty = _FINISHED.get(kind)
        if duty is None:
            return
        self._silent.pop((duty, site), None)
        if duty == "train":
            self._trained.add(site)

    def came_late(self, site: str) -> None:
        """Take note that the site's answer to a request to train has come, though its round was closed."""
        self._silent.pop(("train", site), None)
        self._trained.add(site)

    def missed(self, duty: Duty, site: str, round_number: int, waited_s: float) -> None:
        """Take note of a site that was silent in a round, and of how long it was waited for after all others.

        Several attempts at one round count as one miss.
        """
        before = self._silent.get((duty, site), _Silent())
        missed = replace(before, waited_s=before.waited_s + waited_s)
        if before.missed_in != round_number:
            rest = min(2**before.misses, LONGEST_REST)
            missed = replace(
                missed, misses=before.misses + 1, asked_from=round_number + rest + 1, missed_in=round_number
            )
        self._silent[duty, site] = missed

    def said_hello(self, site: str) -> None:
        """Let a site that is new, or has come back, be asked at once."""
        for (duty, name), one in self._silent.items():
            if name == site:
                self._silent[duty, name] = _Silent(hellos=one.hellos + 1)


@dataclass
class Waiting:
    """The wait for the answers to one kind of message, which ends at `deadline`.

    Args:
        silence: of the run.
        duty: what the sites are asked to do.
        kind: the message type.
        missing: the sites that have not answered.
        deadline: of the exchange; it is moved forward once the quorum is in.
        patience_s: how long a silent site may be waited for in all, after all others.
        grace_s: how long the wait goes on after the quorum; "auto": see `StrategySettings.grace_s`.
        simulated: sites are late because of each other: the deadline stays, and nobody counts as silent.
        adapts: whether the quorum's pace may bring the deadline forward: `strategy.round_timeout_s = "auto"`.
        has_partial: whether an answer so far was of a part of the steps, which says nothing about the pace of the work.
    """

    silence: Silence
    duty: Duty
    kind: str
    missing: set[str]
    deadline: Deadline
    patience_s: float
    grace_s: float | Literal["auto"]
    simulated: bool
    adapts: bool = False
    has_partial: bool = False
    _timeout_s: float = field(init=False)
    _last_s: float | None = field(init=False, default=None)  # None: nobody has answered
    _quorum_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Remember the latest end."""
        self._timeout_s = self.deadline.after_s

    def heard(self, site: str, *, accepted: bool) -> None:
        """Take note of a site's first answer."""
        if site not in self.missing or self.simulated:
            return
        self.missing.remove(site)
        elapsed_s = self.deadline.elapsed_s
        self._last_s = elapsed_s
        if accepted:
            self.silence.answered(self.kind, site, elapsed_s)

    def settle(self, enough: Callable[[], bool]) -> None:
        """Move the deadline to the latest time until which a missing site is waited for, if the quorum is in.

        Args:
            enough: returns whether it is; not called again once it was.
        """
        if self.simulated:
            return
        if self._quorum_s is None:
            if not enough():
                return
            self._quorum_s = self.deadline.elapsed_s
            if not self.has_partial:
                self.silence.quorum_came(self.kind, self._quorum_s)
            if self.adapts and self._last_s is not None:  # else nobody has answered, and none need to
                self._timeout_s = min(self._timeout_s, max(LEAST_TIMEOUT_S, PACE_FACTOR * self._quorum_s))
        quorum_s = self._quorum_s
        self.deadline.after_s = max((self._ends_s(site, quorum_s) for site in self.missing), default=self._timeout_s)

    def _ends_s(self, site: str, quorum_s: float) -> float:
        """Return until when a missing site is waited for, from the start; the quorum was in after `quorum_s`."""
        ends_s = self.silence.closes_s(self.duty, self.kind, site, quorum_s, self._timeout_s, self.grace_s)
        patience_ends_s = (self._last_s or 0.0) + self.silence.patience_s(self.duty, site, self.patience_s)
        return min(ends_s, self._timeout_s, patience_ends_s)

    def return_s(self, wait_for_quorum_s: float) -> float:
        """Return how long a node that left may take to come back; with the quorum, as long as that took.

        Args:
            wait_for_quorum_s: as long as the quorum is missing, which may need this node.
        """
        if self._quorum_s is None:
            return max(RETURN_S, wait_for_quorum_s)
        if self.grace_s == "auto":
            return max(RETURN_S, self._quorum_s)
        return max(RETURN_S, self.grace_s)

    def close(self, round_number: int) -> list[str]:
        """Count the missing sites as silent in a round, and return their names, sorted."""
        if self.simulated:
            return []
        waited_s = 0.0
        # else nobody waited for these sites alone: the quorum was missing, or no site has answered
        if self._quorum_s is not None and self._last_s is not None:
            waited_s = self.deadline.elapsed_s - self._last_s
        for site in self.missing:
            self.silence.missed(self.duty, site, round_number, waited_s)
        return sorted(self.missing)
