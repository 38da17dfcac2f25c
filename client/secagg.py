"""A site's part of secure aggregation: its four steps, and the checks before each.

Between the steps, the session is in Flower's `Context.state`. It has secrets, never leaves the process that keeps the
context, and loses each secret as soon as the secret is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.keys import POINT_BYTES, fingerprint, is_signed, key_of, point_of, sign
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.secagg import protocol as secagg
from tsugiki.common.privacy.secagg.binding import HASH_BYTES, hash_context, hash_order, hash_terms, signed_text
from tsugiki.common.privacy.secagg.counts import check_sum, fewest_sites
from tsugiki.common.privacy.secagg.messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    SESSION_BYTES,
    SIGNED_BYTES,
    ClientState,
    check_names,
    exactly,
    from_fields,
    to_fields,
)
from tsugiki.common.wire.messages import StageRequest, TrainRequest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.app import ArrayRecord, RecordDict

    from tsugiki.client.site.policy import SitePolicy

log = logging.getLogger("tsugiki.client")

STATE = "secagg"
"""Record of the context: the session."""
COUNTS = "secagg-clients"
"""Record of the context: how many clients of each site of the session this site counts on."""
BOUND = "secagg-terms"
"""Record of the context: the hashes of what this site was asked to do in the session."""


def answer_keys(
    state: RecordDict,
    request: StageRequest,
    fields: Mapping[str, Any],
    site: str,
    plan: Plan,
    policy: SitePolicy,
    key: EllipticCurvePrivateKey | None,
) -> dict[str, Any]:
    """Begin a session, and forget the one before; return the public keys, signed if this site has a node key.

    The session is bound to its round, settings, plan and order: no later step may have others.

    Args:
        state: of the context.
        request: the first of the session.
        fields: beside the request. They have the hash of the request to train that will follow: the server has to
            commit to the adapter before this site makes any share.
        site: name of this site.
        plan: that this site made from the settings.
        policy: of this site. The server is sent how many clients at another site it counts on at most, because the
            threshold of the shares depends on it.
        key: of this site's node; None: it has none, as in a simulation.

    Raises:
        SecureAggregationError: `secagg-message`, an id or a hash has another size.
    """
    from flwr.app import ConfigRecord

    order = exactly(fields.get("order"), HASH_BYTES)
    begun = secagg.start(request.session, site)
    terms = hash_terms(request.session, request.round, request.config, plan, order)
    answer: dict[str, Any] = {"public_keys": begun.public_keys, "counts_on": policy.clients_counted_per_site}
    if key is not None:
        signature = sign(key, signed_text(terms, site, begun.public_keys))
        answer["signed"] = point_of(key.public_key()) + signature
    state[BOUND] = ConfigRecord({"session": request.session, "order": order, "terms": terms})
    _keep(state, begun)
    return answer


def check_bound(state: RecordDict, request: StageRequest | TrainRequest, plan: Plan) -> bytes:
    """Check that a step has the round, settings and plan that its session began with; return the hash of the terms.

    Otherwise a server could let sites add the noise for a sum of many clients, and then open a sum of few.

    Raises:
        SecureAggregationError: `secagg-mismatch`.
    """
    record = dict(state.config_records.get(BOUND) or {})
    if record:
        session = exactly(record["session"], SESSION_BYTES)
        order = exactly(record["order"], HASH_BYTES)
        terms = hash_terms(session, request.round, request.config, plan, order)
        if terms == record["terms"]:
            return terms
    raise SecureAggregationError(
        "the round, the settings or the plan are not those of the session",
        "those with which it began",
        code="secagg-mismatch",
    )


def check_order(state: RecordDict, request: TrainRequest, adapter: ArrayRecord | None) -> None:
    """Check that a request to train, and the adapter beside it, are those that the server committed to.

    Raises:
        SecureAggregationError: `secagg-mismatch`.
    """
    if hash_order(request, adapter) != state.config_records[BOUND]["order"]:
        raise SecureAggregationError(
            "the adapter or the schedule is another than the server announced when the session began",
            "the same for all sites of the sum",
            code="secagg-mismatch",
        )


def answer_shares(
    state: RecordDict,
    session: bytes,
    fields: Mapping[str, Any],
    plan: Plan,
    own_clients: int,
    terms: bytes,
    policy: SitePolicy,
) -> dict[str, Any]:
    """Share this site's secrets among all sites of the session; return the sealed shares.

    Args:
        state: of the context.
        session: id of the session.
        fields: public keys of all sites, with signatures of the sites that have node keys, how many clients each site
            has, and the threshold of the shares.
        plan: says how many clients and sites a sum needs, and how many clients a site may have.
        own_clients: how many clients this site has.
        terms: of `check_bound`.
        policy: says who may be in the sum, and how many clients of another site this site counts on.

    Raises:
        SecureAggregationError: another session, too few clients, a malformed list, or a signature that is not good.
        PolicyError: `policy-members:SITE` or `policy-clients`. Nothing was shared.
    """
    kept = _kept(state, session)
    keys = from_fields("keys", fields, KEYS_BYTES)
    signed = from_fields("signed", fields, SIGNED_BYTES)
    if policy.members:
        _check_members(kept.name, keys, signed, terms, policy)
    counts = dict(zip(sorted(keys), _counts(fields.get("clients"), len(keys)), strict=True))
    _check_counts(kept.name, counts, plan, own_clients)
    believed = policy.count_on(kept.name, counts, plan)
    if policy.clients_counted_per_site > 1:
        log.info(
            "counts on %d clients: its own, and up to %d at each other site, on the server's word",
            sum(believed.values()),
            policy.clients_counted_per_site,
        )
    # A sum that is too small by what this site counts on must not be open to anybody, so the shares demand more.
    needed = fields.get("needed")
    least = secagg.threshold(len(keys), fewest_sites(believed, plan.min_clients, plan.min_sites))
    if type(needed) is not int or not least <= needed <= len(keys):
        raise SecureAggregationError("the threshold of the shares is out of range", f"{least} to {len(keys)}")
    context = hash_context(terms, keys, counts, signed, needed)
    kept, sealed = secagg.make_shares(kept, keys, needed, context)
    _keep(state, kept, believed)
    return to_fields("sealed", sealed)


def _check_counts(site: str, counts: Mapping[str, int], plan: Plan, own_clients: int) -> None:
    """Check the server's numbers of clients as far as this site can.

    Raises:
        SecureAggregationError: it has another number for this site, or more for a site than the plan allows.
    """
    if counts.get(site) != own_clients:
        raise SecureAggregationError(
            "the list has another number of clients for this site", str(own_clients), code="secagg-message"
        )
    if max(counts.values()) > plan.max_clients_per_site:
        most = f"at most privacy.max_clients_per_site = {plan.max_clients_per_site}"
        raise SecureAggregationError(f"a site of the list stands for {max(counts.values())} clients", most)


def _check_members(
    site: str, keys: Mapping[str, bytes], signed: Mapping[str, bytes], terms: bytes, policy: SitePolicy
) -> None:
    """Check that each other site of a list is pinned, and that its node key signed its keys for this session.

    Raises:
        PolicyError: `policy-members:SITE`, a site is not pinned, has another node key, or has signed nothing.
        SecureAggregationError: `secagg-signature`.
    """
    others = sorted(keys.keys() - {site})
    node_keys = {name: key_of(signed[name][:POINT_BYTES]) for name in others if name in signed}
    policy.check_members({name: fingerprint(node_keys[name]) if name in node_keys else "" for name in others})
    for name, node_key in node_keys.items():
        if not is_signed(node_key, signed[name][POINT_BYTES:], signed_text(terms, name, keys[name])):
            raise SecureAggregationError(
                f"the keys that came as those of {name!r} are not signed by it for this session",
                "a signature of these keys, for the round, settings, plan and adapter that this site was sent",
                code="secagg-signature",
            )


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
