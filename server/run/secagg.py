"""The server's part of secure aggregation: four steps, and the sum of the updates at their end, nothing else of them.

    step       each site sends                  dropping out here
    keys       two public keys                  is not in the session
    shares     sealed shares for every other    is not in the session
    masked     its masked, noised sum           is not in the sum; the others' shares take its masks out
    unmask     shares of the lists' secrets     is in the sum, as long as enough others answer

Opening the sum is the release, and costs privacy: it is written down before the last step is asked. An attempt that
ends before has shown the server nothing, and costs nothing. The protocol: `common/privacy/secagg/protocol.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import mechanism_of
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.privacy.secagg import protocol as secagg
from tsugiki.common.privacy.secagg.counts import check_sum, fewest_sites
from tsugiki.common.privacy.secagg.messages import KEYS_BYTES, SEALED_BYTES, Answer, exactly, from_fields, to_fields
from tsugiki.common.wire import ring
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import StageRequest, to_record
from tsugiki.common.wire.ring import Ring
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import address, receive, train_request
from tsugiki.server.run.context import Collected, Parts
from tsugiki.server.run.guard import check_private, check_step
from tsugiki.server.run.privacy import Privacy
from tsugiki.server.run.replies import AcceptedStep, AcceptedSum, Asked, Rejected
from tsugiki.server.run.roster import Member

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

STEP_TIMEOUT_S = 60.0
"""For the steps in which sites do not train; at most the round's."""


@dataclass
class Attempt:
    """One attempt at a round: who is still in it, and what it has cost.

    Args:
        parts: of the run.
        number: of the round.
        session: names the attempt.
        members: who is asked in the next step, by name.
    """

    parts: Parts
    number: int
    session: bytes
    members: dict[str, Member]
    rejected: list[Rejected] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def plan(self) -> Plan:
        """The privacy plan."""
        return _privacy(self.parts).plan

    @property
    def counts(self) -> dict[str, int]:
        """How many clients each site has."""
        return {name: member.clients for name, member in self.members.items()}

    def ask(
        self, step: str, fields: Callable[[str], Mapping[str, Any]], read: Callable[[str, dict[str, Any]], Any]
    ) -> dict[str, Any]:
        """Ask all members to do a step; return what they sent, by name. Who fails is a member no longer.

        Args:
            step: keys, shares or unmask.
            fields: beside the request, by site.
            read: turns a site's fields into what they mean.
        """
        config, names = self.parts.config.for_sites(), self._names()

        def request(nonce: str, node: int) -> RecordDict:
            body = fields(names[node])
            content = to_record(StageRequest(config, self.number, self.session, nonce), None, body or {"step": step})
            self.bytes_down += content.config_records["secagg"].count_bytes()
            return content

        def judge(reply: Message, one: Asked) -> AcceptedStep | Rejected:
            return check_step(reply, one, lambda received: read(one.site, received))

        timeout_s = min(self.parts.config.strategy.round_timeout_s, STEP_TIMEOUT_S)
        asked, messages = address(list(self.members.values()), self.number, f"query.{step}", request, timeout_s)
        passed, rejected = receive(self.parts, self.number, asked, messages, judge, timeout_s)
        self._keep([one.site for one in passed], [replace(one, detail=one.detail or step) for one in rejected])
        self.bytes_up += sum(one.size_bytes for one in passed)
        return {one.site: one.read for one in passed}

    def train(self, state: State, sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, AcceptedSum]:
        """Let all members train and send their masked sums; return these by name."""
        arrays, names = encode(state.vector, self.parts.spec), self._names()

        def request(nonce: str, node: int) -> RecordDict:
            body = {"session": self.session, **to_fields("sealed", sealed[names[node]])}
            content = to_record(train_request(self.parts, self.number, nonce), arrays, body)
            self.bytes_down += content.config_records["secagg"].count_bytes()
            self.bytes_down += sum(len(array.data) for array in arrays.values())
            return content

        def judge(reply: Message, one: Asked) -> AcceptedSum | Rejected:
            return check_private(reply, one, self.plan, masked=True)

        timeout_s = self.parts.config.strategy.round_timeout_s
        asked, messages = address(list(self.members.values()), self.number, "train.masked", request, timeout_s)
        passed, rejected = receive(self.parts, self.number, asked, messages, judge)
        self._keep([one.site for one in passed], rejected)
        self.bytes_up += sum(one.size_bytes for one in passed) + sum(one.size_bytes for one in rejected)
        return {one.site: one for one in passed}

    def _names(self) -> dict[int, str]:
        return {member.node_id: name for name, member in self.members.items()}

    def _keep(self, names: list[str], rejected: list[Rejected]) -> None:
        self.members = {name: self.members[name] for name in names}
        self.rejected += rejected


