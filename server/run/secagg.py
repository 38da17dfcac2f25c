"""The server's part of secure aggregation: four steps, after which it knows the sum of the updates and nothing else.

    step       each site sends                  dropping out here
    keys       two public keys, signed          is not in the session
    shares     sealed shares for every other    is not in the session
    masked     its masked, noised sum           is not in the sum; the others' shares take its masks out
    unmask     shares of the lists' secrets     is in the sum, as long as enough others answer

Each attempt begins with a hash of the request to train, adapter included. All keys, shares and masks are bound to it,
to the settings and to the list of members (`common/privacy/secagg/binding.py`).

Opening the sum costs privacy, and is charged to the ledger before the last step. An attempt that ends earlier has shown
the server nothing, and costs nothing. The protocol: `common/privacy/secagg/protocol.py`.

A sum that honest sites cannot make was spoiled by one of them. The next attempts ask the sites in disjoint groups, or
leave some out, until it is known by which (`search.py`). Each attempt is trained and noised anew, and charged to
every ledger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.keys import POINT_BYTES, is_signed, key_of
from tsugiki.common.privacy.clipping import LEVELS, Levels
from tsugiki.common.privacy.mechanisms import mechanism_of
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.privacy.secagg import protocol as secagg
from tsugiki.common.privacy.secagg.binding import hash_context, hash_order, hash_terms, signed_text
from tsugiki.common.privacy.secagg.counts import check_sum, counted_on, fewest_sites
from tsugiki.common.privacy.secagg.messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    SIGNED_BYTES,
    Answer,
    exactly,
    from_fields,
    to_fields,
)
from tsugiki.common.wire import ring
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import StageRequest, to_record
from tsugiki.common.wire.ring import Ring
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import address, receive, train_request
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.guard import check_private, check_step
from tsugiki.server.run.privacy import Privacy
from tsugiki.server.run.replies import AcceptedStep, AcceptedSum, Asked, CollectedSum, Content, Rejected
from tsugiki.server.run.roster import Member
from tsugiki.server.run.search import Group
from tsugiki.server.run.sums import RunningSum
from tsugiki.server.run.suspicion import SUSPECTED

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, RecordDict

STEP_TIMEOUT_S = 60.0
"""Timeout of the steps in which sites do not train, unless the round's timeout is shorter."""


