"""The common part of both kinds of rounds: their interface, their step, and their line in metrics.jsonl.

`open_round.py` averages the updates of sites as they are. `private_round.py` adds up protected updates, and releases
their noisy mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from tsugiki.common.errors import TrainingError
from tsugiki.common.strategies.base import Moments, WeightedUpdate
from tsugiki.common.wire.arrays import packed_blocks
from tsugiki.common.wire.spec import Vector, is_finite, l2_norm
from tsugiki.server.run.aggregate import step as aggregated_step
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.replies import DROPOUTS, Collected
from tsugiki.server.run.roster import Member

Replies = TypeVar("Replies", bound=Collected[Any])


@dataclass(frozen=True)
class Step:
    """The result of a round.

    Args:
        vector: the adapter after the round, shape (size,), float32, finite.
        moments: of the strategy.
        update_norm: L2 norm of the aggregated update.
        record: entries that this kind of round adds to the line in metrics.jsonl.
        norms: of updates, to remember for the next round.
    """

    vector: Vector
    moments: Moments
    update_norm: float
    record: Mapping[str, Any]
    norms: tuple[float, ...] = ()


class Round(ABC, Generic[Replies]):
    """One kind of round. No state: everything that lasts is in `State` and in the run's files."""

    @abstractmethod
    def collect(self, state: State, round_number: int, cohort: list[Member], attempt: int) -> Replies:
        """Let the cohort train, and return the replies, guarded.

        Args:
            state: before the round.
            round_number: counted from 1.
            cohort: by site name.
            attempt: at this round, from 0.
        """

    @abstractmethod
    def record(self, round_number: int, cohort: list[Member], replies: Replies) -> dict[str, Any]:
        """Return the line of an attempt for metrics.jsonl; see `attempt_record`."""

    @abstractmethod
    def step(self, state: State, round_number: int, replies: Replies) -> Step:
        """Return the step that the accepted replies of a valid round make.

        Raises:
            TrainingError: the model would no longer be finite.
        """


def take_step(ctx: RunContext, state: State, round_number: int, updates: Sequence[WeightedUpdate]) -> Step:
    """Return the step of the run's strategy on these updates, with an empty record.

    Args:
        ctx: of the run.
        state: before the round.
        round_number: counted from 1.
        updates: at least one.

    Raises:
        TrainingError: the model would no longer be finite.
    """
    update, moments = aggregated_step(ctx.config, ctx.spec, state, updates, ctx.folder)

    def after(part: slice) -> Vector:
        return np.add(state.vector[part], update[part], dtype=np.float32)

    vector = packed_blocks(len(update), after)  # it travels to every site in the next round
    if not is_finite(vector):  # each update was finite; their sum may have overflowed
        raise TrainingError(
            f"round {round_number}: the aggregated model is not finite", hint="lower the learning rates"
        )
    return Step(vector, moments, l2_norm(update), {})


def attempt_record(
    round_number: int,
    cohort: Sequence[Member],
    replies: Collected[Any],
    accepted: Mapping[str, Mapping[str, Any]],
    train_loss: float | None = None,
    train_seconds: float = 0.0,
) -> dict[str, Any]:
    """Return the line of one attempt at a round for metrics.jsonl.

    Args:
        round_number: counted from 1.
        cohort: the sites that were asked.
        replies: of the cohort.
        accepted: the entry of each accepted reply, by site name.
        train_loss: mean over the sites that share theirs; None: no site does.
        train_seconds: of the slowest site.
    """
    return {
        "round": round_number,
        "cohort": [member.name for member in cohort],
        "accepted": dict(accepted),
        "rejected": {reply.site: {"reason": reply.reason, "detail": reply.detail} for reply in replies.rejected},
        "dropouts": sum(reply.reason in DROPOUTS for reply in replies.rejected),
        "train_loss": train_loss,
        "bytes_down": replies.bytes_down,
        "bytes_up": replies.bytes_up,
        "seconds": {"wait": replies.wait_s},
        "train_seconds": train_seconds,
    }
