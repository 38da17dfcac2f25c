"""Certificates that TLS itself accepts, for the right names only."""

import socket
import ssl
import threading

import pytest
from cryptography import x509

from tsugiki.common.errors import LinkError, UsageError
from tsugiki.server.deploy.certs import ALWAYS, make_certificates


def names(files):
    """Return all names in the server's certificate."""
    certificate = x509.load_pem_x509_certificate(files.server.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))}


def handshake(files, name, authority=None):
    """Connect over loopback with TLS under a name; return the protocol's version."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.server, files.server_key)
    client = ssl.create_default_context(cafile=authority or files.ca)
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def answer():
            try:
                server.wrap_socket(theirs, server_side=True).close()
            except (ssl.SSLError, OSError):
                theirs.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with client.wrap_socket(ours, server_hostname=name) as wrapped:
                return wrapped.version()
        finally:
            ours.close()
            thread.join(5)


def test_a_client_with_the_ca_connects_by_any_name(tmp_path):
    """Catches: a certificate for one name only, without loopback, or one that OpenSSL's checks refuse."""
    files = make_certificates(tmp_path, ["fed.example.org", "203.0.113.7", "2001:db8::1"])
    assert names(files) == {"fed.example.org", "203.0.113.7", "2001:db8::1", *ALWAYS}
    for name in ("fed.example.org", "203.0.113.7", "localhost", "127.0.0.1"):
        assert handshake(files, name) == "TLSv1.3"


def test_others_are_refused(tmp_path):
    """Catches: a certificate that is good for everything; an authority like any other."""
    files = make_certificates(tmp_path / "a", ["fed.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "evil.example.org")
    other = make_certificates(tmp_path / "b", ["fed.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "fed.example.org", other.ca)


def test_a_second_call_keeps_the_authority(tmp_path):
    """Catches: a renewed server certificate that locks out every site, because the CA changed with it."""
    files = make_certificates(tmp_path, ["one.example.org"])
    authority, old = files.ca.read_bytes(), files.server.read_bytes()
    make_certificates(tmp_path, ["two.example.org"])
    assert files.ca.read_bytes() == authority
    assert files.server.read_bytes() != old
    assert handshake(files, "two.example.org")


def test_keys_are_their_owners_alone(tmp_path):
    """Catches: a server key that everybody on the machine can read; a CA key that is used although others can."""
    files = make_certificates(tmp_path, [])
    assert {path.stat().st_mode & 0o777 for path in (files.ca_key, files.server_key)} == {0o600}
    files.ca_key.chmod(0o644)
    with pytest.raises(LinkError) as caught:
        make_certificates(tmp_path, [])
    assert caught.value.code == "key-permissions"


def test_the_server_cannot_sign_others(tmp_path):
    """Catches: a stolen server key with which certificates can be made."""
    files = make_certificates(tmp_path, [])
    server, authority = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (files.server, files.ca))
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


@pytest.mark.parametrize("name", ["", "a b", "http://x", "-x", "x/y", "a" * 300])
def test_what_is_no_name_is_refused(tmp_path, name):
    """Catches: a certificate that no client will ever match."""
    with pytest.raises(UsageError):
        make_certificates(tmp_path / "new", [name])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "server.crt"])
def test_a_damaged_file_is_an_error_with_its_name(tmp_path, name):
    """Catches: a traceback of the cryptography library."""
    make_certificates(tmp_path, ["fed.example.org"])
    (tmp_path / name).write_bytes(b"\xff not PEM")
    with pytest.raises(UsageError, match=name):
        make_certificates(tmp_path, [])


def test_without_names_the_old_ones_are_kept(tmp_path):
    """Catches: a renewed certificate that is for loopback only, and locks every site out."""
    files = make_certificates(tmp_path, ["fed.example.org", "203.0.113.7"])
    before = names(files)
    make_certificates(tmp_path, [])
    assert names(files) == before
    certificate = x509.load_pem_x509_certificate(files.server.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "203.0.113.7" not in found.get_values_for_type(x509.DNSName)  # clients match addresses as addresses only
