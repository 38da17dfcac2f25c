"""Draw the cohort of a round, send it requests, and collect guarded replies."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from tsugiki.common.errors import Code, NotEnoughSites
from tsugiki.common.rng import generator
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import EvaluateRequest, TrainRequest, join_shares, to_record
from tsugiki.server.engines.grid import RETURN_S, Deadline, exchange
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.guard import check_evaluation
from tsugiki.server.run.late import MOST_ROUNDS_LATE
from tsugiki.server.run.replies import (
    DROPOUTS,
    Accepted,
    AcceptedStep,
    AcceptedSum,
    Asked,
    Collected,
    Rejected,
    Upload,
)
from tsugiki.server.run.roster import Member
from tsugiki.server.run.silence import Duty, Waiting

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

LIFE = 2.0
"""How many times its deadline a SuperLink keeps a message: more than once, because `exchange` keeps the deadline."""
TRAINING_SHARE = 0.9
POLLING_S = 5.0
"""Of a site's time in a round, it may train for this part and so many seconds less, or for half if that is longer. The
rest is for the adapter's way there and back, and for the pauses after which both sides look for messages."""

Passed = TypeVar("Passed", bound=Accepted | AcceptedSum | AcceptedStep[Any])


def sample(ctx: RunContext, round_number: int, attempt: int) -> list[Member]:
    """Return the cohort of a round, sorted by site name. It follows from the run's seed and the connected sites.

    Sites that were silent are left out for some rounds, as long as there are enough others (`silence.py`). Under
    Poisson sampling all others are in it: clients are drawn instead (`private_round.py`).

    Raises:
        NotEnoughSites: too few clients, or sites, are connected, and did not come back in time.
    """
    members = _gather_quorum(ctx, round_number)
    strategy = ctx.config.strategy
    ctx.late.begin_round(round_number, {member.name: member.node_id for member in members})
    resting = ctx.roster.silence.resting("train", round_number).keys() | ctx.late.asked.keys()
    due = [member for member in members if member.name not in resting]
    if ctx.roster.enough(due):  # else they are asked all the same: without them there is no round
        members = due
    if ctx.withholds:
        return members
    size = max(1, ctx.roster.min_sites, round(strategy.fraction_train * len(members)))
    while True:
        # a fresh generator for each size: the cohort must not depend on how many sizes were tried
        draw = generator(ctx.config.run.seed, "cohort", round_number, attempt)
        chosen = [members[index] for index in sorted(draw.choice(len(members), size, replace=False))]
        # while a site is searched for that spoils sums, the cohort must be large enough to be divided
        divisible = ctx.secure_plan is None or size == len(members) or ctx.suspicion.groups(chosen, ctx.secure_plan)
        if ctx.roster.enough(chosen) and divisible:
            return chosen
        size += 1


def _gather_quorum(ctx: RunContext, round_number: int) -> list[Member]:
    """Return the connected sites, sorted by site name, without those that spoil sums.

    If they cannot make up a round, others are waited for, for `strategy.wait_for_quorum_s`.

    Raises:
        NotEnoughSites: they still cannot.
    """
    ctx.roster.gather()
    wait_s = ctx.wait_for_quorum_s
    after = ""
    members = _available(ctx, round_number)
    if not ctx.roster.enough(members) and wait_s:
        found = _found(ctx, round_number, members)
        ctx.progress.note(f"{found}; waiting for others, for {wait_s:g} s at most (strategy.wait_for_quorum_s)")
        ctx.audit.write("waiting-for-quorum", round=round_number, connected=sorted(ctx.roster.members()))
        ctx.roster.wait_for_quorum(lambda: ctx.roster.enough(_available(ctx, round_number)), wait_s)
        members = _available(ctx, round_number)
        after = f" after {wait_s:g} s"
    if ctx.roster.enough(members):
        return members
    wanted = f"strategy.min_clients = {ctx.config.strategy.min_clients}"
    if ctx.roster.min_sites:
        wanted += f", privacy.min_sites = {ctx.roster.min_sites}"
    raise NotEnoughSites(_found(ctx, round_number, members) + after, wanted, "bring the sites back and resume the run")


def _available(ctx: RunContext, round_number: int) -> list[Member]:
    """Return the connected sites, sorted by site name, without those that spoil sums."""
    connected = list(ctx.roster.members().values())
    if ctx.secure_plan is None:
        return connected
    return ctx.suspicion.available(connected, ctx.secure_plan, round_number)


