"""Validation inside a round, on rows of the site's own that are never trained on: the round's best adapter is sent.

The adapter that was received is the first candidate. Where training never gets better than that, the update is zero.
"""

from __future__ import annotations

import logging
import math

from tsugiki.client.site.site import Site
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import DataError, TrainingError
from tsugiki.common.model.graft import Graft
from tsugiki.common.rng import generator
from tsugiki.common.tasks import Task
from tsugiki.common.tasks.base import Encoded, at_rest

log = logging.getLogger("tsugiki.client")


def training_shard(site: Site, task: Task, config: RunConfig) -> Shard:
    """Return the rows to train on: all of the site's, but for those held out where the run validates.

    Raises:
        DataError: `shard-too-small`, there are too few to hold any out; `clients`, the site is a gateway; and what is
            wrong with the shard.
    """
    whole = site.train_shard(task)
    if not config.train.validate_every_steps:
        return whole
    if len(site.clients(whole)) > 1:
        raise DataError(
            "this site is a gateway with clients of its own",
            "one client a site, as the run validates inside a round",
            "leave train.validate_every_steps at 0",
            code="clients",
        )
    if site.evaluation_shard(task) is not None:
        return whole
    apart = set(held_out(len(whole), site.name, config))
    return whole.take([row for row in range(len(whole)) if row not in apart])


def validation_shard(site: Site, task: Task, config: RunConfig) -> Shard:
    """Return the rows to validate on: the site's evaluation rows, or else those held out of its training rows.

    Raises:
        DataError: as `training_shard`.
    """
    kept = site.evaluation_shard(task)
    if kept is not None:
        return kept
    whole = site.train_shard(task)
    return whole.take(held_out(len(whole), site.name, config))


def held_out(rows: int, site: str, config: RunConfig) -> list[int]:
    """Return which of so many rows are held out: `train.validation_fraction` of them, the same in every round.

    Raises:
        DataError: `shard-too-small`, that is less than one row, or all of them.
    """
    fraction = config.train.validation_fraction
    count = int(rows * fraction)
    if not 0 < count < rows:
        raise DataError(
            f"train.validation_fraction = {fraction:g} of {rows} rows is {count}",
            "at least one row to hold out, and one to train on",
            "more rows, data.evaluation in site.toml, or train.validate_every_steps = 0",
            code="shard-too-small",
        )
    return sorted(generator(config.run.seed, "validation-rows", site).permutation(rows)[:count].tolist())


class BestOfRound:
    """Looks at the adapter every few steps, and keeps the best one of the round.

    Args:
        graft: at the adapter that was received, which is measured at once.
        rows: to validate on.
        config: the run.

    Raises:
        TrainingError: `validation-metric`, these rows do not give the metric that the run watches.
    """

    def __init__(self, graft: Graft, rows: Encoded, config: RunConfig) -> None:
        self.graft, self.rows, self.config = graft, rows, config
        self.best, self.best_step, self.misses = graft.read(), 0, 0
        self.best_score = self._score()
        if not math.isfinite(self.best_score):
            raise TrainingError(
                f"the metric {config.monitor} of {len(rows)} validation rows is no finite number",
                "a metric that these rows give",
                "more rows to validate on, or another evaluation.monitor",
                code="validation-metric",
            )

    def ends(self, done: int, steps: int) -> bool:
        """Measure the adapter, if it is time to; return whether `train.local_patience` is at its end.

        Args:
            done: steps of the round so far.
            steps: of the whole round; after the last one it is always time.
        """
        settings = self.config.train
        if done % settings.validate_every_steps and done < steps:
            return False
        score = self._score()
        self.misses += 1
        if score > self.best_score:  # a NaN is not
            self.best, self.best_score, self.best_step, self.misses = self.graft.read(), score, done, 0
        return bool(settings.local_patience) and self.misses >= settings.local_patience

    def restore(self) -> None:
        """Set the graft to the best adapter."""
        self.graft.write(self.best)
        value = -self.best_score if self._lower_is_better else self.best_score
        log.info("validation best_step=%d %s=%.6g", self.best_step, self.config.monitor, value)

    @property
    def _lower_is_better(self) -> bool:
        return self.config.monitor in self.graft.task.lower_is_better

    def _score(self) -> float:
        """Return the metric of the adapter as it is; higher is better, whatever the metric."""
        import torch

        torch.set_num_threads(self.config.train.threads)
        with torch.no_grad(), at_rest(self.graft.base.network):
            found = self.graft.task.evaluate(self.graft.base, self.rows, self.config.evaluation.batch_size)
        value = found.get(self.config.monitor, math.nan)
        return -value if self._lower_is_better else value
