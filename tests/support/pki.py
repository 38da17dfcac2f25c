"""A company's public key infrastructure: a root, an intermediate CA, and the server's certificate signed by that."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tsugiki.server.deploy.certs import CertificateFiles

Pair = tuple[x509.Certificate, rsa.RSAPrivateKey]


@dataclass(frozen=True)
class Company:
    """The certificates of a company, each with its key."""

    root: Pair
    intermediate: Pair
    server: Pair

    def install(self, folder: Path, *, intermediate: bool = True, passphrase: bytes = b"") -> CertificateFiles:
        """Write the files of a server, as an operator would put them together; return their paths.

        Args:
            folder: created.
            intermediate: whether server.crt has the intermediate CA's certificate.
            passphrase: of the server's key; empty: none.
        """
        folder.mkdir(parents=True)
        files = CertificateFiles(folder)
        chain = [self.server, self.intermediate] if intermediate else [self.server]
        files.server.write_bytes(b"".join(pem(certificate) for certificate, _ in chain))
        files.server_key.write_bytes(key_pem(self.server[1], passphrase))
        files.ca.write_bytes(pem(self.root[0]))
        return files


def company(host: str, *, days: int = 30) -> Company:
    """Make the certificates of a company; the server's is for one name, and for the last or next `days`."""
    root = signed("Corp Root", None, ca=True)
    intermediate = signed("Corp Issuing CA", root, ca=True)
    return Company(root, intermediate, signed("fed server", intermediate, host=host, days=days))


def signed(name: str, signer: Pair | None, *, host: str = "", ca: bool = False, days: int = 30) -> Pair:
    """Return a certificate and its key; without a signer it signs itself."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    ends = datetime.now(UTC) + timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(ends - timedelta(days=40))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if host:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    return builder.sign(signer[1] if signer else key, hashes.SHA256()), key


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(form.Encoding.PEM)


def key_pem(key: rsa.RSAPrivateKey, passphrase: bytes = b"") -> bytes:
    """Return a key as PEM, in the older form that openssl writes for RSA."""
    protection = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.TraditionalOpenSSL, protection)
