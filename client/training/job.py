"""What a site is to do in one round, and what some of its clients have learned in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.client.training.trainer import Plan, Watch
from tsugiki.common.config.run import RunConfig
from tsugiki.common.model.graft import Graft
from tsugiki.common.strategies import strategy_of
from tsugiki.common.tasks.base import Encoded, Tail
from tsugiki.common.wire.messages import TrainRequest
from tsugiki.common.wire.spec import AdapterSpec, Vector


@dataclass(frozen=True)
class Job:
    """What a site does in one round.

    Args:
        graft: the model, shared by all clients in turn.
        encoded: the site's rows.
        clients: the rows of each client that is asked, by its name.
        config: the run.
        request: the round.
        received: the adapter to start from, shape (size,).
        watch: sees every step.
        tail: returns the end of the network with the features of all rows, where there is one that is trained alone.
        validation: returns the rows to validate on inside the round; None where that is not asked for.
        moments: returns what a client's optimiser remembers, to be changed in place; None where it remembers nothing.
        rank: how many components of each LoRA pair this site trains; 0: all.
    """

    graft: Graft
    encoded: Encoded
    clients: Mapping[str, Sequence[int]]
    config: RunConfig
    request: TrainRequest
    received: Vector
    watch: Watch
    tail: Callable[[], Tail | None] = lambda: None
    validation: Callable[[], Encoded | None] = lambda: None
    moments: Callable[[str], dict[str, Any] | None] = lambda client: None
    rank: int = 0

    @property
    def part(self) -> AdapterSpec:
        """What of the adapter is trained in this round, and sent back."""
        return strategy_of(self.config.strategy).trained_part(self.graft.spec, self.request.round)

    def plan(self, client: str, deadline_s: float) -> Plan:
        """Return what one client does."""
        return Plan(
            seed=self.config.run.seed,
            site=client,
            round=self.request.round,
            schedule_start=self.request.schedule_start,
            schedule_stop=self.request.schedule_stop,
            proximal_mu=self.config.strategy.proximal_mu,
            deadline_s=deadline_s,
            moments=self.moments(client),
        )


@dataclass(frozen=True)
class Group:
    """What clients that were trained together have learned.

    Args:
        names: of the clients.
        updates: local minus received adapters, shape (clients, size); not finite where training diverged.
        losses: each one's mean loss, shape (clients,); not finite likewise, 0 without rows.
        steps: optimiser steps of all of them.
    """

    names: list[str]
    updates: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    steps: int
