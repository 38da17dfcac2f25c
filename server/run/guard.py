"""The guard: a reply is hostile until it is checked, and a bad one costs its site the round, not the run.

Flower's own FedAvg averages NaN, broadcasts wrong shapes and believes self-declared weights. Here every reply is
compared with what was asked of that site in that round, and with the site's hello.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import SecureAggregationError, WireError
from tsugiki.common.head_sums import MOST_ROWS, HeadSums, check_sums, numbers_of, unpack_sums
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import mechanism_of
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.strategies.factors import widen
from tsugiki.common.wire.arrays import array_records, decode, decode_levels, decode_numbers
from tsugiki.common.wire.messages import (
    BESIDE,
    EvaluateReply,
    HeadSumsReply,
    PrivateReply,
    TrainReply,
    beside,
    error_code,
    from_record,
)
from tsugiki.common.wire.spec import AdapterSpec, l2_norm
from tsugiki.server.run.replies import GONE, Accepted, AcceptedStep, AcceptedSum, Asked, Content, Rejected

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict


def check(
    reply: Message, asked: Asked, spec: AdapterSpec, max_update_norm: float, part: AdapterSpec | None = None
) -> Accepted | Rejected:
    """Accept or reject a reply to a train request.

    Args:
        reply: of the site.
        asked: the request to the site.
        spec: of the adapter.
        max_update_norm: no update may be longer.
        part: the part of the adapter that sites send in this round; None: all of it. The update is zero elsewhere.
    """
    if reply.has_error():
        return _refusal(reply, asked)
    size = array_bytes(reply.content)
    try:
        answer = from_record(TrainReply, reply.content)
        _check_origin(answer, asked)
        rows = _rows(answer.rows, asked.rows)
        counted = answer.steps > 0 and answer.missed_steps >= 0
        if not (math.isfinite(answer.loss) and counted and 0 <= answer.seconds < math.inf):
            raise WireError("loss, steps or seconds are out of range", code="metrics")
        arrays = array_records(reply.content).get("arrays")
        if arrays is None or set(reply.content) != {"reply", "arrays"}:
            raise WireError("the message has other records than reply and arrays", code="keys")
        update = widen(decode(arrays, part or spec, copy=False), part or spec, spec)
    except WireError as error:
        return Rejected(asked.site, error.code, str(error), size)
    norm = l2_norm(update)
    if norm > max_update_norm:
        return Rejected(asked.site, "norm", f"{norm:.4g}, allowed {max_update_norm:g}", size)
    loss = answer.loss if answer.loss_shared else None
    return Accepted(
        site=asked.site,
        update=update,
        rows=rows,
        loss=loss,
        steps=answer.steps,
        seconds=answer.seconds,
        norm=norm,
        size_bytes=size,
        clients=asked.clients,
        missed_steps=answer.missed_steps,
    )


def check_private(reply: Message, asked: Asked, plan: Plan, masked: bool = False) -> AcceptedSum | Rejected:
    """Accept or reject a reply of a private run.

    A sum without the site's noise must be within the clip norms exactly. For a noisy sum, the bound allows eight
    standard deviations more. A masked sum is uniform whatever it holds, so its norm is not checked.
    """
    if reply.has_error():
        return _refusal(reply, asked)
    size = array_bytes(reply.content)
    try:
        answer = from_record(PrivateReply, reply.content)
        _check_origin(answer, asked)
        arrays = array_records(reply.content).get("arrays")
        if arrays is None or set(reply.content) != {"reply", "arrays"}:
            raise WireError("the message has other records than reply and arrays", code="keys")
        levels = decode_levels(arrays, plan.dimension, plan.modulus_bits)
    except WireError as error:
        return Rejected(asked.site, error.code, str(error), size)
    # each client may add one clip norm, and its noise
    norm = levels.l2_norm()
    noise = math.sqrt(mechanism_of(plan).client_variance(plan) * asked.clients)
    most = asked.clients * LEVELS + noise * (math.sqrt(plan.dimension) + 8)
    if not masked and norm > most * (1 + 1e-12):
        return Rejected(asked.site, "norm", f"{norm / LEVELS:.4g} clip norms, allowed {most / LEVELS:.4g}", size)
    return AcceptedSum(asked.site, levels, asked.clients, size)


def check_step(
    reply: Message, asked: Asked, read: Callable[[dict[str, Any]], Content]
) -> AcceptedStep[Content] | Rejected:
    """Accept or reject an answer to a step of secure aggregation.

    Args:
        reply: of the site.
        asked: the request to the site.
        read: decodes the fields; raises SecureAggregationError if they are malformed.
    """
    if reply.has_error():
        return _refusal(reply, asked)
    try:
        _check_origin(from_record(PrivateReply, reply.content), asked)
        if set(reply.content) != {"reply", BESIDE}:
            raise WireError(f"the message has other records than reply and {BESIDE}", code="keys")
        value = read(beside(reply.content))
    except (WireError, SecureAggregationError) as error:
        return Rejected(asked.site, error.code, str(error))
    return AcceptedStep(asked.site, value, asked.clients, reply.content.config_records[BESIDE].count_bytes())


def check_head_sums(reply: Message, asked: Asked, width: int, classes: int) -> AcceptedStep[HeadSums] | Rejected:
    """Accept or reject a reply to a request for sums of features.

    Args:
        reply: of the site.
        asked: the request to the site.
        width: number of features.
        classes: number of classes.
    """
    if reply.has_error():
        return _refusal(reply, asked)
    size = array_bytes(reply.content)
    try:
        answer = from_record(HeadSumsReply, reply.content)
        _check_origin(answer, asked)
        most = min(asked.rows, MOST_ROWS)  # a site that counts more would outweigh the honest ones
        if not 1 <= answer.rows <= most:
            raise WireError(f"the reply counts {answer.rows} rows", f"1 to {most}", code="weight")
        arrays = array_records(reply.content).get("arrays")
        if arrays is None or set(reply.content) != {"reply", "arrays"}:
            raise WireError("the message has other records than reply and arrays", code="keys")
        sums = unpack_sums(decode_numbers(arrays, numbers_of(width, classes)), width, classes)
        check_sums(sums, answer.rows)
    except WireError as error:
        return Rejected(asked.site, error.code, str(error), size)
    return AcceptedStep(asked.site, sums, asked.clients, size)


def check_evaluation(reply: Message, asked: Asked) -> tuple[dict[str, float], int] | Rejected:
    """Return the metrics and the number of rows of a site's own evaluation, or the rejection."""
    if reply.has_error():
        return Rejected(asked.site, error_code(reply))
    try:
        answer = from_record(EvaluateReply, reply.content)
        _check_origin(answer, asked)
        record = reply.content.metric_records.get("metrics")
        if record is None or not all(type(value) is float and math.isfinite(value) for value in record.values()):
            raise WireError("metrics are not finite", "finite numbers", code="metrics")
        return {str(name)[:64]: float(value) for name, value in record.items()}, _rows(answer.rows, asked.rows)  # type: ignore[arg-type]  # floats, checked just above
    except WireError as error:
        return Rejected(asked.site, error.code, str(error))


def _refusal(reply: Message, asked: Asked) -> Rejected:
    """Return the rejection of an error reply: a dropout, if the SuperLink says that the node is gone."""
    code = error_code(reply)
    return Rejected(asked.site, "gone", code) if code in GONE else Rejected(asked.site, code)


def _check_origin(answer: TrainReply | PrivateReply | EvaluateReply | HeadSumsReply, asked: Asked) -> None:
    if answer.site != asked.site:
        raise WireError("the reply has another site's name", code="site")
    if answer.round != asked.round_number or answer.nonce != asked.nonce:
        raise WireError(
            f"the reply is to round {answer.round}", f"round {asked.round_number} and its nonce", code="stale"
        )


def _rows(rows: int, known: int) -> int:
    """Return the rows of a site, at most the number in its hello."""
    if rows < 1:
        raise WireError(f"the reply counts {rows} rows", "at least 1", code="weight")
    return min(rows, known)


def array_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message."""
    return sum(len(array.data) for record in array_records(content).values() for array in record.values())
