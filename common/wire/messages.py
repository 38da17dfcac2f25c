"""The messages between server and sites: their fields, and how they are stored in Flower's records.

A request carries a `request` record of plain values, a reply a `reply` record; the adapter or an update travels beside
it as the one array of `common/wire/arrays.py`. A site that cannot answer sends a Flower error whose reason is a code
and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from tsugiki.common.errors import Code, WireCode, WireError
from tsugiki.common.settings import NAME_PATTERN

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, RecordDict


SITE_ERROR = 1000
"""The number of a Flower error that carries one of our codes; Flower's own are below 10."""

ENDED = "ended"
"""The action of the query that tells a site that a run is over."""

BESIDE = "secagg"
"""The record that holds the fields of a step of secure aggregation."""

_SHARE = re.compile(r"[0-9](\.[0-9]{1,12})?(e-[0-9]{2})?")
_MOST_ROUNDS = 10**6
_ROUNDING = 1e-3
"""How far from 1 the sum of shares may be that were rounded to six digits."""
_CODE = re.compile(rf"[a-z][a-z0-9-]{{0,63}}(:[A-Za-z_][A-Za-z0-9_]{{0,63}})?|policy-members:{NAME_PATTERN}")


@dataclass(frozen=True)
class HelloRequest:
    """Ask a site who it is, and whether it fits this run."""

    config: str
    version: str


@dataclass(frozen=True)
class HelloReply:
    """A site's description of itself. `notes` are codes, separated by commas.

    `precision` is that of the site's matrix products, "float32" or "bf16".
    `clients` is the number of clients that train at this site: 1, or more behind a gateway. In a private run, `rows`
    and `evaluation_rows` are withheld (0), and the notes contain nothing about rows.
    """

    site: str
    version: str
    clients: int
    rows: int
    evaluation_rows: int
    base_fingerprint: str
    spec_sha256: str
    libraries: str
    notes: str
    precision: str = "float32"


@dataclass(frozen=True)
class TrainRequest:
    """Train from the adapter beside this.

    Args:
        config: the run as sites see it, JSON.
        round: counted from 1.
        spec_sha256: hash of the spec of the adapter that travels.
        schedule_start: share of the whole run's training done before this round, in [0, 1).
        schedule_stop: the same after it.
        deadline_s: a reply that takes longer, in seconds, is not used.
        nonce: to be repeated in the reply.
        clients: the site's clients that train, as numbers from 0, separated by commas; empty: all.
        class_shares: the share of each class in the federation, as `join_shares` writes them; empty: losses are not
            adjusted to a site's own shares.
        partial: whether a site that would be late sends what it has by the deadline.
    """

    config: str
    round: int
    spec_sha256: str
    schedule_start: float
    schedule_stop: float
    deadline_s: float
    nonce: str
    clients: str
    class_shares: str = ""
    partial: bool = False


@dataclass(frozen=True)
class StageRequest:
    """Do one step of secure aggregation.

    The step's flat fields travel beside the request (`common/privacy/secagg/messages.py`).

    Args:
        config: the run as sites see it, JSON.
        round: counted from 1.
        session: 16 random bytes; one for each attempt at a round.
        nonce: to be repeated in the reply.
    """

    config: str
    round: int
    session: bytes
    nonce: str


@dataclass(frozen=True)
class PrivateReply:
    """The reply of a site in a private run.

    Only the protected sum of the site's updates travels beside it; in secure aggregation, the fields of a step do.
    """

    site: str
    round: int
    nonce: str


@dataclass(frozen=True)
class TrainReply:
    """The reply to a `TrainRequest`, beside the update: local minus received adapter.

    `loss` has a meaning only if `loss_shared` is true. `missed_steps` are those for which the time was too short, and
    `rows` leaves out the rows that they would have used.
    """

    site: str
    round: int
    nonce: str
    rows: int
    steps: int
    loss: float
    loss_shared: bool
    seconds: float
    missed_steps: int = 0


@dataclass(frozen=True)
class EvaluateRequest:
    """Evaluate the adapter beside this on the site's own evaluation rows."""

    config: str
    round: int
    spec_sha256: str
    nonce: str


@dataclass(frozen=True)
class EvaluateReply:
    """The reply to an `EvaluateRequest`, beside a record of metrics."""

    site: str
    round: int
    nonce: str
    rows: int


@dataclass(frozen=True)
class HeadSumsRequest:
    """Send the sums of the features that the head reads, with the adapter beside this; `round` is 0."""

    config: str
    round: int
    spec_sha256: str
    nonce: str


@dataclass(frozen=True)
class HeadSumsReply:
    """The reply to a `HeadSumsRequest`, beside the packed sums of `common/head_sums.py` over `rows` rows."""

    site: str
    round: int
    nonce: str
    rows: int


