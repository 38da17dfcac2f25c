"""A round without privacy: the updates of sites are averaged as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import StorageError
from tsugiki.common.strategies import strategy_of
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import collect
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.guard import check
from tsugiki.server.run.influence import BoundedMean, clip_factors, settled_weights
from tsugiki.server.run.kept import KeptUpdates
from tsugiki.server.run.measuring import LOW_COSINE, SKEW_NOTE, measures_error, started_warm, timed_error
from tsugiki.server.run.replies import Accepted, Asked, CollectedMean, Rejected
from tsugiki.server.run.roster import Member
from tsugiki.server.run.rounds import Round, Step, attempt_record, take_step
from tsugiki.server.run.sums import update_cosine

if TYPE_CHECKING:
    from flwr.app import Message


@dataclass(frozen=True)
class OpenRound(Round[CollectedMean]):
    """The round of a run without privacy."""

    ctx: RunContext

    def collect(self, state: State, round_number: int, cohort: list[Member], attempt: int) -> CollectedMean:
        """Let the cohort train, and return its replies and the mean of its updates, guarded."""
        config = self.ctx.config
        spec = self.ctx.spec
        strategy = strategy_of(config.strategy)
        part = strategy.trained_part(spec, round_number)
        most = len(cohort) + len(self.ctx.late.asked)
        bounded = BoundedMean(self.ctx.folder, spec.size, most, config.strategy, state.norms)
        kept: KeptUpdates | None = None
        if strategy.needs_each_update or measures_error(config, spec, self.ctx.pace, round_number, cohort):
            kept = KeptUpdates(self.ctx.folder, spec.size)

        def keep(one: WeightedUpdate | None) -> None:
            nonlocal kept
            if one is None:  # the error compares products of factors, and late factors belong to another adapter
                kept = None
            if kept is None or one is None:
                return
            try:
                kept.add(one)
            except StorageError:
                if strategy.needs_each_update:
                    raise
                # only a measurement needs them: the round goes on without it
                kept = None
                self.ctx.progress.note("the aggregation error is not measured: the disk is full")

        def judge(reply: Message, asked: Asked) -> Accepted | Rejected:
            verdict = check(reply, asked, spec, config.strategy.max_update_norm, part)
            if isinstance(verdict, Rejected):
                return verdict
            late_by = round_number - asked.round_number
            if late_by:
                verdict = replace(verdict, late_by=late_by)
                keep(None)
            bounded.add(verdict)
            keep(WeightedUpdate(verdict.site, verdict.update, verdict.rows, verdict.clients))
            return verdict.without_update()

        replies = collect(self.ctx, state, round_number, cohort, judge)
        settled = bounded.settle(replies.accepted)
        if kept is not None:
            kept.settle(settled_weights(settled.accepted), clip_factors(settled.accepted))
        self._report_far(round_number, settled.far)
        norms = settled.norms
        if not strategy.same_part:  # another part of the adapter has other norms
            norms = ()
        replies = replace(replies, accepted=settled.accepted)
        return CollectedMean(**vars(replies), mean=bounded.mean, kept=kept, norms=norms)

    def _report_far(self, round_number: int, far: Sequence[Accepted]) -> None:
        """Name the sites whose updates were far longer than the others'."""
        for reply in far:
            self.ctx.audit.write(
                "update-clipped", round=round_number, site=reply.site, norm=reply.norm, clipped_to=reply.clipped_to
            )
            self.ctx.progress.note(
                f"round {round_number}: the update of {reply.site} has the norm {reply.norm:.4g}, and was clipped to "
                f"{reply.clipped_to:.4g} (strategy.norm_tolerance)"
            )

    def record(self, round_number: int, cohort: list[Member], replies: CollectedMean) -> dict[str, Any]:
        """Return the line of an attempt, with what each accepted site reported."""
        reported = {reply.site: _reported(reply) for reply in replies.accepted}
        seconds = max((reply.seconds for reply in replies.accepted), default=0.0)
        return attempt_record(round_number, cohort, replies, reported, _mean_loss(replies.accepted), seconds)

    def step(self, state: State, round_number: int, replies: CollectedMean) -> Step:
        """Return the step of the strategy on the accepted updates, each with its weight."""
        ctx = self.ctx
        mean = replies.mean.value()
        record: dict[str, Any] = {}
        cosine = _cosine(replies.accepted, l2_norm(mean))
        if cosine is not None:
            record["update_cosine"] = cosine
        kept = replies.kept.updates() if replies.kept else []
        updates = kept
        if not strategy_of(ctx.config.strategy).needs_each_update:
            updates = [WeightedUpdate("mean", mean, replies.mean.weight)]
        step = take_step(ctx, state, round_number, updates)
        # only where sites send factors: the mean of factors is not the mean of their products
        if replies.kept and ctx.config.strategy.aggregation_error != "off" and ctx.pace.is_due(round_number):
            error, seconds = timed_error(ctx.spec, state.vector, step.vector, kept)
            if error is not None:
                record["aggregation_error"] = error
            ctx.pace.took(round_number, seconds + replies.kept.write_s, replies.wait_s)
        # once, when the operator can still change the run
        if round_number == 1 and cosine is not None and cosine < LOW_COSINE and not started_warm(ctx.folder):
            ctx.progress.note(SKEW_NOTE.format(cosine=cosine))
        return replace(step, record=record, norms=replies.norms)


def _cosine(accepted: Sequence[Accepted], mean_norm: float) -> float | None:
    """Return how much the accepted updates agree, or None if that says nothing."""
    norms = [reply.norm_in_mean for reply in accepted]
    return update_cosine(norms, [reply.weight for reply in accepted], mean_norm)


def _mean_loss(accepted: Sequence[Accepted]) -> float | None:
    """Return the mean loss of the sites that share theirs, by their weights; None: no site does, or it overflows."""
    losses = [(reply.loss, reply.weight) for reply in accepted if reply.loss is not None]
    total = sum(weight for _, weight in losses)
    if not total:
        return None
    mean = sum(loss * weight for loss, weight in losses) / total
    return mean if math.isfinite(mean) else None


def _reported(reply: Accepted) -> dict[str, Any]:
    """Return the entry of an accepted reply in metrics.jsonl."""
    entry = {
        "rows": reply.rows,
        "weight": reply.weight,
        "loss": reply.loss,
        "steps": reply.steps,
        "seconds": reply.seconds,
        "update_norm": reply.norm,
        "bytes_up": reply.size_bytes,
    }
    if reply.clipped_to is not None:
        entry["clipped_to"] = reply.clipped_to
    if reply.missed_steps:
        entry["missed_steps"] = reply.missed_steps
    if reply.late_by:
        entry["late_by"] = reply.late_by
    return entry
