"""Key files: what is written can be read, and what should not be used is refused with the reason."""

import re
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from tsugiki.common.errors import LinkError, SecureAggregationError, UsageError
from tsugiki.common.keys import (
    FINGERPRINT_PATTERN,
    POINT_BYTES,
    SIGNATURE_BYTES,
    fingerprint,
    is_signed,
    key_of,
    new_key_pair,
    point_of,
    read_private_key,
    read_public_key,
    sign,
    write_private,
)


def refusal(path):
    """Return the code with which a private key file is refused."""
    with pytest.raises(LinkError) as caught:
        read_private_key(path)
    assert str(path) in str(caught.value)
    return caught.value.code


def test_a_pair_is_written_and_read(tmp_path):
    """Catches: two halves that do not belong together; a format that Flower's own command does not take."""
    public = new_key_pair(tmp_path / "acme")
    key = read_private_key(tmp_path / "acme")
    assert fingerprint(key.public_key()) == fingerprint(read_public_key(public))
    assert try_load_public_key(public) == public_key_to_bytes(key.public_key())


def test_the_private_part_is_its_owners_alone(tmp_path):
    """Catches: a key written with the usual permissions; a public part that holds the private one."""
    public = new_key_pair(tmp_path / "acme")
    assert (tmp_path / "acme").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in public.read_bytes()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_fingerprints_are_those_of_ssh(tmp_path):
    """Catches: a fingerprint that cannot be compared with what other tools show."""
    public = new_key_pair(tmp_path / "acme")
    shown = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
    assert fingerprint(read_public_key(public)) in shown


@pytest.mark.parametrize("there", ["acme", "acme.pub"])
def test_no_key_is_overwritten(tmp_path, there):
    """Catches: a second `keys new` that makes a registered key useless."""
    (tmp_path / there).write_text("old")
    with pytest.raises(UsageError, match="is there already"):
        new_key_pair(tmp_path / "acme")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "old"


@pytest.mark.parametrize("name", ["acme", "acme.pub"])
def test_no_key_is_written_through_a_link(tmp_path, name):
    """Catches: a link to a file that does not exist yet, which an attacker wants to have filled."""
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is there already"):
        new_key_pair(tmp_path / "acme")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    """Catches: a check of one of group and world only."""
    new_key_pair(tmp_path / "acme")
    (tmp_path / "acme").chmod(mode)
    assert refusal(tmp_path / "acme") == "key-permissions"


def test_what_is_no_key_is_refused(tmp_path):
    """Catches: a traceback of the cryptography library; a password asked of nobody."""
    assert refusal(tmp_path / "missing") == "key-missing"
    write_private(tmp_path / "text", b"hello")
    assert refusal(tmp_path / "text") == "key-invalid"
    other = ed25519.Ed25519PrivateKey.generate()
    write_private(tmp_path / "ed", other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    assert refusal(tmp_path / "ed") == "key-invalid"


def test_a_private_key_on_another_curve_is_refused(tmp_path):
    """Catches: a key whose signatures and points have other lengths, so that a site fails in each secure sum."""
    other = ec.generate_private_key(ec.SECP256R1())
    write_private(tmp_path / "p256", other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    assert refusal(tmp_path / "p256") == "key-invalid"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_an_encrypted_key_is_refused_at_once(tmp_path):
    """Catches: a daemon that asks a password of nobody, or a traceback of the cryptography library."""
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", tmp_path / "locked"]
    subprocess.run(command, check=True)
    with pytest.raises(LinkError, match="encrypted") as caught:
        read_private_key(tmp_path / "locked")
    assert caught.value.code == "key-invalid"


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path):
    """Catches: a site's private key, sent by mistake and registered without a word."""
    new_key_pair(tmp_path / "acme")
    with pytest.raises(UsageError, match="PRIVATE"):
        read_public_key(tmp_path / "acme")


def test_another_kind_of_public_key_is_refused(tmp_path):
    """Catches: a key that the SuperLink refuses much later."""
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "ed.pub").write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    for name in ("ed.pub", "missing.pub"):
        with pytest.raises(UsageError):
            read_public_key(tmp_path / name)


def test_a_signature_belongs_to_one_key_and_one_text():
    """Catches: a signature that is not checked; numbers of another length; another hash at the two sides."""
    key, other = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    signature = sign(key, b"text")
    assert len(signature) == SIGNATURE_BYTES
    assert is_signed(key.public_key(), signature, b"text")
    assert not is_signed(key.public_key(), signature, b"texts")
    assert not is_signed(other.public_key(), signature, b"text")
    assert not is_signed(key.public_key(), bytes(SIGNATURE_BYTES), b"text")
    assert not is_signed(key.public_key(), b"\xff" * SIGNATURE_BYTES, b"text")
    assert not is_signed(key.public_key(), signature[::-1], b"text")


def test_a_public_key_travels_as_a_point():
    """Catches: a key whose fingerprint is another after it was sent; an error of the library in place of a code."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    assert len(point_of(public)) == POINT_BYTES
    assert fingerprint(key_of(point_of(public))) == fingerprint(public)
    assert re.fullmatch(FINGERPRINT_PATTERN, fingerprint(public))
    p256 = point_of(ec.generate_private_key(ec.SECP256R1()).public_key())
    for wrong in (b"", bytes(POINT_BYTES), b"\2" + b"\xff" * 48, point_of(public)[:-1], p256):
        with pytest.raises(SecureAggregationError) as caught:
            key_of(wrong)
        assert caught.value.code == "secagg-message"
