"""The attacker of a privacy audit: it plants canaries in a run, and scores each by what every adversary may see.

The attacker knows everything that differential privacy lets it know: the canaries' updates, and the data of all other
clients. It does not know which canaries take part, nor the noise that others add. One site is curious: it has ordinary
clients only, and subtracts what it has sent itself, noise included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsugiki.common.privacy.canaries import Canaries, draw_canaries
from tsugiki.common.privacy.clipping import LEVELS, Levels
from tsugiki.common.privacy.mechanisms import Adversary
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.wire.spec import Vector
from tsugiki.server.budget.lower_bounds import Scores, Trials


@dataclass
class _Round:
    """What the attacker has seen of a round so far; sums are in levels, shape (dimension,).

    Args:
        number: counted from 1.
        before: the adapter that the sites started from.
        known: the sum of the clipped updates of ordinary clients at other sites.
        own: the sum of the clipped updates at the curious site.
        own_upload: what the curious site has sent, its noise included.
        clients: number of clients in the sum.
    """

    number: int
    before: Vector
    known: Levels
    own: Levels
    own_upload: Levels
    clients: int = 0

    @classmethod
    def begin(cls, number: int, before: Vector) -> _Round:
        """Return a round in which nothing was seen yet."""
        known, own, own_upload = (np.zeros(len(before), np.int64) for _ in range(3))
        return cls(number, before.copy(), known, own, own_upload)


class Attacker:
    """Plants canaries in one run (`common/privacy/canaries.py`), and scores them.

    The scores of all rounds add up, because a canary's update is the same in each. They are in clip norms: of a canary
    that took part, the score is the number of its rounds on average, of another one 0.

    Args:
        draw: the auditor's randomness.
    """

    def __init__(self, draw: np.random.Generator) -> None:
        self._draw = draw
        self._curious = ""
        self._sites: dict[str, str] = {}
        self._canaries: Canaries | None = None
        self._round: _Round | None = None
        self._plan: Plan | None = None
        self._scores: dict[Adversary, Scores] = {}

    def meet(self, clients: Mapping[str, Sequence[str]]) -> None:
        """Learn the names of the clients of each site. The first site is the curious one, if there are others."""
        self._sites = {name: site for site, names in clients.items() for name in names}
        if len(clients) > 1:
            self._curious = next(iter(clients))

    def canaries(self, dimension: int) -> Canaries:
        """Return the run's canaries: clients of all sites but the curious one."""
        if self._canaries is None:
            names = [name for name, site in self._sites.items() if site != self._curious]
            self._canaries = draw_canaries(names, dimension, self._draw)
            for adversary in ("release", "outsiders", "sums", "uploads"):
                self._scores[adversary] = np.zeros(len(self._canaries.names))
        return self._canaries

    def see(
        self, names: Sequence[str], round_number: int, received: Vector, plan: Plan, upload: Levels, known: Levels
    ) -> None:
        """Look at a site in a round; see `tsugiki.common.privacy.canaries.Auditor`."""
        self._plan = plan
        if self._round is None or self._round.number != round_number:
            self._settle(received)
            self._round = _Round.begin(round_number, received)
        now = self._round
        now.clients += len(names)
        if self._sites[names[0]] == self._curious:
            now.own += known
            now.own_upload += upload
        else:
            now.known += known
        # The server sees this upload, if it is not masked.
        canaries = self.canaries(plan.dimension)
        here = [canaries.numbers[name] for name in names if name in canaries.numbers]
        self._scores["uploads"][here] += canaries.scores((upload - known) / LEVELS)[here]

    def trials(self, last: Vector) -> dict[Adversary, Trials]:
        """Return the trials of each adversary.

        Args:
            last: the adapter after the last round, shape (dimension,).
        """
        self._settle(last)
        included = self.canaries(len(last)).included
        return {adversary: Trials(included, scores) for adversary, scores in self._scores.items()}

    def _settle(self, after: Vector) -> None:
        """Score the sum of the round. It follows from the adapters before and after it: their difference is the mean.

        Outsiders and a server under secure aggregation see no more than the sum.
        """
        now = self._round
        self._round = None
        if now is None or self._plan is None:
            return
        clients = self._plan.denominator or now.clients
        mean = after.astype(np.float64) - now.before
        others = mean * (clients / self._plan.clip_norm) - now.known / LEVELS
        canaries = self.canaries(len(after))
        self._scores["release"] += canaries.scores(others - now.own_upload / LEVELS)
        total = canaries.scores(others - now.own / LEVELS)
        self._scores["outsiders"] += total
        self._scores["sums"] += total


def pooled(runs: Sequence[Mapping[Adversary, Trials]], adversary: Adversary) -> Trials:
    """Return the trials of an adversary in several runs together."""
    included: list[npt.NDArray[np.bool_]] = [run[adversary].included for run in runs]
    return Trials(np.concatenate(included), np.concatenate([run[adversary].scores for run in runs]))
