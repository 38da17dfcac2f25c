"""Simulated sites: parts of one file, split over them by the run's seed."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import cycle, repeat, starmap
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.client.site.policy import TELLABLE, SitePolicy
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data import partition
from tsugiki.common.data.shard import Shard
from tsugiki.common.data.shard import read as read_shard
from tsugiki.common.errors import ConfigError, DataError, Problem
from tsugiki.common.files import make_folder
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.rng import generator
from tsugiki.common.tasks import TASKS, Task


@dataclass(frozen=True)
class SimulatedSite:
    """A site with a part of a simulation's file; a gateway has several parts, one for each of its clients.

    Args:
        name: of the site.
        config: the run.
        parts: row numbers of each client.
        max_rank: how many components of a LoRA pair this site trains; 0: all.
    """

    name: str
    config: RunConfig
    parts: tuple[tuple[int, ...], ...]
    max_rank: int = 0

    # A simulation is on one machine, so that its sites need not check the number of each other's clients.
    policy = SitePolicy(seeded_noise=True, tell=TELLABLE, clients_counted_per_site=10**6)

    @property
    def rows(self) -> tuple[int, ...]:
        """Row numbers of all clients, one client after the other."""
        return tuple(row for part in self.parts for row in part)

    def record(self, event: str, **details: Any) -> None:
        """No-op: the operator's audit log already covers simulated sites."""

    def admit(self, config: RunConfig) -> None:
        """No-op: a simulation has one run's settings."""

    def check_approved(self, config: RunConfig, plan: Plan | None) -> None:
        """No-op: to simulate a run is to say yes to it."""

    def begin_round(self, run: str, round_number: int) -> None:
        """No-op: a simulated site has no life beyond its run."""

    def charging(self) -> AbstractContextManager[dict[str, Any]]:
        """Return no fields: there is no audit log to anchor."""
        return nullcontext({})

    def identity(self) -> str:
        """Return the name and a hash of the settings that the site's rows follow from."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        body = self.config.model_dump_json(include={"simulation": True, "data": True, "task": True, "run": {"seed"}})
        return f"{self.name}:{hashlib.sha256(body.encode()).hexdigest()}"

    def node_key(self) -> None:
        """Return None: simulated sites have no node keys."""

    def model_source(self, model_name: str) -> str:
        """Return the name itself: a simulation is on one machine, so that the operator's model is the site's."""
        return model_name

    def train_shard(self, task: Task) -> Shard:
        """Return this site's rows without those kept for evaluation."""
        return _whole(self.config).take(self.split_rows()[0])

    def evaluation_shard(self, task: Task) -> Shard | None:
        """Return the rows kept for evaluation: `simulation.evaluation_fraction` of all rows. None if there are none."""
        kept = self.split_rows()[1]
        if not kept:
            return None
        return _whole(self.config).take(kept)

    def clients(self, shard: Shard) -> list[list[int]]:
        """Return the positions of each client's rows in the training shard."""
        # The training shard has the clients' rows one client after the other, without those kept for evaluation.
        kept = set(self.split_rows()[1])
        start = 0
        found = []
        for part in self.parts:
            count = sum(row not in kept for row in part)
            found.append(list(range(start, start + count)))
            start += count
        return found

    def ledger_path(self) -> Path | None:
        """Return the ledger of what DP-SGD costs rows; None without DP-SGD.

        The clients of a simulation exist in it alone, so that the operator's ledger is theirs.
        """
        if not self.config.privacy.examples.enabled:
            return None
        folder = Path(self.config.run.output_dir) / self.config.run.name / "site-ledgers"
        make_folder(folder, parents=True)
        return folder / f"{self.name}.jsonl"

    def split_rows(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the rows to train on, and of the rows kept for evaluation."""
        kept = int(len(self.rows) * self.config.simulation.evaluation_fraction)
        order = generator(self.config.run.seed, "evaluation-rows", self.name).permutation(len(self.rows))
        chosen = {self.rows[index] for index in order[:kept]}
        return [row for row in self.rows if row not in chosen], [row for row in self.rows if row in chosen]


def _whole(config: RunConfig) -> Shard:
    """Return the file that a simulation splits, read once per process."""
    return _read_whole(config.model_dump_json())


@lru_cache(maxsize=2)
def _read_whole(text: str) -> Shard:
    config = parse(json.loads(text))
    task = TASKS.get(config.task.name)(config.task)
    extra_columns: tuple[str, ...] = ()
    if config.simulation.partition == "by-column":
        extra_columns = (config.simulation.column,)
    shard = read_shard(
        Path(config.simulation.data),
        task.columns,
        config.data,
        labels=task.labels,
        extra_columns=extra_columns,
    )
    wanted = config.simulation.rows
    if wanted > len(shard):
        raise DataError(
            f"simulation.rows = {wanted} is more than there are",
            f"at most the {len(shard)} rows of the file",
            code="shard-too-small",
        )
    if wanted:
        drawn = generator(config.run.seed, "rows").choice(len(shard), wanted, replace=False)
        return shard.take(sorted(int(row) for row in drawn))
    return shard


def simulated_sites(config: RunConfig) -> tuple[SimulatedSite, ...]:
    """Return the sites of a simulation, each with its part of the file; the same split in every process of a run.

    Raises:
        ConfigError, DataError: the file cannot be split as asked.
    """
    return _split(config.model_dump_json())


@lru_cache(maxsize=2)
def _split(text: str) -> tuple[SimulatedSite, ...]:
    config = parse(json.loads(text))
    if not config.simulation.data:
        problem = Problem("simulation.data", "''", "the file to split over the sites", "name it")
        raise ConfigError("run file", [problem])
    shard = _whole(config)
    simulation = config.simulation
    seed = config.run.seed
    # Clients first: each gets a part of the rows.
    parts: dict[str, Any]
    if simulation.partition == "by-column":
        parts = dict(partition.by_column(shard.extra[simulation.column]))
    elif simulation.partition == "dirichlet":
        labels = shard.columns.get("label")
        if labels is None:
            problem = Problem(
                "simulation.partition",
                "'dirichlet'",
                '"iid" or "by-column" where a task has no label column',
                'use "iid"',
            )
            raise ConfigError("run file", [problem])
        split = partition.dirichlet(
            np.asarray(labels), simulation.clients, simulation.dirichlet_alpha, simulation.min_rows, seed
        )
        parts = dict(zip(partition.site_names(simulation.clients), split, strict=True))
    else:
        split = partition.iid(len(shard), simulation.clients, seed)
        parts = dict(zip(partition.site_names(simulation.clients), split, strict=True))
    rows = [tuple(int(row) for row in parts[name]) for name in sorted(parts)]
    # Then sites: each has one client, or as a gateway several.
    each = simulation.clients_per_site
    groups = [tuple(rows[start : start + each]) for start in range(0, len(rows), each)]
    names = sorted(parts)
    if each > 1:
        names = partition.site_names(len(groups))
    ranks = cycle(simulation.ranks or (0,))
    return tuple(starmap(SimulatedSite, zip(names, repeat(config), groups, ranks, strict=False)))