@dataclass(frozen=True)
class EndedRequest:
    """Take note that a run is over for now.

    Args:
        run: its name.
        outcome: a code: how it ended.
        rounds: how many are done.
        rounds_in: in how many of these the site's update was; -1: the run does not say who is in a round.
    """

    run: str
    outcome: str
    rounds: int
    rounds_in: int


@dataclass(frozen=True)
class EndedReply:
    """The reply to an `EndedRequest`."""

    site: str


R = TypeVar(
    "R",
    HelloRequest,
    HelloReply,
    TrainRequest,
    TrainReply,
    StageRequest,
    PrivateReply,
    EvaluateRequest,
    EvaluateReply,
    HeadSumsRequest,
    HeadSumsReply,
    EndedRequest,
    EndedReply,
)


def to_record(
    message: Any, arrays: ArrayRecord | None = None, fields_beside: Mapping[str, Any] | None = None
) -> RecordDict:
    """Return the content of a Flower message, with an array or the fields of a step of secure aggregation beside it."""
    from flwr.app import ConfigRecord, RecordDict

    name = "request" if type(message).__name__.endswith("Request") else "reply"
    content = RecordDict({name: ConfigRecord(asdict(message))})
    if arrays is not None:
        content["arrays"] = arrays
    if fields_beside is not None:
        content[BESIDE] = ConfigRecord(dict(fields_beside))
    return content


def beside(content: RecordDict) -> dict[str, Any]:
    """Return the fields that travel beside a message.

    Raises:
        WireError: `keys`, if there are none.
    """
    record = content.config_records.get(BESIDE)
    if record is None:
        raise WireError(f"the message has no {BESIDE} record", "one such record", code="keys")
    return dict(record)


def from_record(kind: type[R], content: RecordDict) -> R:
    """Return the typed message of the given kind in a received content.

    Raises:
        WireError: `keys`, if the record is missing or has other keys; `type`, if a value has another type.
    """
    name = "request" if kind.__name__.endswith("Request") else "reply"
    record = content.config_records.get(name)
    expected = {field.name for field in fields(kind)}
    if record is None or set(record) != expected:
        raise WireError(f"no {name} record has the keys of {kind.__name__}", ", ".join(sorted(expected)), code="keys")
    for field, wanted in _TYPES[kind].items():  # exact types: `isinstance` would take a bool for an int
        if type(record[field]) is not wanted:
            raise WireError(f"the field {field} in {kind.__name__} has another type", wanted.__name__, code="type")
    return kind(**record)  # type: ignore[arg-type]  # checked just above


def read_ended(content: RecordDict) -> EndedRequest:
    """Return the message that a run is over, after checking that it can be shown and logged as it is.

    Raises:
        WireError: as `from_record`; `type`, a name or a code is none, or a number is out of range.
    """
    ended = from_record(EndedRequest, content)
    named = re.fullmatch(NAME_PATTERN, ended.run) and _CODE.fullmatch(ended.outcome)
    counted = 0 <= ended.rounds <= _MOST_ROUNDS and -1 <= ended.rounds_in <= ended.rounds
    if not (named and counted):
        raise WireError("the end of a run has another form", "a run's name, a code and two numbers", code="type")
    return ended


def join_shares(shares: Sequence[float]) -> str:
    """Return `TrainRequest.class_shares`: a decimal number for each class, separated by commas."""
    return ",".join(f"{share:.6g}" for share in shares)


def split_shares(text: str, classes: int) -> tuple[float, ...]:
    """Return the numbers in `TrainRequest.class_shares`; none if it is empty.

    Args:
        text: as it was received.
        classes: of the task.

    Raises:
        WireError: `class-shares`, it is not one share above 0 for each class, with the sum 1.
    """
    if not text:
        return ()
    parts = text.split(",")
    valid = len(parts) == classes and all(_SHARE.fullmatch(part) for part in parts)
    shares = tuple(map(float, parts)) if valid else ()
    if not (valid and min(shares) > 0 and abs(sum(shares) - 1) < _ROUNDING):
        raise WireError(
            "the shares of the classes are not valid", f"{classes} numbers above 0 with the sum 1", code="class-shares"
        )
    return shares


_TYPES: dict[type[Any], dict[str, type[Any]]] = {kind: get_type_hints(kind) for kind in R.__constraints__}


def error_reply(code: str, to: Message) -> Message:
    """Return a site's reply to a request that it cannot fulfil: a code, never a text."""
    from flwr.app import Error, Message

    return Message(Error(SITE_ERROR, code), reply_to=to)


def error_code(reply: Message) -> Code:
    """Return the code in an error reply of a site or of Flower. A reason that is not a code becomes `client-error`."""
    if reply.error.code != SITE_ERROR:
        return WireCode(f"flower-error-{int(reply.error.code)}")
    # The reason comes from the network, so it is used only if it has the form of a code.
    reason = reply.error.reason or ""
    return WireCode(reason) if _CODE.fullmatch(reason) else "client-error"
