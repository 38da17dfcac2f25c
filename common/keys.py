"""A node's key pair, in Flower's format: ECDSA on P-384 in OpenSSH files, as `ssh-keygen -t ecdsa -b 384` makes them.

The private part stays at the site, readable by its owner alone. The public part goes to the operator, who registers it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.common.errors import LinkError, SecureAggregationError, UsageError
from tsugiki.common.files import open_new

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

LONGEST_FILE_BYTES = 10_000
_HAS_MODES = hasattr(os, "geteuid")
"""Whether the mode of a file says who can read it. On Windows it says the same of every file."""

POINT_BYTES = 49
"""Length of a public key on P-384 as a compressed point."""
SIGNATURE_BYTES = 96
"""Length of a signature: the numbers r and s, 48 bytes each."""
FINGERPRINT_PATTERN = r"^SHA256:[A-Za-z0-9+/]{43}$"
"""Pattern of what `fingerprint` returns."""


def new_key_pair(path: Path) -> Path:
    """Write a new private key to `path` and its public part to `path`.pub; return the path of the public part.

    Raises:
        UsageError: either file exists already, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    target = path.with_name(path.name + ".pub")
    if os.path.lexists(target):  # checked before anything is written: a new key must not be beside an old public part
        raise UsageError(f"the file {target} is there already", "a new name", "choose another, or delete both files")
    _write_new(path, private, 0o600)
    _write_new(target, public + b"\n", 0o666)
    return target


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read; an existing file is never replaced.

    Raises:
        UsageError: the file exists already, or cannot be written.
    """
    _write_new(path, content, 0o600)  # created with these permissions, so that others can read it at no moment


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a new file with these permissions.

    Raises:
        UsageError: the file exists already, or cannot be written.
    """
    try:
        with open_new(path, mode) as file:
            file.write(content)
    except FileExistsError:
        raise UsageError(
            f"the file {path} is there already", "a new name", "choose another, or delete the file"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "a writable folder", "check the folder") from error


def read_private(path: Path) -> bytes:
    """Return a secret file's content.

    Windows' permissions are not looked at: a file there is as secret as its folder.

    Raises:
        LinkError: `key-missing`, or `key-permissions`: others on this machine can read it.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise LinkError(
            f"cannot read {path}: {error.strerror}", "a private key file", "check the path", code="key-missing"
        ) from error
    if _HAS_MODES and stat.S_IMODE(mode) & 0o077:
        raise LinkError(
            f"the key {path} can be read by others ({stat.S_IMODE(mode):04o})",
            "mode 0600",
            f"chmod 600 {path}",
            code="key-permissions",
        )
    return content


def read_private_key(path: Path) -> EllipticCurvePrivateKey:
    """Return a node's private key.

    Raises:
        LinkError: `key-missing`, `key-permissions`, or `key-invalid`: encrypted, or not a key of Flower's kind.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    content = read_private(path)
    try:
        key = load_ssh_private_key(content, None)
    except Exception as error:  # noqa: BLE001  # cryptography raises ValueError, TypeError and its own
        why = "it is no OpenSSH private key"
        about_password = "encrypted" in str(error) or "password" in str(error).lower()
        if b"PRIVATE KEY" in content and about_password:
            why = "it is encrypted, and nobody can be asked for a password"
        raise LinkError(
            f"the key {path} cannot be used: {why}", "a key of `tsugiki keys new`", "make a new one", code="key-invalid"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise LinkError(
            f"the file {path} holds another kind of key",
            "ECDSA on P-384",
            "`tsugiki keys new`, which makes one",
            code="key-invalid",
        )
    return key


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """Return a node's public key.

    Raises:
        UsageError: the file cannot be read, or holds another kind of key.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE_BYTES)  # the operator did not make this file, so its size is not trusted
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "a public key file", "check the path") from error
    if b"PRIVATE KEY" in content:
        raise UsageError(
            f"the file {path} is a PRIVATE key",
            "its public part, ending in .pub",
            "delete this copy: it belongs to the site",
        )
    wrong = UsageError(f"the file {path} is no public key of a node", "ECDSA on P-384, as `tsugiki keys new` makes it")
    try:
        key = load_ssh_public_key(content)
    except Exception:  # noqa: BLE001  # cryptography raises ValueError and its own
        raise wrong from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise wrong
    return key


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the key's fingerprint as `ssh-keygen -l` shows it, to be compared over another channel."""
    from cryptography.hazmat.primitives import serialization as form

    line = key.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    # The line has the type and the key; OpenSSH hashes the key alone.
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def point_of(key: EllipticCurvePublicKey) -> bytes:
    """Return a public key as a compressed point, 49 bytes."""
    from cryptography.hazmat.primitives import serialization as form

    return key.public_bytes(form.Encoding.X962, form.PublicFormat.CompressedPoint)


def key_of(point: bytes) -> EllipticCurvePublicKey:
    """Return the public key of a compressed point that was received.

    Raises:
        SecureAggregationError: `secagg-message`, the bytes are no point of P-384.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
    except ValueError:
        raise SecureAggregationError(
            "a node key is no point of P-384", f"{POINT_BYTES} bytes, a compressed point", code="secagg-message"
        ) from None


def sign(key: EllipticCurvePrivateKey, text: bytes) -> bytes:
    """Return the signature of a text with a node's private key, 96 bytes: ECDSA with SHA-384.

    Source: NIST 2023, FIPS 186-5, section 6.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA384

    half = SIGNATURE_BYTES // 2
    r, s = utils.decode_dss_signature(key.sign(text, ec.ECDSA(SHA384())))
    return r.to_bytes(half, "big") + s.to_bytes(half, "big")


def is_signed(key: EllipticCurvePublicKey, signature: bytes, text: bytes) -> bool:
    """Return whether a signature of `sign` belongs to this key and text."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA384

    half = SIGNATURE_BYTES // 2
    r = int.from_bytes(signature[:half], "big")
    s = int.from_bytes(signature[half:], "big")
    try:
        key.verify(utils.encode_dss_signature(r, s), text, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
