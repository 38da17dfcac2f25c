"""How much one site may move an open round: a cap on its weight, and a bound on the norm of its update.

A site's number of rows is its own word, and so is its update. A site that claims 10^18 rows would be the model, and so
would one that sends a hundred times the update of the others. Two rules bound both:

- **Weight.** With `strategy.weighting = "capped"` a site weighs its rows, but no more than a share of the round:
  `max_site_share`, or an equal share of the round's sites where that is more. The cap follows from the sites that
  replied, so the share holds if sites drop out. Of two sites, each has an equal share of one half: with the default
  share they weigh the same, whatever their rows.
- **Norm.** An update longer than `norm_tolerance` times a typical one is scaled down to that length. Typical is the
  median norm of the round or of the round before, whichever is larger, so norms may fall from round to round. A median
  of fewer than three updates can be one site's choice: there the norms of the last rounds are joined to them. Of two
  sites nobody can say which update is the outlier: there the tolerance is at least 2, with which the median, half-way
  between both, clips neither.

  At a tolerance of 1, the default, about half of the updates are clipped a little, and no site moves the model further
  than a typical one. A larger tolerance is what a liar gets: at 5, one reversed update of six cancels the others
  (`docs/studies/robustness.md`).

Both rules need all replies, and the server keeps no updates (`sums.py`). But most updates cannot be affected: those
within the bound that the round before allows, of sites that are not among the largest so far. They are added to the
running mean as they arrive. The others wait in a file until all replies are there: all updates of round 1, outliers
and the sites with the most rows. Sums on the grid are exact, so it changes no bit whether an update waited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import median

from tsugiki.common.settings import StrategySettings
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.run.kept import LARGE_BYTES, KeptUpdates
from tsugiki.server.run.late import discounted
from tsugiki.server.run.replies import Accepted
from tsugiki.server.run.sums import RunningMean

FEW = 3
"""With fewer updates than these, a round's median is joined by the norms of the last rounds. One liar of three cannot
move the median beyond an honest norm."""
RECENT = 8
"""How many norms are remembered from round to round."""
TWO = 2
TOLERANCE_OF_TWO = 2.0
"""Of two updates, the median is half-way between both: neither is longer than twice that."""
FAR = 3.0
"""A site is named whose update is longer than this many times a typical one; honest ones differ by less."""
DOMINANT = 4
"""A site with more than this many times the median site's rows is dominant."""


def weights_of(rows: Mapping[str, int], settings: StrategySettings) -> dict[str, int]:
    """Return the weight of each site in a mean, by site name.

    Args:
        rows: of each site, at least 1; there may be no site.
        settings: of the strategy.
    """
    if settings.weighting == "equal":
        return dict.fromkeys(rows, 1)
    if settings.weighting == "rows" or not rows:
        return dict(rows)
    cap = weight_cap(list(rows.values()), settings.max_site_share)
    return {site: min(count, cap) for site, count in rows.items()}


def weight_cap(rows: Sequence[int], max_share: float) -> int:
    """Return the largest weight with which no site has more than a share of all.

    If k sites weigh the cap c and the others R rows together, c = s (k c + R), so c = s R / (1 - k s). The answer is
    the c of the smallest k for which the other sites are within c. There is one, because s is at least 1 / n.

    Args:
        rows: of each of n sites, at least 1; n is at least 1.
        max_share: s; 1 / n counts where that is more.
    """
    ordered = sorted(rows, reverse=True)
    share = max(Fraction(max_share), Fraction(1, len(ordered)))
    others = sum(ordered)
    capped = 0
    while True:
        cap = math.floor(share * others / (1 - capped * share))  # exact: 10^18 + 1 is no float
        if ordered[capped] <= cap:
            return cap
        others -= ordered[capped]
        capped += 1


def dominant_sites(rows: Mapping[str, int]) -> list[str]:
    """Return the sites, of at least two, that have far more rows than the others.

    That is over `DOMINANT` times the median, or over half of all rows; of two sites, over `DOMINANT` times the other.
    """
    if len(rows) < 2:
        return []
    counts = list(rows.values())
    most = min(DOMINANT * median(counts), sum(counts) / 2)
    if len(rows) == 2:
        most = DOMINANT * min(counts)
    return sorted(site for site, count in rows.items() if count > most)


