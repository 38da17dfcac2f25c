"""The training of a site in one round, and the updates of some of its clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.client.training.trainer import LocalRound, Watch
from tsugiki.common.config.run import RunConfig
from tsugiki.common.model.graft import Graft
from tsugiki.common.strategies import strategy_of
from tsugiki.common.tasks.base import Encoded, Tail
from tsugiki.common.wire.messages import TrainRequest
from tsugiki.common.wire.spec import AdapterSpec, Vector


@dataclass(frozen=True)
class Job:
    """The training of a site in one round.

    Args:
        graft: the model. All clients use it in turn.
        encoded: the site's rows.
        clients: row numbers of each client to train, by its name.
        config: the run.
        request: the round.
        received: the adapter to start from, shape (size,).
        watch: called after each step.
        validation: rows to validate on inside the round; None if the run does not validate there.
        moments: the optimiser's state of each client, to be changed in place; empty if the run does not keep it.
        rank: how many components of each LoRA pair this site trains; 0: all.
        class_shares: of the federation, to which the losses are adjusted; empty: they are not.
        tail: returns the trainable end of the network with the features of all rows, or None if the task has none. It
            is a function because few jobs use the features, which cost a pass over all rows within the deadline.
    """

    graft: Graft
    encoded: Encoded
    clients: Mapping[str, Sequence[int]]
    config: RunConfig
    request: TrainRequest
    received: Vector
    watch: Watch
    validation: Encoded | None = None
    moments: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    rank: int = 0
    class_shares: tuple[float, ...] = ()
    tail: Callable[[], Tail | None] = lambda: None

    @property
    def part(self) -> AdapterSpec:
        """The part of the adapter that is trained in this round and sent back."""
        return strategy_of(self.config.strategy).trained_part(self.graft.spec, self.request.round)

    def local_round(self, client: str, deadline_s: float) -> LocalRound:
        """Return the round of one client."""
        return LocalRound(
            seed=self.config.run.seed,
            site=client,
            round_number=self.request.round,
            schedule_start=self.request.schedule_start,
            schedule_stop=self.request.schedule_stop,
            proximal_mu=self.config.strategy.proximal_mu,
            deadline_s=deadline_s,
            # a gateway's clients train one after the other: the time of the first must not be that of all
            partial=self.request.partial and len(self.clients) == 1,
            moments=self.moments.get(client),
            class_shares=self.class_shares,
        )


@dataclass(frozen=True)
class ClientUpdates:
    """The updates of clients that were trained together.

    Args:
        names: of the clients.
        updates: local minus received adapters, shape (clients, size); not finite where training diverged.
        losses: mean loss of each client, shape (clients,); not finite where training diverged, 0 without rows.
        steps: optimiser steps of all of them together.
    """

    names: list[str]
    updates: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    steps: int