@dataclass
class Attempt:
    """One attempt at a sum: the sites that are still in it, and the bytes that it has cost.

    Args:
        ctx: of the run.
        plan: of the run, with secure aggregation.
        round_number: counted from 1.
        session: names the attempt at this sum.
        members: the sites to ask in the next step, by site name.
        needed: how many sites open a sum; 0: it is not settled yet.
    """

    ctx: RunContext
    plan: Plan
    round_number: int
    session: bytes
    members: dict[str, Member]
    needed: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many clients each site has."""
        return {name: member.clients for name, member in self.members.items()}

    def ask(
        self,
        step: str,
        fields: Callable[[str], Mapping[str, Any]],
        read: Callable[[str, dict[str, Any]], Content],
    ) -> dict[str, Content]:
        """Ask all members to do a step, and return their answers by site name. Members that fail are dropped.

        Args:
            step: keys, shares or unmask.
            fields: returns the fields to send to a site beside the request.
            read: decodes a site's fields; raises SecureAggregationError if they are malformed.
        """
        config = self.ctx.config_for_sites
        names = self._names()

        def request(nonce: str, node: int) -> RecordDict:
            body = fields(names[node])
            message = StageRequest(config, self.round_number, self.session, nonce)
            content = to_record(message, None, body)
            self.bytes_down += content.config_records["secagg"].count_bytes()
            return content

        def judge(reply: Message, one: Asked) -> AcceptedStep[Content] | Rejected:
            return check_step(reply, one, lambda received: read(one.site, received))

        timeout_s = min(self.ctx.round_timeout_s, STEP_TIMEOUT_S)
        members = list(self.members.values())
        asked, messages = address(members, self.round_number, f"query.{step}", request, timeout_s)
        passed, rejected = receive(self.ctx, self.round_number, asked, messages, judge, timeout_s, self._enough)
        self._keep([one.site for one in passed], [replace(one, detail=one.detail or step) for one in rejected])
        self.bytes_up += sum(one.size_bytes for one in passed)
        return {one.site: one.content for one in passed}

    def train(
        self, arrays: ArrayRecord, sealed: Mapping[str, Mapping[str, bytes]]
    ) -> tuple[dict[str, AcceptedSum], Levels]:
        """Let all members train; return their replies by site name, and the sum of their masked sums modulo 2^64.

        Args:
            arrays: the adapter to start from, encoded.
            sealed: by site name, the shares that the other sites have sealed for it, by their names.
        """
        names = self._names()

        def request(nonce: str, node: int) -> RecordDict:
            body = {"session": self.session, **to_fields("sealed", sealed[names[node]])}
            content = to_record(train_request(self.ctx, self.round_number, nonce), arrays, body)
            self.bytes_down += content.config_records["secagg"].count_bytes()
            self.bytes_down += sum(len(array.data) for array in arrays.values())
            return content

        running = RunningSum(self.plan.dimension)

        def judge(reply: Message, one: Asked) -> AcceptedSum | Rejected:
            verdict = check_private(reply, one, self.plan, masked=True)
            if isinstance(verdict, Rejected):
                return verdict
            running.add(verdict.levels)
            return verdict.without_levels()

        timeout_s = self.ctx.round_timeout_s
        members = list(self.members.values())
        asked, messages = address(members, self.round_number, "train.masked", request, timeout_s)
        passed, rejected = receive(self.ctx, self.round_number, asked, messages, judge, timeout_s, self._enough)
        self._keep([one.site for one in passed], rejected)
        self.bytes_up += sum(one.size_bytes for one in passed) + sum(one.size_bytes for one in rejected)
        return {one.site: one for one in passed}, running.total

    def _enough(self, passed: Collection[AcceptedStep[Any] | AcceptedSum]) -> bool:
        """Return whether the sum can be opened with these sites alone, whatever the others do."""
        clients = sum(one.clients for one in passed)
        return clients >= self.plan.min_clients and len(passed) >= max(self.plan.min_sites, self.needed)

    def _names(self) -> dict[int, str]:
        return {member.node_id: name for name, member in self.members.items()}

    def _keep(self, names: list[str], rejected: list[Rejected]) -> None:
        self.members = {name: self.members[name] for name in names}
        self.rejected += rejected


def collect_sum(
    ctx: RunContext, privacy: Privacy, state: State, round_number: int, cohort: list[Member], attempt: int
) -> CollectedSum:
    """Return the opened sum of a round, and the replies in it. With fewer clients than the plan's, none is opened.

    While a site is searched for that spoils sums, it is the total of the sums over disjoint groups of the cohort that
    passed the norm test.

    Args:
        ctx: of the run.
        privacy: of the run; its plan has secure aggregation.
        state: before the round.
        round_number: counted from 1.
        cohort: the sites to ask.
        attempt: at this round, from 0.

    Raises:
        BudgetError: another run on the same clients has used up the budget.
        SecureAggregationError: `secagg-search-too-few` or `secagg-search-failed`, a site spoils sums, and cannot be
            found; nobody was asked.
        StorageError: the ledger cannot be written; nothing was opened.
    """
    started = time.perf_counter()
    groups = ctx.suspicion.groups(cohort, privacy.plan)
    suspects = ctx.suspicion.left_out(round_number)
    # a liar that is left out by now counts too: the attempts that found it began with all sites
    sites = suspects | ctx.roster.members().keys()
    _check_search(groups, privacy.plan, round_number, cohort, len(sites), attempt)
    members = {member.name: member for member in cohort}
    asked = set(chain(*groups))
    left_out = (suspects | members.keys()) - asked

    @cache  # each site is in one group, so all groups together cost a client one release
    def charge() -> None:
        privacy.charge("sums", round_number, attempt)

    # a session of its own for each sum: keys and shares of one must not open another
    sums = [
        Attempt(ctx, privacy.plan, round_number, secagg.new_session(), {name: members[name] for name in group})
        for group in groups
    ]
    accepted: list[AcceptedSum] = []
    total = np.zeros(privacy.plan.dimension, np.int64)
    passed: list[Group] = []
    failed: list[Group] = []
    for now in sums:
        opened = _open(now, state, attempt, charge)
        if opened is None:
            continue
        if opened.spoiled:
            failed.append(opened.sites)
        else:
            passed.append(opened.sites)
            accepted += opened.masked
            total += opened.levels
    if failed and not passed:
        # no model is released, but from whom the next attempt asks, sites learn that these sums failed
        privacy.charge("release", round_number, attempt)
        privacy.charge("outsiders", round_number, attempt)
    _learn(ctx, failed, passed, round_number, attempt)
    return CollectedSum(
        sorted(accepted, key=lambda one: one.site),
        [one for now in sums for one in now.rejected],
        sum(now.bytes_down for now in sums),
        sum(now.bytes_up for now in sums),
        time.perf_counter() - started,
        total,
        spoiled=bool(failed),
        left_out=sorted(left_out),
        attempt=attempt,
    )


def _check_search(
    groups: list[Group], plan: Plan, round_number: int, cohort: list[Member], sites: int, attempt: int
) -> None:
    """Check that a search for a site that spoils sums can go on.

    Args:
        groups: to ask next.
        plan: of the run.
        round_number: counted from 1.
        cohort: the sites that may be asked.
        sites: how many the run has, with those that are left out.
        attempt: at this round, from 0.

    Raises:
        SecureAggregationError: `secagg-search-too-few`, no site can be left out; `secagg-search-failed`, more attempts
            at the round than there are sites were in vain. One liar is left out by then: the first sum has all sites,
            the next ones are without one site each, and the last is without the liar.
    """
    hint = "see secagg-ended in audit.jsonl for who was in the sums; find the site by other means, and resume the run"
    if not groups:
        raise SecureAggregationError(
            f"round {round_number}: a site has spoiled a sum, and {len(cohort)} sites are too few to find it",
            f"more than strategy.min_clients = {plan.min_clients} clients, at more than privacy.min_sites = "
            f"{plan.min_sites} sites, so that sites can be left out in turn",
            hint,
            code="secagg-search-too-few",
        )
    if attempt > sites:
        raise SecureAggregationError(
            f"round {round_number}: sites spoil sums, and {attempt} attempts have not shown which",
            "at most one such site",
            hint,
            code="secagg-search-failed",
        )


def _learn(ctx: RunContext, failed: list[Group], passed: list[Group], round_number: int, attempt: int) -> None:
    """Let the search take in the sums of an attempt, and name the sites that it suspects now."""
    for site, rest in ctx.suspicion.learn(failed, passed, round_number).items():
        until = rest.until if rest else 0
        times = rest.times if rest else 0
        ctx.audit.write(SUSPECTED, round=round_number, attempt=attempt, site=site, until=until, times=times)
        duration = f"until round {until}" if until else "for the rest of the run"
        ctx.progress.note(f"round {round_number}: {site} is suspected of spoiling sums, and left out {duration}")


@dataclass(frozen=True)
class _Opened:
    """A sum that was opened.

    Args:
        masked: the replies in it.
        levels: the sum, shape (size,), without masks.
        spoiled: whether it is longer than honest sites can make it: one gave a wrong share, or does not clip.
    """

    masked: list[AcceptedSum]
    levels: Levels
    spoiled: bool

    @property
    def sites(self) -> Group:
        """The names of the sites in it."""
        return tuple(one.site for one in self.masked)


def _open(now: Attempt, state: State, attempt: int, charge: Callable[[], None]) -> _Opened | None:
    """Open a sum, and reject all its sites if it is spoiled; return None if it could not be opened."""
    event = {"round": now.round_number, "attempt": attempt}
    try:
        masked, total = _run(now, state, charge)
    except SecureAggregationError as error:  # voids the sum: none of its sites is accepted
        now.ctx.audit.write("secagg-ended", **event, code=error.code)
        now.ctx.progress.note(f"round {now.round_number}: {error}")
        return None
    levels = ring.signed(total, now.plan.modulus_bits)
    spoiled = l2_norm(levels) > _longest(now.plan, sum(one.clients for one in masked))
    opened = _Opened(masked, levels, spoiled)
    if spoiled:
        now.ctx.audit.write("secagg-ended", **event, code="secagg-norm", sites=opened.sites)
        now.rejected += [Rejected(one.site, "secagg-norm", size_bytes=one.size_bytes) for one in masked]
    return opened


def _run(now: Attempt, state: State, charge: Callable[[], None]) -> tuple[list[AcceptedSum], Ring]:
    """Do the four steps; return the replies in the sum, and the sum modulo 2^bits.

    Args:
        now: one sum of an attempt.
        state: before the round.
        charge: charges the sum to the ledger.

    Raises:
        SecureAggregationError: too few sites are left, or the sum cannot be opened.
    """
    plan = now.plan
    # before the first step, the server commits to what it will ask
    arrays = encode(state.vector, now.ctx.spec)
    order = hash_order(train_request(now.ctx, now.round_number, ""), arrays)
    terms = hash_terms(now.session, now.round_number, now.ctx.config_for_sites, plan, order)

    # keys: from here on, a site that is silent is out of the session
    announced = now.ask("keys", lambda name: {"order": order}, _key_reader(terms))
    keys = {name: one.public_keys for name, one in announced.items()}
    signed = {name: one.signed for name, one in announced.items() if one.signed}
    now.ctx.suspicion.counts_on({name: one.counts_on for name, one in announced.items()})
    counts = now.counts
    check_sum(counts, plan.min_clients, plan.min_sites)

    # shares: each site seals its secrets for every other, so that enough of them can undo the masks of a lost one
    needed = _threshold(counts, {name: one.counts_on for name, one in announced.items()}, plan)
    now.needed = needed
    listed = {**to_fields("keys", keys), **to_fields("signed", signed), "needed": needed}
    listed["clients"] = [counts[name] for name in sorted(keys)]
    context = hash_context(terms, keys, counts, signed, needed)
    sealed = now.ask("shares", lambda name: listed, _sealed_reader(set(keys)))
    _check_enough(now.counts, plan, needed)

    received = {to: {sender: sealed[sender][to] for sender in sealed if sender != to} for to in sealed}
    masked, total = now.train(arrays, received)
    _check_enough(now.counts, plan, needed)

    # the charge before the last step: with its answers the sum can be opened, whatever happens then
    charge()
    survivors = sorted(masked)
    dropped = sorted(sealed.keys() - masked.keys())
    lists = {"survivors": survivors}
    if dropped:
        lists["dropped"] = dropped
    answers = now.ask("unmask", lambda name: lists, lambda name, fields: Answer.from_dict(fields, survivors, dropped))

    masked_sum = total.view(np.uint64)
    opened = secagg.unmask(masked_sum, survivors, dropped, keys, answers, needed, context, plan.modulus_bits)
    return list(masked.values()), opened


def _sealed_reader(names: set[str]) -> Callable[[str, dict[str, Any]], dict[str, bytes]]:
    """Return a reader of sealed shares, which refuses shares for sites outside the session."""

    def read(name: str, fields: dict[str, Any]) -> dict[str, bytes]:
        sealed = from_fields("sealed", fields, SEALED_BYTES)
        if set(sealed) != names - {name}:
            raise SecureAggregationError(
                "the sealed shares are for other sites than were asked for", "one for each", code="secagg-message"
            )
        return sealed

    return read


@dataclass(frozen=True)
class _Announced:
    """A site's answer to the step `keys`.

    Args:
        public_keys: 64 bytes.
        counts_on: how many clients at another site it counts on at most.
        signed: its node key and its signature; empty: it has no node key.
    """

    public_keys: bytes
    counts_on: int
    signed: bytes


def _key_reader(terms: bytes) -> Callable[[str, dict[str, Any]], _Announced]:
    """Return a reader of public keys, which refuses those that would make every other site refuse the whole list."""
    seen: set[bytes] = set()

    def read(name: str, fields: dict[str, Any]) -> _Announced:
        keys = exactly(fields.get("public_keys"), KEYS_BYTES)
        counts_on = fields.get("counts_on")
        if type(counts_on) is not int or counts_on < 1:
            raise SecureAggregationError(
                "the answer lacks a number of clients", "counts_on, 1 or more", code="secagg-message"
            )
        halves = {keys[: masks.SECRET_BYTES], keys[masks.SECRET_BYTES :]}
        if len(halves) < 2 or halves & seen:
            raise SecureAggregationError("a public key was sent twice", "fresh keys", code="secagg-message")
        for half in halves:  # raises for the points that agree on the same key with everybody
            masks.agree(masks.new_private_key(), half, terms, "trial", (name, name))
        signed = b""
        if "signed" in fields:
            signed = exactly(fields["signed"], SIGNED_BYTES)
            text = signed_text(terms, name, keys)
            if not is_signed(key_of(signed[:POINT_BYTES]), signed[POINT_BYTES:], text):
                raise SecureAggregationError(
                    "the keys are not signed for this session", "a signature by the node key", code="secagg-signature"
                )
        seen.update(halves)
        return _Announced(keys, counts_on, signed)

    return read


def _threshold(counts: Mapping[str, int], counts_on: Mapping[str, int], plan: Plan) -> int:
    """Return the number of shares that recover a secret, the same at all sites.

    A site needs as many sites in a sum as have `min_clients` clients by what it counts on. Nobody may open a smaller
    one, so the largest of these numbers is taken.

    Args:
        counts: number of clients by site name.
        counts_on: by site name, how many clients at another site it counts on at most.
        plan: says how many clients and sites a sum needs.
    """
    fewest = fewest_sites(counts, plan.min_clients, plan.min_sites)
    for name, most in counts_on.items():
        believed = counted_on(counts, name, most)
        if sum(believed.values()) >= plan.min_clients:  # a site that counts on fewer refuses; the others may be enough
            fewest = max(fewest, fewest_sites(believed, plan.min_clients, plan.min_sites))
    return secagg.threshold(len(counts), fewest)


def _check_enough(counts: Mapping[str, int], plan: Plan, needed: int) -> None:
    """Check that the sites that are left may form a sum, and are enough to open it.

    Raises:
        SecureAggregationError: `secagg-too-few`.
    """
    check_sum(counts, plan.min_clients, plan.min_sites)
    if len(counts) < needed:
        raise SecureAggregationError(
            f"{len(counts)} sites are left", f"{needed}, as many as open a sum", code="secagg-too-few"
        )


def _longest(plan: Plan, clients: int) -> float:
    """Return the largest norm of a sum over this many clients, in levels; noise has eight standard deviations."""
    noise = math.sqrt(mechanism_of(plan).client_variance(plan) * clients)
    return clients * LEVELS + noise * (math.sqrt(plan.dimension) + 8)
