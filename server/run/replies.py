"""What sites were asked, and the verdicts on what came back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import Code
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.wire.spec import Vector

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Asked:
    """What one site was asked in one round.

    Args:
        site: its name.
        node_id: where the request went.
        round: counted from 1.
        nonce: what the reply has to repeat.
        rows: from the hello; no reply weighs more.
        clients: how many of the site's clients were asked.
    """

    site: str
    node_id: int
    round: int
    nonce: str
    rows: int
    clients: int = 1


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
    clients: int = 1


@dataclass(frozen=True)
class AcceptedSum:
    """A private reply that passed: the protected sum over a site's clients, in levels, shape (size,), and no more.

    Under secure aggregation it is masked: what it holds are integers modulo 2^bits without any meaning.
    """

    site: str
    levels: Levels
    clients: int
    size_bytes: int


@dataclass(frozen=True)
class AcceptedStep:
    """A site's answer to a step of secure aggregation that passed, read."""

    site: str
    read: Any
    clients: int
    size_bytes: int


@dataclass(frozen=True)
class Rejected:
    """A reply that did not: the reason is a code, the detail holds numbers only."""

    site: str
    reason: Code
    detail: str = ""
    size_bytes: int = 0


DROPOUT: Code = "dropout"
"""The reason when no reply came before the deadline, or none can come any more."""


GONE = ("flower-error-3", "flower-error-4", "flower-error-5")
"""What a SuperLink answers for a node that is gone: message, reply or node unavailable."""