def _found(ctx: RunContext, round_number: int, members: list[Member]) -> str:
    """Return which of the connected sites a round has."""
    clients = sum(member.clients for member in members)
    found = f"round {round_number}: {clients} clients at {len(members)} sites are connected"
    spoiling = len(ctx.roster.members()) - len(members)
    if spoiling:
        found += f", without {spoiling} that spoiled sums"
    return found


def collect(
    ctx: RunContext,
    state: State,
    round_number: int,
    cohort: list[Member],
    judge: Callable[[Message, Asked], Upload | Rejected],
    clients: Mapping[str, list[int]] | None = None,
) -> Collected[Upload]:
    """Send the adapter to the cohort, and return the replies that passed the guard and the rejected ones.

    Args:
        ctx: of the run.
        state: before the round.
        round_number: counted from 1.
        cohort: the sites to ask.
        judge: returns the verdict on a reply.
        clients: by site name, which of its clients are asked, at least one; None: all clients of all sites.
    """
    arrays = encode(state.vector, ctx.spec)
    names = {member.node_id: member.name for member in cohort}
    timeout_s = ctx.round_timeout_s

    def request(nonce: str, node: int) -> RecordDict:
        drawn = None if clients is None else clients[names[node]]
        order = train_request(ctx, round_number, nonce, drawn)
        if ctx.takes_partial_updates:
            order = replace(order, partial=True, deadline_s=_deadline_s(ctx, names[node]))
        return to_record(replace(order, class_shares=join_shares(state.class_shares)), arrays)

    started = time.perf_counter()
    life = LIFE + MOST_ROUNDS_LATE if ctx.takes_late_updates else LIFE
    asked, messages = address(cohort, round_number, "train", request, timeout_s, life)
    if clients is not None:  # the guard allows a sum the norm of the clients that were asked, not of all the site has
        asked = {node: replace(one, clients=len(clients[one.site])) for node, one in asked.items()}
    passed, rejected = receive(ctx, round_number, asked, messages, judge)
    late = {one.node_id for one in ctx.late.asked.values()}
    for message in messages:
        if message.metadata.dst_node_id not in late:
            forget_arrays(message)
    # all sites receive the same arrays; a rejected reply has cost its bytes too
    bytes_down = sum(len(array.data) for array in arrays.values()) * len(messages)
    bytes_up = sum(reply.size_bytes for reply in passed) + sum(reply.size_bytes for reply in rejected)
    return Collected(passed, rejected, bytes_down, bytes_up, time.perf_counter() - started)


def _deadline_s(ctx: RunContext, site: str) -> float:
    """Return how long a site may train before it sends what it has: its time without what the transfer may take."""
    time_s = ctx.roster.silence.deadline_s(site, ctx.round_timeout_s, ctx.grace_s)
    return max(time_s / 2, TRAINING_SHARE * time_s - POLLING_S)


def train_request(ctx: RunContext, round_number: int, nonce: str, clients: list[int] | None = None) -> TrainRequest:
    """Return the request to train in a round.

    Args:
        ctx: of the run.
        round_number: counted from 1.
        nonce: that the reply has to repeat.
        clients: of the site, which are to train; None: all.
    """
    rounds = ctx.config.run.rounds
    return TrainRequest(
        config=ctx.config_for_sites,
        round=round_number,
        spec_sha256=ctx.spec.sha256,
        schedule_start=(round_number - 1) / rounds,
        schedule_stop=round_number / rounds,
        deadline_s=ctx.round_timeout_s,
        nonce=nonce,
        clients=",".join(map(str, clients or [])),
    )


