"""Who is asked in a round, what they are asked, and what comes back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from tsugiki.common.errors import NotEnoughSites
from tsugiki.common.rng import generator
from tsugiki.common.strategies.factors import sent
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import EvaluateRequest, TrainRequest, to_record
from tsugiki.server.engines.grid import exchange
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.context import Collected, Parts
from tsugiki.server.run.guard import check, check_evaluation, check_private
from tsugiki.server.run.replies import DROPOUT, Accepted, AcceptedStep, AcceptedSum, Asked, Rejected
from tsugiki.server.run.roster import Member

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

Passed = TypeVar("Passed", bound=Accepted | AcceptedSum | AcceptedStep)


def sample(parts: Parts, number: int, attempt: int) -> list[Member]:
    """Return the cohort of a round, by site name: a function of the run's seed and of who is connected.

    Under Poisson sampling all sites are in it, and `_asked_clients` draws clients.

    Raises:
        NotEnoughSites: too few clients, or sites, for a round are.
    """
    parts.roster.gather()
    members = list(parts.roster.members().values())
    strategy = parts.config.strategy
    if not parts.roster.enough():
        sites = f", privacy.min_sites = {parts.roster.min_sites}" if parts.roster.min_sites else ""
        raise NotEnoughSites(
            f"round {number}: {parts.roster.clients()} clients at {len(members)} sites are connected",
            f"strategy.min_clients = {strategy.min_clients}{sites}",
            "bring the sites back and resume the run",
        )
    if parts.withholds:
        return members
    size = max(1, parts.roster.min_sites, round(strategy.fraction_train * len(members)))
    while True:
        draw = generator(parts.config.run.seed, "cohort", number, attempt)
        chosen = [members[index] for index in sorted(draw.choice(len(members), size, replace=False))]
        if sum(member.clients for member in chosen) >= strategy.min_clients:
            return chosen
        size += 1


def collect(parts: Parts, state: State, number: int, cohort: list[Member], attempt: int = 0) -> Collected:
    """Send the adapter to the cohort and guard what comes back."""
    if parts.privacy:
        parts.privacy.charge("uploads", number, attempt)
    arrays, strategy = encode(state.vector, parts.spec), parts.config.strategy
    part = sent(parts.spec, strategy.name, number)
    clients = {member.node_id: _asked_clients(parts, member, number) for member in cohort}
    cohort = [member for member in cohort if clients[member.node_id] != []]

    def request(nonce: str, node: int) -> RecordDict:
        return to_record(train_request(parts, number, nonce, clients[node]), arrays)

    def judge(reply: Message, one: Asked) -> Accepted | AcceptedSum | Rejected:
        if parts.privacy:
            return check_private(reply, one, parts.privacy.plan)
        return check(reply, one, parts.spec, strategy.max_update_norm, part)

    started = time.perf_counter()
    asked, messages = address(cohort, number, "train", request, strategy.round_timeout_s)
    asked = {node: replace(one, clients=_count(clients[node], one)) for node, one in asked.items()}
    passed, rejected = receive(parts, number, asked, messages, judge)
    down = sum(len(array.data) for array in arrays.values()) * len(messages)
    up = sum(reply.size_bytes for reply in passed) + sum(reply.size_bytes for reply in rejected)
    uploads = cast("list[Accepted | AcceptedSum]", passed)  # of what `judge` returns
    return Collected(uploads, rejected, down, up, time.perf_counter() - started)


def _asked_clients(parts: Parts, member: Member, number: int) -> list[int] | None:
    """Return which clients of a site are asked; None for all."""
    if parts.privacy is None or parts.privacy.plan.sampling_probability >= 1:
        return None
    return parts.privacy.sampled(member.clients, member.name, number)


def _count(clients: list[int] | None, one: Asked) -> int:
    return one.clients if clients is None else len(clients)


def train_request(parts: Parts, number: int, nonce: str, clients: list[int] | None = None) -> TrainRequest:
    """Return what a site is asked to train."""
    rounds = parts.config.run.rounds
    return TrainRequest(
        config=parts.config_for_sites,
        round=number,
        spec_sha256=parts.spec.sha256,
        schedule_start=(number - 1) / rounds,
        schedule_stop=number / rounds,
        deadline_s=parts.config.strategy.round_timeout_s,
        nonce=nonce,
        clients=",".join(map(str, clients or [])),
    )


def receive(
    parts: Parts,
    number: int,
    asked: Mapping[int, Asked],
    messages: list[Message],
    judge: Callable[[Message, Asked], Passed | Rejected],
    timeout_s: float = 0.0,
) -> tuple[list[Passed], list[Rejected]]:
    """Send messages, judge what comes back, and return what passed, by site name, and what did not.

    Sites that did not answer are taken for absent until the next look.

    Args:
        parts: of the run.
        number: of the round.
        asked: what each node was asked.
        messages: one for each node.
        judge: returns the verdict on a reply.
        timeout_s: for all of them; 0: the round's.
    """
    passed: dict[str, Passed] = {}
    failed: dict[str, Rejected] = {}
    late: list[Rejected] = []
    for reply in exchange(parts.grid, messages, timeout_s or parts.config.strategy.round_timeout_s, parts.stop):
        one = asked.get(reply.metadata.src_node_id)
        if one is None:
            parts.audit.write("unexpected-reply", round=number, node=str(reply.metadata.src_node_id))
        elif one.site in passed:
            late.append(Rejected(one.site, "duplicate"))  # the first valid reply counts
        else:
            verdict = judge(reply, one)
            if isinstance(verdict, Rejected):
                failed[one.site] = verdict
            else:
                passed[one.site] = verdict
                failed.pop(one.site, None)
            if not parts.withholds:
                parts.progress.reply(one.site, verdict.reason if isinstance(verdict, Rejected) else "accepted")
    for one in asked.values():
        if one.site not in passed:
            failed.setdefault(one.site, Rejected(one.site, DROPOUT))
    gone = {site for site, rejected in failed.items() if rejected.reason == DROPOUT}
    parts.roster.drop(node for node, one in asked.items() if one.site in gone)
    return [passed[site] for site in sorted(passed)], [failed[site] for site in sorted(failed)] + late


def address(
    cohort: list[Member], number: int, kind: str, content: Callable[[str, int], RecordDict], timeout_s: float
) -> tuple[dict[int, Asked], list[Message]]:
    """Return what each node was asked, and the messages, each with a nonce of its own."""
    from flwr.app import Message

    asked, messages = {}, []
    for member in cohort:
        nonce = secrets.token_hex(8)
        rows = member.evaluation_rows if kind == "evaluate" else member.rows
        asked[member.node_id] = Asked(member.name, member.node_id, number, nonce, rows, member.clients)
        request = content(nonce, member.node_id)
        messages.append(Message(request, member.node_id, kind, ttl=timeout_s * 2, group_id=str(number)))
    return asked, messages


def evaluate_at_sites(parts: Parts, state: State) -> dict[str, dict[str, float]]:
    """Return each site's metrics on its own evaluation rows, with their number as `rows`."""
    members = [member for member in parts.roster.members().values() if member.evaluation_rows]
    if not members:
        return {}
    arrays, text = encode(state.vector, parts.spec), parts.config_for_sites

    def request(nonce: str, node: int) -> RecordDict:
        return to_record(EvaluateRequest(text, state.round, parts.spec.sha256, nonce), arrays)

    timeout_s = parts.config.strategy.round_timeout_s
    asked, messages = address(members, state.round, "evaluate", request, timeout_s)
    results: dict[str, dict[str, float]] = {}
    for reply in exchange(parts.grid, messages, timeout_s, parts.stop):
        one = asked.get(reply.metadata.src_node_id)
        verdict = Rejected("", "unexpected-reply") if one is None else check_evaluation(reply, one)
        if isinstance(verdict, Rejected):
            parts.audit.write("evaluation-rejected", round=state.round, site=verdict.site, code=verdict.reason)
        elif one is not None:
            results.setdefault(one.site, {**verdict[0], "rows": verdict[1]})
    return dict(sorted(results.items()))
