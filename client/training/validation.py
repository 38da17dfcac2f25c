"""Validation inside a round, on the site's own rows that are never trained on. The round's best adapter is sent.

The adapter that was received is the first candidate. If training never gets better than it, the update is zero.
"""

from __future__ import annotations

import logging
import math

from tsugiki.client.site.site import Site
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import DataError, TrainingError
from tsugiki.common.model.device import computing
from tsugiki.common.model.graft import Graft
from tsugiki.common.rng import generator
from tsugiki.common.tasks import Task
from tsugiki.common.tasks.base import Encoded, at_rest

log = logging.getLogger("tsugiki.client")


def training_shard(site: Site, task: Task, config: RunConfig) -> Shard:
    """Return the rows to train on: all rows of the site, without those held out if the run validates.

    Raises:
        DataError: `shard-too-small`, there are too few rows to hold any out; `clients`, the site is a gateway; or the
            shard cannot be read.
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
    # Without evaluation rows of its own, the site holds some training rows out.
    apart = set(held_out(len(whole), site.name, config))
    return whole.take([row for row in range(len(whole)) if row not in apart])


def validation_shard(site: Site, task: Task, config: RunConfig) -> Shard:
    """Return the rows to validate on: the site's evaluation rows if it has any, else held-out training rows.

    Raises:
        DataError: as `training_shard`.
    """
    kept = site.evaluation_shard(task)
    if kept is not None:
        return kept
    whole = site.train_shard(task)
    return whole.take(held_out(len(whole), site.name, config))


def held_out(rows: int, site: str, config: RunConfig) -> list[int]:
    """Return the numbers of the held-out rows, sorted; the same in every round.

    Args:
        rows: number of training rows.
        site: name of the site.
        config: `train.validation_fraction` is the share that is held out.

    Raises:
        DataError: `shard-too-small`, the share is less than one row, or all rows.
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
    """Measures the adapter every few steps, and keeps the best one of the round.

    Args:
        graft: the model, with the adapter that was received; it is measured at once.
        rows: the rows to validate on.
        config: the run.

    Raises:
        TrainingError: `validation-metric`, the metric that the run monitors is not finite for these rows.
    """

    def __init__(self, graft: Graft, rows: Encoded, config: RunConfig) -> None:
        self.graft = graft
        self.rows = rows
        self.config = config
        self.best = graft.read()
        self.best_step = 0
        self.misses = 0
        self.best_score = self._score()
        if not math.isfinite(self.best_score):
            raise TrainingError(
                f"the metric {config.metric} of {len(rows)} validation rows is no finite number",
                "a metric that these rows give",
                "more rows to validate on, or another evaluation.monitor",
                code="validation-metric",
            )

    def ends(self, done: int, steps: int) -> bool:
        """Measure the adapter every `train.validate_every_steps`; return whether to end the round.

        The round ends early after `train.local_patience` measurements without improvement.

        Args:
            done: steps of the round so far.
            steps: of the whole round; the adapter is always measured after the last one.
        """
        settings = self.config.train
        if done % settings.validate_every_steps and done < steps:
            return False
        score = self._score()
        self.misses += 1
        if score > self.best_score:  # never true for a NaN
            self.best = self.graft.read()
            self.best_score = score
            self.best_step = done
            self.misses = 0
        return bool(settings.local_patience) and self.misses >= settings.local_patience

    def restore(self) -> None:
        """Set the graft to the best adapter."""
        self.graft.write(self.best)
        value = -self.best_score if self._lower_is_better else self.best_score
        log.info("validation best_step=%d %s=%.6g", self.best_step, self.config.metric, value)

    @property
    def _lower_is_better(self) -> bool:
        return self.config.metric in self.graft.task.lower_is_better

    def _score(self) -> float:
        """Return the metric of the current adapter, negated if lower is better: higher is always better here."""
        import torch

        torch.set_num_threads(self.config.train.threads)
        precision = computing(self.config.train, self.graft.device.type)
        with torch.no_grad(), precision, at_rest(self.graft.base.network):
            found = self.graft.task.evaluate(self.graft.base, self.rows, self.config.evaluation.batch_size)
        value = found.get(self.config.metric, math.nan)
        return -value if self._lower_is_better else value
