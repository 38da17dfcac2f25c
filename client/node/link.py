"""Address and credentials for the connection to the SuperLink."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.client.site.site import SYSTEM_CAS
from tsugiki.common.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


@dataclass(frozen=True)
class Link:
    """Address and credentials for the connection to the SuperLink.

    Args:
        address: HOST:PORT of the Fleet API.
        root_certificates: PEM of the CAs, one of which signed the server's certificate; None: no TLS.
        private_key: of the node; None: a new one for each connection, for servers that accept unknown nodes.
        retry_s: how long a server that has not accepted this node yet may be away. After that it is waited for without
            end.
    """

    address: str
    root_certificates: bytes | None
    private_key: EllipticCurvePrivateKey | None
    retry_s: float


def trusted_cas(authority: str) -> bytes:
    """Return the certificates of the CAs that a site trusts, as PEM.

    Args:
        authority: the path of a file; "system": those that this machine trusts.

    Raises:
        UsageError: the file cannot be read; `tls-ca-invalid`, Python finds no CA that this machine trusts.
    """
    if authority == SYSTEM_CAS:
        return _cas_of_machine()
    try:
        return Path(authority).read_bytes()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot read {authority}: {why}", "the federation's CA certificate") from error


def _cas_of_machine() -> bytes:
    """Return the CAs of OpenSSL's file and folder, which SSL_CERT_FILE and SSL_CERT_DIR move, or of Windows' store.

    gRPC's own list is that of its package, without a company's CA.
    """
    context = ssl.create_default_context()
    folder = ssl.get_default_verify_paths().capath
    # OpenSSL itself reads the folder's files only when it needs them
    for file in sorted(Path(folder).iterdir()) if folder else []:
        with suppress(OSError, ssl.SSLError):  # a README, or a file that is not for everybody
            context.load_verify_locations(file)
    found = context.get_ca_certs(binary_form=True)
    if not found:
        raise UsageError(
            "this machine trusts no CA that Python finds",
            "certificates in OpenSSL's file or folder, or in Windows' store",
            "--ca FILE with the CA's certificate, or name such a file in SSL_CERT_FILE",
            code="tls-ca-invalid",
        )
    return "".join(ssl.DER_cert_to_PEM_cert(certificate) for certificate in found).encode()
