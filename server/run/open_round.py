"""A round without privacy: the updates of sites are averaged as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsugiki.common.strategies import strategy_of
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.strategies.products import aggregation_error
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import collect
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.guard import check
from tsugiki.server.run.replies import Accepted, Asked, Collected, Rejected
from tsugiki.server.run.roster import Member
from tsugiki.server.run.rounds import Round, Step, attempt_record, take_step

if TYPE_CHECKING:
    from flwr.app import Message


@dataclass(frozen=True)
class OpenRound(Round[Collected[Accepted]]):
    """The round of a run without privacy."""

    ctx: RunContext

    def collect(self, state: State, round_number: int, cohort: list[Member], attempt: int) -> Collected[Accepted]:
        """Let the cohort train, and return its updates, guarded."""
        strategy = self.ctx.config.strategy
        part = strategy_of(strategy).trained_part(self.ctx.spec, round_number)

        def judge(reply: Message, asked: Asked) -> Accepted | Rejected:
            return check(reply, asked, self.ctx.spec, strategy.max_update_norm, part)

        return collect(self.ctx, state, round_number, cohort, judge)

    def record(self, round_number: int, cohort: list[Member], replies: Collected[Accepted]) -> dict[str, Any]:
        """Return the line of an attempt, with what each accepted site reported."""
        reported = {reply.site: _reported(reply) for reply in replies.accepted}
        seconds = max((reply.seconds for reply in replies.accepted), default=0.0)
        return attempt_record(round_number, cohort, replies, reported, _mean_loss(replies.accepted), seconds)

    def step(self, state: State, round_number: int, replies: Collected[Accepted]) -> Step:
        """Return the step of the strategy on the accepted updates, each weighted by its rows."""
        updates = [WeightedUpdate(reply.site, reply.update, reply.weight, reply.clients) for reply in replies.accepted]
        step = take_step(self.ctx, state, round_number, updates)
        # only where sites send factors: the mean of factors is not the mean of their products
        error = aggregation_error(self.ctx.spec, state.vector, step.vector, updates)
        if error is None:
            return step
        return replace(step, record={"aggregation_error": error})


def _mean_loss(accepted: Sequence[Accepted]) -> float | None:
    """Return the mean loss over the rows of the sites that share theirs; None: no site does."""
    losses = [(reply.loss, reply.weight) for reply in accepted if reply.loss is not None]
    weight = sum(rows for _, rows in losses)
    if not weight:
        return None
    return sum(loss * rows for loss, rows in losses) / weight


def _reported(reply: Accepted) -> dict[str, Any]:
    """Return the entry of an accepted reply in metrics.jsonl."""
    return {
        "rows": reply.weight,
        "loss": reply.loss,
        "steps": reply.steps,
        "seconds": reply.seconds,
        "update_norm": reply.norm,
        "bytes_up": reply.size_bytes,
    }
