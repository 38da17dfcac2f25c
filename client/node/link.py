"""Where the SuperLink is, and how to talk to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


@dataclass(frozen=True)
class Link:
    """Where the SuperLink is, and how to talk to it.

    Args:
        address: HOST:PORT of the Fleet API.
        root_certificates: PEM of the CA that signed the server's certificate; None: no TLS.
        private_key: the node's; None: a new one for each connection, for servers that take unknown nodes.
        retry_s: how long to try again after the connection was lost.
    """

    address: str
    root_certificates: bytes | None
    private_key: EllipticCurvePrivateKey | None
    retry_s: float