def collect_sum(parts: Parts, state: State, number: int, cohort: list[Member], attempt: int = 0) -> Collected:
    """Return the sum of a round, opened, and who is in it; with fewer clients than the plan's nothing is opened.

    Args:
        parts: of a run with secure aggregation.
        state: before the round.
        number: of the round.
        cohort: who is asked.
        attempt: at this round, from 0.

    Raises:
        BudgetError: another run on the same clients has used the budget up.
    """
    started = time.perf_counter()
    now = Attempt(parts, number, secagg.new_session(), {member.name: member for member in cohort})
    accepted: list[AcceptedSum] = []
    total: Ring | None = None
    try:
        accepted, total = _run(now, state, attempt)
    except SecureAggregationError as error:
        parts.audit.write("secagg-ended", round=number, attempt=attempt, code=error.code)
        parts.progress.note(f"round {number}: {error}")
    levels = None if total is None else ring.signed(total, now.plan.modulus_bits)
    if levels is not None and l2_norm(levels) > _longest(now.plan, sum(one.clients for one in accepted)):
        parts.audit.write("secagg-ended", round=number, attempt=attempt, code="norm")
        accepted, levels = [], None  # a wrong share or a site that does not clip; the round is tried again
    wait_s = time.perf_counter() - started
    return Collected(accepted, now.rejected, now.bytes_down, now.bytes_up, wait_s, levels)


def _run(now: Attempt, state: State, attempt: int) -> tuple[list[AcceptedSum], Ring]:
    """Do the four steps; return what is in the sum, and the sum modulo 2^bits.

    Raises:
        SecureAggregationError: too few sites are left, or the sum cannot be opened.
    """
    plan = now.plan
    keys = now.ask("keys", lambda name: {}, _key_reader())
    check_sum(now.counts, plan.min_clients, plan.min_sites)
    listed = {**to_fields("keys", keys), "clients": [now.counts[name] for name in sorted(keys)]}
    counts = now.counts

    def read_sealed(name: str, fields: dict[str, Any]) -> dict[str, bytes]:
        sealed = from_fields("sealed", fields, SEALED_BYTES)
        if set(sealed) != keys.keys() - {name}:
            raise SecureAggregationError(
                "the sealed shares are for other sites than were asked for", "one for each", code="secagg-message"
            )
        return sealed

    sealed = now.ask("shares", lambda name: listed, read_sealed)
    check_sum(now.counts, plan.min_clients, plan.min_sites)
    needed = secagg.threshold(len(keys), fewest_sites(counts, plan.min_clients, plan.min_sites))
    received = {to: {sender: sealed[sender][to] for sender in sealed if sender != to} for to in sealed}
    masked = now.train(state, received)
    check_sum(now.counts, plan.min_clients, plan.min_sites)
    survivors = sorted(masked)
    dropped = sorted(sealed.keys() - masked.keys())
    _privacy(now.parts).charge("sums", now.number, attempt)
    lists = {"survivors": survivors, **({"dropped": dropped} if dropped else {})}
    answers = now.ask("unmask", lambda name: lists, lambda name, fields: Answer.from_dict(fields, survivors, dropped))
    stacked = np.stack([one.levels for one in masked.values()]).view(np.uint64)
    total = stacked.sum(axis=0, dtype=np.uint64)
    opened = secagg.unmask(total, survivors, dropped, keys, answers, needed, now.session, plan.modulus_bits)
    return list(masked.values()), opened


def _key_reader() -> Callable[[str, dict[str, Any]], bytes]:
    """Return what reads public keys, and refuses those that would make every other site refuse the whole list."""
    seen: set[bytes] = set()

    def read(name: str, fields: dict[str, Any]) -> bytes:
        keys = exactly(fields.get("public_keys"), KEYS_BYTES)
        halves = {keys[: masks.SECRET_BYTES], keys[masks.SECRET_BYTES :]}
        if len(halves) < 2 or halves & seen:
            raise SecureAggregationError("a public key was sent twice", "fresh keys", code="secagg-message")
        for half in halves:  # raises for the points that agree on the same key with everybody
            masks.agree(masks.new_private_key(), half, secagg.new_session(), "trial", (name, name))
        seen.update(halves)
        return keys

    return read


def _longest(plan: Plan, clients: int) -> float:
    """Return how long a sum over so many clients can be, in levels, but for noise beyond eight standard deviations."""
    noise = math.sqrt(mechanism_of(plan).client_variance(plan) * clients)
    return clients * LEVELS + noise * (math.sqrt(plan.dimension) + 8)


def _privacy(parts: Parts) -> Privacy:
    if parts.privacy is None:
        raise ValueError("secure aggregation without a privacy plan")
    return parts.privacy