def receive(
    ctx: RunContext,
    round_number: int,
    asked: Mapping[int, Asked],
    messages: list[Message],
    judge: Callable[[Message, Asked], Passed | Rejected],
    timeout_s: float = 0.0,
    enough: Callable[[Collection[Passed]], bool] | None = None,
) -> tuple[list[Passed], list[Rejected]]:
    """Send messages, judge the replies, and return the accepted and the rejected ones, each by site name.

    Sites that did not answer count as absent until the roster is next refreshed.

    Args:
        ctx: of the run.
        round_number: counted from 1.
        asked: what each node was asked, by node id.
        messages: one for each node.
        judge: returns the verdict on a reply.
        timeout_s: for all of them; 0: the round's.
        enough: returns whether these replies are a quorum; None: they are one if their clients are.
    """
    verdicts: _Verdicts[Passed] = _Verdicts()

    def has_quorum() -> bool:
        if enough is not None:
            return enough(verdicts.passed.values())
        return sum(one.clients for one in verdicts.passed.values()) >= ctx.quorum

    timeout_s = timeout_s or ctx.round_timeout_s
    waiting = _wait_for(ctx, "train", asked, messages, timeout_s, ctx.grace_s)
    waiting.settle(has_quorum)
    for one in asked.values():
        ctx.late.forget(one.site)  # what it is asked now takes the place of what it was asked before
    wants_updates = _wants_updates(ctx, messages)
    outstanding = ctx.late.outstanding if wants_updates and ctx.takes_late_updates else None

    def return_s() -> float:
        return waiting.return_s(ctx.wait_for_quorum_s) if wants_updates else RETURN_S

    for reply in exchange(ctx.grid, messages, timeout_s, ctx.stop, waiting.deadline, return_s, outstanding):
        late = ctx.late.answered(reply)
        answered = late or asked.get(reply.metadata.src_node_id)
        if answered is None:
            ctx.audit.write("unexpected-reply", round=round_number, node=str(reply.metadata.src_node_id))
            continue
        site = answered.site
        if site in verdicts.passed:
            verdicts.duplicates.append(Rejected(site, "duplicate"))  # the first valid reply counts
            continue
        outcome = verdicts.take(site, judge(reply, answered))
        if site in verdicts.passed:
            forget_arrays(reply)
        if not ctx.withholds:
            ctx.progress.reply(site, outcome)
        if late is not None:
            ctx.late.forget(site)
            if site in verdicts.passed:
                ctx.roster.silence.came_late(site)
        waiting.has_partial |= getattr(verdicts.passed.get(site), "missed_steps", 0) > 0
        waiting.heard(site, accepted=site in verdicts.passed)
        waiting.settle(has_quorum)
        del reply  # it may be large, and the next one is not there yet
    missing = verdicts.add_dropouts(_reasons(ctx, asked))
    if outstanding is not None:
        ctx.late.close_round(asked, missing)
    ctx.roster.drop(node for node, one in asked.items() if one.site in missing)
    waiting.close(round_number)
    return verdicts.accepted, verdicts.rejected


class _Verdicts(Generic[Passed]):
    """The verdicts on the replies of an exchange.

    Attributes:
        passed: the accepted replies, by site name.
        failed: the rejected ones of other sites, by site name.
        duplicates: replies of sites that had been accepted.
    """

    def __init__(self) -> None:
        self.passed: dict[str, Passed] = {}
        self.failed: dict[str, Rejected] = {}
        self.duplicates: list[Rejected] = []

    def take(self, site: str, verdict: Passed | Rejected) -> str:
        """Keep the verdict on a site's reply; return the word for it. A valid one makes up for a bad one before it."""
        if isinstance(verdict, Rejected):
            self.failed[site] = verdict
            return verdict.reason
        self.passed[site] = verdict
        self.failed.pop(site, None)
        return "accepted"

    def add_dropouts(self, reasons: Mapping[str, Code]) -> set[str]:
        """Add the sites that did not answer before the round closed; return all that did not, or have left.

        Args:
            reasons: by the name of each site that was asked, in case that it did not answer.
        """
        for site, reason in reasons.items():
            if site not in self.passed:
                self.failed.setdefault(site, Rejected(site, reason))
        return {site for site, rejected in self.failed.items() if rejected.reason in DROPOUTS}

    @property
    def accepted(self) -> list[Passed]:
        """The accepted replies, by site name."""
        return [self.passed[site] for site in sorted(self.passed)]

    @property
    def rejected(self) -> list[Rejected]:
        """The rejected replies, by site name, and the duplicates."""
        return [self.failed[site] for site in sorted(self.failed)] + self.duplicates


def _reasons(ctx: RunContext, asked: Mapping[int, Asked]) -> dict[str, Code]:
    """Return why each site that was asked may not have answered, at the end of an exchange."""
    connected = set(ctx.grid.get_node_ids())
    reasons: dict[str, Code] = {}
    for node, one in asked.items():
        if node not in connected:
            reasons[one.site] = "gone"
        else:
            reasons[one.site] = "slow" if ctx.roster.silence.has_trained(one.site) else "silent"
    return reasons


