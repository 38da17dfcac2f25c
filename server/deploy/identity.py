"""The server's certificate, chain and key, checked before anything starts.

They may be those of `tsugiki certs`, of a company's CA or of a public one. TLS itself would fail later, at each site,
and would say there only that something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.common.errors import UsageError
from tsugiki.server.deploy.certs import CertificateFiles, read_certificates

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

Passphrase = Callable[[Path], bytes]
"""Returns the passphrase of the key in a file. Raises UsageError if there is nobody to ask."""


@dataclass(frozen=True)
class Identity:
    """What a server shows to sites, and proves.

    Args:
        chain: PEM: the server's certificate, then those of intermediate CAs.
        key: PEM of its private key, without a passphrase.
    """

    chain: bytes
    key: bytes = field(repr=False)


def read_identity(files: CertificateFiles, passphrase: Passphrase) -> Identity:
    """Return the server's certificates and key, if sites that trust `files.ca` can connect to them.

    Args:
        files: of the server. Without `files.ca` the server's CA is one that the sites' machines trust.
        passphrase: called if the key has one.

    Raises:
        UsageError: a file cannot be used; `tls-key`, the key needs another passphrase or belongs to another
            certificate; `tls-chain`, the certificate of an intermediate CA is missing; `tls-expired`.
    """
    chain = read_certificates(files.server)
    key = _read_key(files.server_key, passphrase)
    _check_pair(files, chain, key)
    _check_time(files.server, chain)
    if files.ca.is_file():
        authorities = read_certificates(files.ca)
        _check_time(files.ca, authorities)
        _check_chain(files, chain, authorities)
    return Identity(files.server.read_bytes(), _unprotected(key))


def _read_key(path: Path, passphrase: Passphrase) -> PrivateKeyTypes:
    """Return the private key in a PEM file.

    Raises:
        UsageError: the file cannot be read, or holds none; `tls-key`, the passphrase is another.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", "the server's key", "check its permissions"
        ) from error
    given: bytes | None = None
    try:
        try:
            return load_pem_private_key(content, None)
        except TypeError:  # it has a passphrase
            given = passphrase(path)
            return load_pem_private_key(content, given)
    except ValueError as error:
        if given is not None:
            raise UsageError(
                f"the passphrase does not open {path}",
                "the passphrase with which the key was written",
                "give the right one",
                code="tls-key",
            ) from None
        raise UsageError(
            f"the file {path} holds no private key",
            "a PEM file, which begins with BEGIN PRIVATE KEY",
            "the key with which the certificate was requested",
        ) from error


def _check_pair(files: CertificateFiles, chain: Sequence[x509.Certificate], key: PrivateKeyTypes) -> None:
    """Check that the key is that of the first certificate.

    Raises:
        UsageError: `tls-key`, it is not.
    """
    public = key.public_key()
    owners = [certificate.public_key() == public for certificate in chain]
    if owners[0]:
        return
    hint = "the key with which this certificate was requested"
    if any(owners):
        hint = f"put the server's certificate, {_name(chain[owners.index(True)])}, first in {files.server}"
    raise UsageError(
        f"{files.server_key} is not the key of the first certificate in {files.server}, {_name(chain[0])}",
        "the server's certificate and its own key",
        hint,
        code="tls-key",
    )


def _check_time(path: Path, certificates: Sequence[x509.Certificate]) -> None:
    """Check that certificates are valid now.

    Raises:
        UsageError: `tls-expired`, one of them is not.
    """
    now = datetime.now(UTC)
    for certificate in certificates:
        starts = certificate.not_valid_before_utc
        ends = certificate.not_valid_after_utc
        if starts <= now <= ends:
            continue
        if now > ends:
            problem = f"has expired on {ends:%Y-%m-%d}"
        else:
            problem = f"is not valid before {starts:%Y-%m-%d %H:%M} UTC"
        raise UsageError(
            f"the certificate {_name(certificate)} in {path} {problem}",
            "a valid certificate, and the right time on this machine",
            "a new one from your CA, or `tsugiki certs`, which keeps the names",
            code="tls-expired",
        )


def _check_chain(
    files: CertificateFiles, chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> None:
    """Check that each certificate, from the server's on, was signed by another of the chain, up to a CA of the sites.

    Raises:
        UsageError: `tls-chain`, a certificate between them is missing.
    """
    current = chain[0]
    seen = [current]
    # a certificate that is itself among the CAs needs no signer
    while current not in authorities and not any(_has_signed(one, current) for one in authorities):
        signer = next((one for one in chain if one not in seen and _has_signed(one, current)), None)
        if signer is None:
            issuer = current.issuer.rfc4514_string()
            raise UsageError(
                f"{_name(current)} was signed by {issuer}, which is neither in {files.server} nor in {files.ca}",
                "the server's certificate and those of all intermediate CAs, up to a CA that the sites trust",
                f"append the certificate of {issuer} to {files.server} if it is an intermediate CA, or to {files.ca} "
                "if the sites have it as their CA",
                code="tls-chain",
            )
        seen.append(signer)
        current = signer


def _has_signed(signer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Return whether a certificate was signed with another one's key."""
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):  # another name, a key that signs nothing, another key
        return False
    return True


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "without a name"


def _unprotected(key: PrivateKeyTypes) -> bytes:
    """Return a private key as PEM without a passphrase, as gRPC needs it."""
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
