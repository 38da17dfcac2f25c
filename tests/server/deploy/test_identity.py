"""A company's certificates: taken as they are, or refused with what is missing, before anything starts."""

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.support.pki import company, key_pem, pem, signed
from tsugiki.common.errors import UsageError
from tsugiki.server.deploy.certs import make_certificates, read_certificates
from tsugiki.server.deploy.identity import read_identity

HOST = "fed.corp"


@pytest.fixture(scope="module")
def corp():
    """A company with an intermediate CA."""
    return company(HOST)


def nobody(path):
    """Fail: no passphrase is needed."""
    raise AssertionError(f"the passphrase of {path} was asked for")


def refused(files, passphrase=nobody):
    """Return the error with which certificates are refused."""
    with pytest.raises(UsageError) as caught:
        read_identity(files, passphrase)
    assert caught.value.expected
    assert caught.value.hint
    return caught.value


def test_a_company_s_chain_and_our_own_certificates_are_taken(corp, tmp_path):
    """Catches: a check that only knows certificates of `tsugiki certs`; a chain of which one certificate is sent."""
    found = read_identity(corp.install(tmp_path / "corp"), nobody)
    assert found.chain == pem(corp.server[0]) + pem(corp.intermediate[0])
    assert load_pem_private_key(found.key, None).public_key() == corp.server[1].public_key()
    assert "PRIVATE" not in repr(found)
    ours = make_certificates(tmp_path / "ours", [HOST])
    assert read_identity(ours, nobody).chain == ours.server.read_bytes()


def test_the_sites_may_trust_the_intermediate_ca_itself(corp, tmp_path):
    """Catches: a chain that has to end in a root, although the sites trust the company's issuing CA."""
    files = corp.install(tmp_path / "corp", intermediate=False)
    files.ca.write_bytes(pem(corp.intermediate[0]))
    assert read_identity(files, nobody).chain == pem(corp.server[0])


def test_without_a_ca_of_its_own_the_machines_trust_decides(corp, tmp_path):
    """Catches: a public CA's certificate refused, because nobody has made a ca.crt for it."""
    files = corp.install(tmp_path / "corp")
    files.ca.unlink()
    assert read_identity(files, nobody).chain


def test_a_missing_intermediate_is_named(corp, tmp_path):
    """Catches: a server that starts, and that no site can trust."""
    error = refused(corp.install(tmp_path / "corp", intermediate=False))
    assert error.code == "tls-chain"
    assert "CN=Corp Issuing CA" in error.problem
    assert "server.crt" in error.hint


def test_another_root_is_named(corp, tmp_path):
    """Catches: a CA of the same name, taken for the one that signed; a loop of CAs that sign each other."""
    files = corp.install(tmp_path / "corp")
    files.ca.write_bytes(pem(signed("Corp Root", None, ca=True)[0]))
    error = refused(files)
    assert error.code == "tls-chain"
    assert "CN=Corp Root" in error.problem
    files.server.write_bytes(files.server.read_bytes() + pem(corp.root[0]))
    assert refused(files).code == "tls-chain"


def test_a_key_of_another_certificate_is_named(corp, tmp_path):
    """Catches: a handshake that fails at every site, because a certificate was renewed and its key was not copied."""
    files = corp.install(tmp_path / "corp")
    files.server_key.write_bytes(key_pem(signed("other", None)[1]))
    error = refused(files)
    assert error.code == "tls-key"
    assert "server.key is not the key of the first certificate" in error.problem
    assert "CN=fed server" in error.problem


def test_a_chain_in_the_wrong_order_is_named(corp, tmp_path):
    """Catches: the CA's certificate shown to the sites as the server's."""
    files = corp.install(tmp_path / "corp")
    files.server.write_bytes(pem(corp.intermediate[0]) + pem(corp.server[0]))
    error = refused(files)
    assert error.code == "tls-key"
    assert "put the server's certificate, CN=fed server, first" in error.hint


def test_a_passphrase_opens_the_key(corp, tmp_path):
    """Catches: a key that the SuperLink cannot read; a wrong passphrase as a traceback."""
    files = corp.install(tmp_path / "corp", passphrase=b"secret")
    asked = []

    def answer(path):
        asked.append(path)
        return b"secret"

    key = read_identity(files, answer).key
    assert asked == [files.server_key]
    assert load_pem_private_key(key, None).public_key() == corp.server[1].public_key()
    error = refused(files, lambda path: b"wrong-secret")
    assert error.code == "tls-key"
    assert "wrong-secret" not in str(error)


@pytest.mark.parametrize(("days", "words"), [(-2, "has expired on"), (60, "is not valid before")])
def test_a_certificate_out_of_its_time_is_named(tmp_path, days, words):
    """Catches: a server that starts, and that every site refuses."""
    error = refused(company(HOST, days=days).install(tmp_path / "corp"))
    assert error.code == "tls-expired"
    assert "CN=fed server" in error.problem
    assert words in error.problem


@pytest.mark.parametrize("name", ["server.crt", "server.key", "ca.crt"])
def test_a_damaged_file_is_named(corp, tmp_path, name):
    """Catches: a traceback of the cryptography library."""
    files = corp.install(tmp_path / "corp")
    (files.folder / name).write_bytes(b"\xff not PEM")
    assert name in refused(files).problem


def test_the_certificates_of_a_file_are_read_in_order(corp, tmp_path):
    """Catches: only the first certificate of a chain."""
    files = corp.install(tmp_path / "corp")
    assert read_certificates(files.server) == [corp.server[0], corp.intermediate[0]]
