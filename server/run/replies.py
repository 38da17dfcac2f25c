"""A request to a site, the verdict on its reply, and the replies of one attempt at a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from tsugiki.common.errors import Code
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.wire.arrays import PackedLevels
from tsugiki.common.wire.spec import Vector
from tsugiki.server.run.kept import KeptUpdates
from tsugiki.server.run.sums import RunningMean

_NO_UPDATE: Vector = np.zeros(0, np.float32)
_NO_LEVELS = PackedLevels(np.zeros(0, np.uint8), 8)


@dataclass(frozen=True)
class Asked:
    """A request to one site in one round.

    Args:
        site: its name.
        node_id: where the request was sent.
        round_number: counted from 1.
        nonce: the reply has to repeat it.
        rows: of the site, by its hello; its reply weighs at most as much.
        clients: how many of the site's clients were asked.
    """

    site: str
    node_id: int
    round_number: int
    nonce: str
    rows: int
    clients: int = 1


@dataclass(frozen=True)
class Accepted:
    """An accepted reply of an open run.

    Args:
        site: its name.
        update: shape (size,), float32; empty once it was added to a sum.
        rows: that it was trained on, at most as many as in the hello.
        loss: mean training loss; None: the site does not share it.
        steps: optimiser steps.
        seconds: duration of training.
        norm: L2 norm of the update.
        size_bytes: of the reply's arrays.
        clients: how many clients' updates are averaged in it.
        weight: in the round's mean; 0 until all replies are there (`influence.py`).
        clipped_to: the norm that the update was scaled down to; None: it was short enough.
        missed_steps: of the round, for which the site's time was too short.
        late_by: how many rounds ago the site was asked; its weight is discounted for it (`late.py`).
    """

    site: str
    update: Vector
    rows: int
    loss: float | None
    steps: int
    seconds: float
    norm: float
    size_bytes: int
    clients: int = 1
    weight: int = 0
    clipped_to: float | None = None
    missed_steps: int = 0
    late_by: int = 0

    @property
    def norm_in_mean(self) -> float:
        """L2 norm of the update as it is in the mean."""
        if self.clipped_to is None:
            return self.norm
        return self.clipped_to

    def without_update(self) -> Accepted:
        """Return what remains of the reply when its update is in a sum."""
        return replace(self, update=_NO_UPDATE)


@dataclass(frozen=True)
class AcceptedSum:
    """An accepted reply of a private run: the protected sum over a site's clients, and nothing else.

    Under secure aggregation `levels` is masked: uniform integers modulo 2^bits, without meaning by themselves.

    Args:
        site: its name.
        levels: still packed; empty once they were added to a sum.
        clients: in the sum.
        size_bytes: of the reply's arrays.
    """

    site: str
    levels: PackedLevels
    clients: int
    size_bytes: int

    def without_levels(self) -> AcceptedSum:
        """Return what remains of the reply when its levels are in a sum."""
        return replace(self, levels=_NO_LEVELS)


Content = TypeVar("Content")


@dataclass(frozen=True)
class AcceptedStep(Generic[Content]):
    """An accepted answer to a step of secure aggregation; `content` is its decoded fields."""

    site: str
    content: Content
    clients: int
    size_bytes: int


@dataclass(frozen=True)
class Rejected:
    """A rejected reply. `reason` is a code; `detail` contains numbers only."""

    site: str
    reason: Code
    detail: str = ""
    size_bytes: int = 0


Upload = TypeVar("Upload", bound=Accepted | AcceptedSum)


@dataclass(frozen=True)
class Collected(Generic[Upload]):
    """The replies of one attempt at a round.

    Args:
        accepted: sorted by site name.
        rejected: dropouts included.
        bytes_down: sent to all sites together.
        bytes_up: received from all sites together.
        wait_s: from the first request to the last reply.
    """

    accepted: Sequence[Upload]
    rejected: Sequence[Rejected]
    bytes_down: int
    bytes_up: int
    wait_s: float

    @property
    def clients(self) -> int:
        """How many clients' updates were accepted."""
        return sum(reply.clients for reply in self.accepted)

    @property
    def searching(self) -> bool:
        """Whether the attempt was a step in the search for a site that spoils sums, which ends by itself."""
        return False


@dataclass(frozen=True)
class CollectedMean(Collected[Accepted]):
    """The replies of one attempt at an open round, without their updates.

    Args:
        mean: of the accepted updates, by their weights.
        kept: the updates themselves, where something needs them one by one; else None.
        norms: to remember for the next round.
    """

    mean: RunningMean
    kept: KeptUpdates | None
    norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class CollectedSum(Collected[AcceptedSum]):
    """The replies of one attempt at a private round.

    Args:
        total: the sum of the accepted, shape (size,), unmasked.
        spoiled: whether a sum was opened that honest sites cannot make.
        left_out: sites that were not asked, because sums with them have failed.
        attempt: at the round, from 0.
    """

    total: Levels
    spoiled: bool = False
    left_out: Sequence[str] = ()
    attempt: int = 0

    @property
    def searching(self) -> bool:
        """Whether a sum was spoiled: the next attempt asks other groups of sites."""
        return self.spoiled


DROPOUTS: tuple[Code, ...] = ("gone", "slow", "silent")
"""The reasons if no reply came before the round closed.

The node is not connected; or it is, and has trained in this run; or it is, and has not, as far as this process knows.
"""


GONE = ("flower-error-3", "flower-error-4", "flower-error-5")
"""A SuperLink's answers for a node that is gone: message, reply or node unavailable."""
