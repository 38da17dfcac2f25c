"""Address and credentials for the connection to the SuperLink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


@dataclass(frozen=True)
class Link:
    """Address and credentials for the connection to the SuperLink.

    Args:
        address: HOST:PORT of the Fleet API.
        root_certificates: PEM of the CA that signed the server's certificate; None: no TLS.
        private_key: of the node; None: a new one for each connection, for servers that accept unknown nodes.
        retry_s: how long a server that has not accepted this node yet may be away. After that it is waited for without
            end.
    """

    address: str
    root_certificates: bytes | None
    private_key: EllipticCurvePrivateKey | None
    retry_s: float
