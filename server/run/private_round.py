"""A round under a privacy plan: protected updates are added up, and their noisy mean is released.

With secure aggregation the server opens the sum alone (`secagg.py`); without it, it adds up what sites send. All else
is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import collect
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.guard import check_private
from tsugiki.server.run.privacy import Privacy
from tsugiki.server.run.replies import AcceptedSum, Asked, CollectedSum, Rejected
from tsugiki.server.run.roster import Member
from tsugiki.server.run.rounds import Round, Step, attempt_record, take_step
from tsugiki.server.run.secagg import collect_sum
from tsugiki.server.run.sums import RunningSum

if TYPE_CHECKING:
    from flwr.app import Message


@dataclass(frozen=True)
class PrivateRound(Round[CollectedSum]):
    """The round of a private run, with masks or without them."""

    ctx: RunContext
    privacy: Privacy

    def collect(self, state: State, round_number: int, cohort: list[Member], attempt: int) -> CollectedSum:
        """Let the cohort train, and return the sum of its protected updates.

        Raises:
            BudgetError: another run on the same clients has used up the budget.
            SecureAggregationError: a site spoils sums, and cannot be found.
            StorageError: the ledger cannot be written; no site was asked.
        """
        gather = collect_sum if self.privacy.plan.secure_aggregation else collect_uploads
        return gather(self.ctx, self.privacy, state, round_number, cohort, attempt)

    def record(self, round_number: int, cohort: list[Member], replies: CollectedSum) -> dict[str, Any]:
        """Return the line of an attempt, without loss, rows, norm or time of any single site.

        Under Poisson sampling, the line also hides the cohort, its bytes and its time, as the accounting requires.
        """
        if self.ctx.withholds:
            nobody = replace(replies, accepted=[], rejected=[], bytes_down=0, bytes_up=0)
            return attempt_record(round_number, [], nobody, {}) | {"seconds": {}}
        reported = {reply.site: {"clients": reply.clients, "bytes_up": reply.size_bytes} for reply in replies.accepted}
        asked = [member for member in cohort if member.name not in replies.left_out]
        record = attempt_record(round_number, asked, replies, reported)
        if replies.left_out:
            record["left_out"] = list(replies.left_out)
        return record

    def step(self, state: State, round_number: int, replies: CollectedSum) -> Step:
        """Return the step of the strategy on the noisy mean of the round.

        Raises:
            BudgetError: another run on the same clients has used up the budget.
            StorageError: the ledger cannot be written; nothing is released.
        """
        # before the mean exists: a crash must not make a release free
        self.privacy.charge("release", round_number, replies.attempt)
        self.privacy.charge("outsiders", round_number, replies.attempt)
        mean, report = self.privacy.mean(replies.total, replies.clients, round_number)
        step = take_step(self.ctx, state, round_number, [WeightedUpdate("mean", mean, 1)])
        return replace(step, record={"privacy": report})


def collect_uploads(
    ctx: RunContext, privacy: Privacy, state: State, round_number: int, cohort: list[Member], attempt: int
) -> CollectedSum:
    """Return the sum of the protected updates of a round, each of which the server sees.

    Args:
        ctx: of the run.
        privacy: of the run; its plan has no secure aggregation.
        state: before the round.
        round_number: counted from 1.
        cohort: the sites to ask.
        attempt: at this round, from 0.

    Raises:
        BudgetError: another run on the same clients has used up the budget.
        StorageError: the ledger cannot be written; no site was asked.
    """
    privacy.charge("uploads", round_number, attempt)  # before a site is asked: a crash must not make uploads free
    clients: dict[str, list[int]] | None = None
    if ctx.withholds:
        # a site of which no client was drawn is not asked; an empty list would mean all of them
        drawn = {member.name: privacy.sampled(member.clients, member.name, round_number) for member in cohort}
        clients = {name: numbers for name, numbers in drawn.items() if numbers}
        cohort = [member for member in cohort if member.name in clients]

    running = RunningSum(privacy.plan.dimension)  # stays zero if a drawn cohort is empty

    def judge(reply: Message, asked: Asked) -> AcceptedSum | Rejected:
        verdict = check_private(reply, asked, privacy.plan)
        if isinstance(verdict, Rejected):
            return verdict
        running.add(verdict.levels)
        return verdict.without_levels()

    replies = collect(ctx, state, round_number, cohort, judge, clients)
    return CollectedSum(**vars(replies), total=running.total, attempt=attempt)