def remembered_norms(before: Sequence[float], norms: Sequence[float]) -> tuple[float, ...]:
    """Return the norms whose median is typical after a round, at most `RECENT`.

    Args:
        before: the norms that were remembered before the round.
        norms: of the round's updates. Updates of zero say nothing.
    """
    moved = sorted(norm for norm in norms if norm > 0)
    if len(moved) < FEW:
        return (*before, *moved)[-RECENT:]
    cut = max(0, (len(moved) - RECENT + 1) // 2)
    return tuple(moved[cut : len(moved) - cut])  # those in the middle have the same median


def tolerance_of(count: int, tolerance: float) -> float:
    """Return how many times a typical norm the updates of a round may have.

    Args:
        count: of the updates.
        tolerance: `strategy.norm_tolerance`; 0: no bound.
    """
    if tolerance and count <= TWO:
        return max(tolerance, TOLERANCE_OF_TWO)
    return tolerance


def norm_bound(tolerance: float, before: Sequence[float], after: Sequence[float] = ()) -> float:
    """Return the largest norm that an update of a round may have; infinite where nothing says what is typical.

    Args:
        tolerance: how many times a typical norm; 0: no bound.
        before: the norms that were remembered before the round.
        after: those that are remembered after it, see `remembered_norms`.
    """
    known = [median(norms) for norms in (before, after) if norms]
    if not tolerance or not known:
        return math.inf
    return tolerance * max(known)


@dataclass(frozen=True)
class Settled:
    """The verdict on a round's updates when all are there.

    Args:
        accepted: the replies, with their weights and the norms that they were clipped to.
        norms: to remember for the next round.
        far: those whose updates were not only clipped, but far longer than a typical one.
    """

    accepted: Sequence[Accepted]
    norms: tuple[float, ...]
    far: Sequence[Accepted] = ()


class BoundedMean:
    """The mean of a round's updates, in which no site has more than its share.

    Args:
        folder: of the run, for updates that wait.
        size: of an update.
        count: the most updates that may be added.
        settings: of the strategy.
        before: the norms that are remembered from the rounds before.
    """

    def __init__(
        self, folder: Path, size: int, count: int, settings: StrategySettings, before: Sequence[float]
    ) -> None:
        self.mean = RunningMean(size, count)
        self._settings = settings
        self._before = before
        self._waiting = KeptUpdates(folder, size, LARGE_BYTES)
        self._surely_within = norm_bound(settings.norm_tolerance, before)
        if settings.norm_tolerance and not before:
            self._surely_within = 0.0
        # no more sites than these can weigh more than the share: more of them would have more than all
        self._most_capped = 0
        if settings.weighting == "capped":
            self._most_capped = math.ceil(1 / Fraction(settings.max_site_share)) - 1
        self._largest: list[int] = []  # the most rows of single sites so far, as many as can be capped

    def add(self, reply: Accepted) -> None:
        """Add an accepted reply's update, or let it wait.

        Raises:
            StorageError: the update has to wait, and cannot be written.
        """
        if reply.late_by or self._may_be_capped(reply.rows) or reply.norm > self._surely_within:
            self._waiting.add(WeightedUpdate(reply.site, reply.update, reply.rows, reply.clients))
            return
        weight = 1 if self._settings.weighting == "equal" else reply.rows
        self.mean.add(reply.update, reply.norm, weight)

    def _may_be_capped(self, rows: int) -> bool:
        """Return whether a site is among the largest so far; if not, it will not be among the largest of all."""
        self._largest = sorted([*self._largest, rows], reverse=True)
        as_large = sum(one >= rows for one in self._largest) - 1  # without itself
        del self._largest[self._most_capped :]
        return as_large < self._most_capped

    def settle(self, accepted: Sequence[Accepted]) -> Settled:
        """Add the updates that waited, within the round's cap and bound, and return the verdict on all of them.

        Args:
            accepted: the replies that were added; their updates are not needed.
        """
        after = remembered_norms(self._before, [reply.norm for reply in accepted])
        tolerance = tolerance_of(len(accepted), self._settings.norm_tolerance)
        bound = norm_bound(tolerance, self._before, after)
        weights = weights_of({reply.site: reply.rows for reply in accepted}, self._settings)
        weights |= {reply.site: discounted(weights[reply.site], reply.late_by) for reply in accepted if reply.late_by}
        settled = []
        for reply in accepted:
            clipped_to = bound if reply.norm > bound else None
            settled.append(replace(reply, weight=weights[reply.site], clipped_to=clipped_to))
        self._waiting.settle(settled_weights(settled), clip_factors(settled))
        for one in self._waiting.one_by_one():
            self.mean.add(one.update, l2_norm(one.update), one.weight)
            del one  # or it would stay in memory while the next one is read
        # as they were clipped: an outlier must not pass for typical in the next round
        norms = remembered_norms(self._before, [reply.norm_in_mean for reply in settled])
        return Settled(settled, norms, far_beyond(settled, tolerance))


def far_beyond(accepted: Sequence[Accepted], tolerance: float) -> list[Accepted]:
    """Return the replies whose updates were not only clipped, but far longer than a typical one.

    Args:
        accepted: the replies of a round, settled.
        tolerance: how many times a typical norm they were clipped to.
    """
    clipped = [(reply, reply.clipped_to) for reply in accepted if reply.clipped_to is not None]
    return [reply for reply, bound in clipped if reply.norm > FAR * bound / tolerance]


def settled_weights(accepted: Sequence[Accepted]) -> dict[str, int]:
    """Return the weight of each site's update in the mean."""
    return {reply.site: reply.weight for reply in accepted}


def clip_factors(accepted: Sequence[Accepted]) -> dict[str, float]:
    """Return by how much the update of each clipped site is scaled, below 1."""
    return {reply.site: reply.clipped_to / reply.norm for reply in accepted if reply.clipped_to is not None}
