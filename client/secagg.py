"""A site's part of secure aggregation: its four steps, and the checks before each.

Between the steps, the session is in Flower's `Context.state`. It has secrets, never leaves the process that keeps the
context, and loses each secret as soon as the secret is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.secagg import protocol as secagg
from tsugiki.common.privacy.secagg.counts import check_sum, fewest_sites
from tsugiki.common.privacy.secagg.messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    SESSION_BYTES,
    ClientState,
    check_names,
    exactly,
    from_fields,
    to_fields,
)

if TYPE_CHECKING:
    from flwr.app import RecordDict

STATE = "secagg"
"""Record of the context: the session."""
COUNTS = "secagg-clients"
"""Record of the context: how many clients each site of the session has."""
BOUND = "secagg-plan"
"""Record of the context: the plan and the round of the session."""


def bind(state: RecordDict, plan: Plan, round_number: int) -> None:
    """Bind the session that begins to a plan and a round.

    The plan says how much noise a site adds, and how many clients a sum needs before it is opened. Both must come from
    the same plan.
    """
    from flwr.app import ConfigRecord

    state[BOUND] = ConfigRecord({"plan": plan.sha256, "round": round_number})


def check_bound(state: RecordDict, plan: Plan, round_number: int) -> None:
    """Check that a step has the plan and the round that its session began with.

    Otherwise a server could let sites add the noise for a sum of many clients, and then open a sum of few.

    Raises:
        SecureAggregationError: it has another plan or round.
    """
    record = state.config_records.get(BOUND)
    if record is None or dict(record) != {"plan": plan.sha256, "round": round_number}:
        raise SecureAggregationError("the plan or the round is not that of the session", "those with which it began")


def answer_keys(state: RecordDict, session: bytes, site: str) -> dict[str, Any]:
    """Begin a session, and forget the one before; return the public keys."""
    begun = secagg.start(session, site)
    _keep(state, begun)
    return {"public_keys": begun.public_keys}


def answer_shares(
    state: RecordDict, session: bytes, fields: Mapping[str, Any], plan: Plan, own_clients: int
) -> dict[str, Any]:
    """Share this site's secrets among all sites of the session; return the sealed shares.

    Args:
        state: of the context.
        session: id of the session.
        fields: public keys of all sites, and how many clients each site has.
        plan: says how many clients and sites a sum needs, and how many clients a site may have.
        own_clients: how many clients this site has.

    Raises:
        SecureAggregationError: another session, too few clients, or a malformed list.
    """
    kept = _kept(state, session)
    keys = from_fields("keys", fields, KEYS_BYTES)
    # The server may lie about other sites, but not about this one, and no site may have more than the plan allows.
    counts = dict(zip(sorted(keys), _counts(fields.get("clients"), len(keys)), strict=True))
    if counts.get(kept.name) != own_clients:
        raise SecureAggregationError(
            "the list has another number of clients for this site", str(own_clients), code="secagg-message"
        )
    if max(counts.values()) > plan.max_clients_per_site:
        most = f"at most privacy.max_clients_per_site = {plan.max_clients_per_site}"
        raise SecureAggregationError(f"a site of the list stands for {max(counts.values())} clients", most)
    threshold = fewest_sites(counts, plan.min_clients, plan.min_sites)
    kept, sealed = secagg.make_shares(kept, keys, threshold)
    _keep(state, kept, counts)
    return to_fields("sealed", sealed)


def open_shares(state: RecordDict, fields: Mapping[str, Any]) -> None:
    """Open the shares that the other sites sealed for this one. Called before training, which costs more.

    Raises:
        SecureAggregationError: another session, or shares that do not open.
    """
    kept = _kept(state, fields.get("session"))
    _keep(state, secagg.receive_shares(kept, from_fields("sealed", fields, SEALED_BYTES)))


def mask(state: RecordDict, session: Any, levels: Levels, bits: int) -> Levels:
    """Return this site's protected sum under all its masks, shape (size,). Alone it reveals nothing."""
    kept, masked = secagg.mask_vector(_kept(state, session), levels, bits)
    _keep(state, kept)
    return masked.view("int64")


def answer_unmask(state: RecordDict, session: bytes, fields: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return this site's shares of what opens the sum, once, if the sum is over enough clients and sites.

    Raises:
        SecureAggregationError: fewer clients than the plan needs, lists that overlap or have sites outside the session,
            a second request, or another session. Nothing is revealed then.
    """
    kept = _kept(state, session)
    survivors = check_names(fields.get("survivors", []))
    dropped = check_names(fields.get("dropped", []))
    # Only the survivors are in the sum, so they have to be enough.
    record = state.config_records[COUNTS]
    counts = {name: int(record[name]) for name in survivors if name in record}  # type: ignore[arg-type]  # ours
    check_sum(counts, plan.min_clients, plan.min_sites)
    # The threshold is the whole session's: it was fixed when the shares were made.
    listed = {name: int(record[name]) for name in record}  # type: ignore[arg-type]  # ours
    fewest = fewest_sites(listed, plan.min_clients, plan.min_sites)
    kept, answer = secagg.answer_unmask(kept, survivors, dropped, fewest)
    _keep(state, kept)
    return answer.to_dict()


def _counts(value: Any, wanted: int) -> list[int]:
    if not isinstance(value, list) or len(value) != wanted or not all(type(one) is int and one > 0 for one in value):
        raise SecureAggregationError(
            "the message has no list of numbers of clients", "one number for each site", code="secagg-message"
        )
    return value


def _keep(state: RecordDict, session: ClientState, counts: Mapping[str, int] | None = None) -> None:
    """Store a session before anything that follows from it is sent."""
    from flwr.app import ConfigRecord

    state[STATE] = ConfigRecord(session.to_dict())
    if counts is not None:
        state[COUNTS] = ConfigRecord(dict(counts))


def _kept(state: RecordDict, session: Any) -> ClientState:
    """Return the stored session, if it has this id."""
    record = state.config_records.get(STATE)
    kept = None
    if record is not None:
        kept = ClientState.from_dict(dict(record))
    if kept is None or kept.session != exactly(session, SESSION_BYTES):
        raise SecureAggregationError("this site is not in the session", "the session that it began last")
    return kept