def _wants_updates(ctx: RunContext, messages: Sequence[Message]) -> bool:
    """Return whether messages ask real sites for updates that they keep until they are delivered.

    A site that is away has more time for these (`client/node/kept_answer.py`), and they may count when they are late.
    The steps of secure aggregation are no such messages: their secrets end with their process.
    """
    return not ctx.grid.simulated and all(message.metadata.message_type == "train" for message in messages)


def _wait_for(
    ctx: RunContext,
    duty: Duty,
    asked: Mapping[int, Asked],
    messages: Sequence[Message],
    timeout_s: float,
    grace_s: float | Literal["auto"],
) -> Waiting:
    """Return the wait for the answers to these messages, all of one type."""
    return Waiting(
        silence=ctx.roster.silence,
        duty=duty,
        kind=messages[0].metadata.message_type if messages else "",
        missing={one.site for one in asked.values()},
        deadline=Deadline(timeout_s * (len(messages) if ctx.grid.sequential else 1)),
        patience_s=ctx.round_timeout_s,
        grace_s=grace_s,
        simulated=ctx.grid.simulated,
        adapts=ctx.config.strategy.round_timeout_s == "auto" and duty == "train",
    )


def forget_arrays(message: Message) -> None:
    """Remove the arrays of a message that is done with: they are as large as the adapter.

    The views of Flower's contents refer to themselves and to their content. Left alone, both would stay in memory until
    Python looks for such circles.
    """
    if message.has_content():
        message.content.pop("arrays", None)


def address(
    cohort: list[Member],
    round_number: int,
    kind: str,
    content: Callable[[str, int], RecordDict],
    timeout_s: float,
    life: float = LIFE,
) -> tuple[dict[int, Asked], list[Message]]:
    """Return the request to each node by node id, and the messages. Each has a nonce of its own.

    Args:
        cohort: the sites to ask.
        round_number: counted from 1.
        kind: the message type.
        content: returns a message's content, from its nonce and node id.
        timeout_s: for the replies.
        life: how many times as long the messages are kept.
    """
    from flwr.app import Message

    asked = {}
    messages = []
    for member in cohort:
        nonce = secrets.token_hex(8)
        rows = member.rows
        if kind == "evaluate":
            rows = member.evaluation_rows
        asked[member.node_id] = Asked(member.name, member.node_id, round_number, nonce, rows, member.clients)
        request = content(nonce, member.node_id)
        messages.append(Message(request, member.node_id, kind, ttl=timeout_s * life, group_id=str(round_number)))
    return asked, messages


def evaluate_at_sites(ctx: RunContext, state: State) -> dict[str, dict[str, float]]:
    """Return each site's metrics on its own evaluation rows, with their number as `rows`."""
    silent = ctx.roster.silence.not_evaluating(state.round)
    members = [
        member for member in ctx.roster.members().values() if member.evaluation_rows and member.name not in silent
    ]
    if not members:
        return {}
    arrays = encode(state.vector, ctx.spec)
    config = ctx.config_for_sites
    timeout_s = ctx.round_timeout_s

    def request(nonce: str, node: int) -> RecordDict:
        return to_record(EvaluateRequest(config, state.round, ctx.spec.sha256, nonce), arrays)

    asked, messages = address(members, state.round, "evaluate", request, timeout_s)
    results: dict[str, dict[str, float]] = {}
    waiting = _wait_for(ctx, "evaluate", asked, messages, timeout_s, "auto")
    waiting.settle(lambda: True)  # no number of sites is needed
    for reply in exchange(ctx.grid, messages, timeout_s, ctx.stop, waiting.deadline):
        one = asked.get(reply.metadata.src_node_id)
        if one is None:
            ctx.audit.write("evaluation-rejected", round=state.round, site="", code="unexpected-reply")
            continue
        verdict = check_evaluation(reply, one)
        waiting.heard(one.site, accepted=not isinstance(verdict, Rejected))
        waiting.settle(lambda: True)
        if isinstance(verdict, Rejected):
            ctx.audit.write("evaluation-rejected", round=state.round, site=verdict.site, code=verdict.reason)
            continue
        metrics, rows = verdict
        results.setdefault(one.site, {**metrics, "rows": rows})  # the first valid reply counts
    reasons = _reasons(ctx, asked)
    for site in waiting.close(state.round):
        ctx.audit.write("evaluation-rejected", round=state.round, site=site, code=reasons[site])
    return dict(sorted(results.items()))
