"""The guard: a reply is hostile until it is checked, and a bad one costs its site the round, not the run.

Flower's own FedAvg averages NaN, broadcasts wrong shapes and believes self-declared weights. Here every reply is
compared with what was asked of that site in that round, and with what the site said in its hello.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import WireError
from common.messages import EvaluateReply, TrainReply, error_code, from_record
from common.wire import AdapterSpec, Vector, decode, l2_norm

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict


@dataclass(frozen=True)
class Asked:
    """What one site was asked in one round.

    Args:
        site: its name.
        node_id: where the request went.
        round: counted from 1.
        nonce: what the reply has to repeat.
        rows: from the hello; no reply weighs more.
    """

    site: str
    node_id: int
    round: int
    nonce: str
    rows: int


@dataclass(frozen=True)
class Accepted:
    """A reply that passed: the update, shape (size,), its weight in rows, and what the site measured and shares."""

    site: str
    update: Vector
    weight: int
    loss: float | None
    steps: int
    seconds: float
    norm: float
    size_bytes: int


@dataclass(frozen=True)
class Rejected:
    """A reply that did not: the reason is a code, the detail holds numbers only."""

    site: str
    reason: str
    detail: str = ""
    size_bytes: int = 0


DROPOUT = "dropout"
"""The reason when no reply came before the deadline, or none can come any more."""

GONE = ("flower-error-3", "flower-error-4", "flower-error-5")
"""What a SuperLink answers for a node that is gone: message, reply or node unavailable."""


def check(reply: Message, asked: Asked, spec: AdapterSpec, max_update_norm: float) -> Accepted | Rejected:
    """Accept or reject a reply to a train request."""
    if reply.has_error():
        code = error_code(reply)
        return Rejected(asked.site, DROPOUT, code) if code in GONE else Rejected(asked.site, code)
    size = array_bytes(reply.content)
    try:
        answer = from_record(TrainReply, reply.content)
        _check_origin(answer, asked)
        weight = _weight(answer.rows, asked.rows)
        if not (math.isfinite(answer.loss) and answer.steps > 0 and 0 <= answer.seconds < math.inf):
            raise WireError("loss, steps or seconds out of range", code="metrics")
        arrays = reply.content.array_records.get("arrays")
        if arrays is None or set(reply.content) != {"reply", "arrays"}:
            raise WireError("other records than reply and arrays", code="keys")
        update = decode(arrays, spec)
    except WireError as error:
        return Rejected(asked.site, error.code, str(error), size)
    norm = l2_norm(update)
    if norm > max_update_norm:
        return Rejected(asked.site, "norm", f"{norm:.4g}, allowed {max_update_norm:g}", size)
    loss = answer.loss if answer.loss_shared else None
    return Accepted(asked.site, update, weight, loss, answer.steps, answer.seconds, norm, size)


def check_evaluation(reply: Message, asked: Asked) -> tuple[dict[str, float], int] | Rejected:
    """Return (metrics, rows) of a site's own evaluation, or why not."""
    if reply.has_error():
        return Rejected(asked.site, error_code(reply))
    try:
        answer = from_record(EvaluateReply, reply.content)
        _check_origin(answer, asked)
        record = reply.content.metric_records.get("metrics")
        if record is None or not all(type(value) is float and math.isfinite(value) for value in record.values()):
            raise WireError("metrics", "finite numbers", code="metrics")
        return {str(name)[:64]: float(value) for name, value in record.items()}, _weight(answer.rows, asked.rows)  # type: ignore[arg-type]  # floats, checked just above
    except WireError as error:
        return Rejected(asked.site, error.code, str(error))


def _check_origin(answer: TrainReply | EvaluateReply, asked: Asked) -> None:
    if answer.site != asked.site:
        raise WireError("another site's name", code="site")
    if answer.round != asked.round or answer.nonce != asked.nonce:
        raise WireError(f"round {answer.round}", f"round {asked.round} and its nonce", code="stale")


def _weight(rows: int, known: int) -> int:
    """Return the weight of a site: its rows, at most what it said in the hello."""
    if rows < 1:
        raise WireError(f"{rows} rows", "at least 1", code="weight")
    return min(rows, known)


def array_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
