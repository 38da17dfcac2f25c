"""A federation's own certificate authority and the server's certificate.

DIR/ca.crt       goes to every site, which trusts it
DIR/ca.key       signs; keep it off the server if you can
DIR/server.crt   the server's, with all its names
DIR/server.key   its key, readable by its owner alone
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.common.errors import UsageError
from tsugiki.common.files import write_atomically
from tsugiki.common.keys import read_private, write_private

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_DAYS = 3650
SERVER_DAYS = 397
ALWAYS = ("localhost", "127.0.0.1")
"""The run itself talks to the SuperLink over loopback."""


@dataclass(frozen=True)
class CertificateFiles:
    """The paths of a federation's certificates and keys."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The authority's key."""
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """The server's key."""
        return self.folder / "server.key"


def make_certificates(
    folder: Path, hosts: list[str], days: int = SERVER_DAYS, start: datetime | None = None
) -> CertificateFiles:
    """Make a server certificate, and the authority that signs it unless the folder has one.

    Args:
        folder: created if missing. An existing server certificate is replaced: its names or its time were wrong.
        hosts: names and addresses by which sites reach the server; loopback's are added. Empty: those in the existing
            certificate.
        days: how long the server's certificate is valid.
        start: when it begins to be valid; by default now.

    Raises:
        UsageError: a name is no host name or address, the folder cannot be written, or its files are damaged.
    """
    files = CertificateFiles(folder)
    names = [_name(host) for host in dict.fromkeys([*(hosts or names_in(files)), *ALWAYS])]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # an authority that is there is kept: sites trust it already
        if not files.ca.exists():
            _make_authority(files)
        _make_server(files, names, days, start or datetime.now(UTC))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}", "a writable folder") from error
    return files


def names_in(files: CertificateFiles) -> list[str]:
    """Return the names and addresses in the server's certificate, if there is one."""
    from cryptography import x509

    if not files.server.is_file():
        return []
    try:
        extensions = read_certificates(files.server)[0].extensions
        found = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:  # a company's certificate with a name in its subject only
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates in a PEM file, at least one.

    Raises:
        UsageError: the file cannot be read, or holds none.
    """
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "a PEM file", "check its permissions") from error
    except ValueError as error:
        raise UsageError(
            f"the file {path} holds no certificate",
            "a PEM file, of `tsugiki certs` or another CA",
            "restore it, or remove it",
        ) from error


def _name(host: str) -> x509.GeneralName:
    """Return a subjectAltName.

    Raises:
        UsageError: it is neither a host name nor an address.
    """
    import re

    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host):
        raise UsageError(f"--host {host!r:.80} is not valid", "a host name or an IP address")
    return x509.DNSName(host)


def _make_authority(files: CertificateFiles) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    name = _subject("Tsugiki federation CA")
    builder = _builder(name, name, key, datetime.now(UTC), CA_DAYS).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), True
    )
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # sign certificates and CRLs
    certificate = _signed(builder.add_extension(usage, critical=True), key)
    write_private(files.ca_key, _pem(key))
    write_atomically(files.ca, certificate)


def _make_server(files: CertificateFiles, names: list[x509.GeneralName], days: int, start: datetime) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority = read_certificates(files.ca)[0]
    try:
        signer = load_pem_private_key(read_private(files.ca_key), None)
    except (TypeError, ValueError) as error:  # a TypeError for a key with a password
        raise UsageError(f"the file {files.ca_key} holds no private key", f"the key of {files.ca}") from error
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_subject("Tsugiki server"), authority.subject, key, start, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    certificate = _signed(builder, signer)  # type: ignore[arg-type]  # `_make_authority` wrote it
    # the old key goes first, because `write_private` never overwrites a file
    files.server_key.unlink(missing_ok=True)
    write_private(files.server_key, _pem(key))
    write_atomically(files.server, certificate)


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, start: datetime, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(minutes=5))  # clocks differ
        .not_valid_after(start + timedelta(days=days))
    )


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
