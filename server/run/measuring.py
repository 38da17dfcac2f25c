"""What the server measures about the updates of an open round: the aggregation error, and how far updates agree."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tsugiki.common.files import read_lines
from tsugiki.common.strategies import strategy_of
from tsugiki.common.strategies.factors import pairs
from tsugiki.common.strategies.products import aggregation_error
from tsugiki.common.wire.spec import AdapterSpec

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
    from tsugiki.common.strategies.base import WeightedUpdate
    from tsugiki.common.wire.spec import Vector
    from tsugiki.server.run.roster import Member

SHARE = 0.05
"""The most that measuring may take of a run's time."""
NEGLIGIBLE_S = 0.02
"""A measurement that is shorter than this is made in every round."""
MOST_BYTES = 2**30
"""Updates that only the measurement needs are kept up to this many bytes a round."""
LOW_COSINE = 0.3
"""Below this mean cosine of the updates of round 1, a run that began with a random head says what helps against skewed
data. Measured: see docs/skew.md. After a linear probe, updates of alike sites hardly agree either."""
LABEL_SKEW = 0.25
"""Above this `label_skew`, the sites of a run that began with a linear probe adjust their losses to their own shares of
the classes."""

SKEW_NOTE = (
    "the updates of the sites hardly agree (mean cosine {cosine:.2f}): their data differ much. What helps: "
    'train.optimizer = "sgd" with strategy.name = "fedavgm" and server_momentum = 0.5. See docs/skew.md'
)
ADJUSTED_NOTE = (
    "the sites have different classes (label skew {skew:.2f} of 1): each adjusts its loss to its own shares of them "
    "(task.logit_adjustment)"
)
LABEL_SKEW_NOTE = (
    "the sites have different classes (label skew {skew:.2f} of 1). What helps: "
    'task.logit_adjustment = "auto", without train.validate_every_steps. See docs/skew.md'
)


def label_skew(counts: npt.NDArray[np.float64]) -> float:
    """Return how far the sites' shares of the classes are from those of all rows, in the mean over rows.

    It is the total variation distance, less what chance alone would give rows that are split at random: for a site of n
    rows half the sum over classes of sqrt(2 p (1 - p) / (pi n)), the mean deviation of a binomial share p.

    Args:
        counts: rows of each class at each site, shape (sites, classes); no site is empty.

    Returns:
        About 0 for a random split, near 1 where no two sites share a class.
    """
    rows = counts.sum(axis=1)
    shares = counts.sum(axis=0) / rows.sum()
    distance = np.abs(counts / rows[:, None] - shares).sum(axis=1) / 2
    chance = np.sqrt(2 * shares * (1 - shares) / (np.pi * rows[:, None])).sum(axis=1) / 2
    return max(0.0, float(np.average(distance - chance, weights=rows)))


def class_shares(counts: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Return the share of each class in the federation, all above 0.

    Args:
        counts: rows of each class, as they weigh in the mean of the sites, shape (classes,).
    """
    one_more = counts + 1.0
    return tuple((one_more / one_more.sum()).tolist())


@dataclass
class Pace:
    """How often the aggregation error is measured: so seldom that it takes at most `SHARE` of the time.

    Only the record of a run depends on it, never the model.
    """

    next_round: int = 0

    def is_due(self, round_number: int) -> bool:
        """Return whether to measure in this round."""
        return round_number >= self.next_round

    def took(self, round_number: int, seconds: float, round_s: float) -> None:
        """Plan the next measurement after one that took `seconds` in a round of `round_s` seconds without it."""
        every = 1
        if seconds > NEGLIGIBLE_S:
            every = max(1, math.ceil(seconds / (SHARE * max(round_s, 1e-3))))
        self.next_round = round_number + every


def started_warm(folder: Path) -> bool:
    """Return whether the run in a folder began with a head in closed form."""
    return any("warm_head" in line for line in read_lines(folder / "metrics.jsonl")[:1])


def measures_error(
    config: RunConfig, spec: AdapterSpec, pace: Pace, round_number: int, cohort: Sequence[Member]
) -> bool:
    """Return whether this round's aggregation error is to be measured, for which its updates have to be kept."""
    if config.strategy.aggregation_error == "off" or not pace.is_due(round_number):
        return False
    # without LoRA there is no error; a gateway sends a mean of its clients' factors, from which it cannot be found
    if not pairs(spec) or any(member.clients > 1 for member in cohort):
        return False
    return strategy_of(config.strategy).needs_each_update or 4 * spec.size * len(cohort) <= MOST_BYTES


def timed_error(
    spec: AdapterSpec, before: Vector, after: Vector, updates: Sequence[WeightedUpdate]
) -> tuple[float | None, float]:
    """Return the aggregation error (see `products.py`) and the seconds that it took."""
    started = time.perf_counter()
    error = aggregation_error(spec, before, after, updates)
    return error, time.perf_counter() - started
