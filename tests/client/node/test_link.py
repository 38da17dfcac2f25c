"""The CAs that a site trusts."""

import ssl

import pytest
from cryptography import x509

from tsugiki.client.node.link import trusted_cas
from tsugiki.common.errors import UsageError
from tsugiki.server.deploy.certs import make_certificates


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Moves what this machine trusts to a file and a folder that are not there yet."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "trusted"))
    return tmp_path


def test_a_file_is_taken_as_it_is(tmp_path):
    """Catches: a bundle of which one certificate is read."""
    bundle = tmp_path / "ca.crt"
    bundle.write_bytes(make_certificates(tmp_path / "a", []).ca.read_bytes() * 2)
    assert trusted_cas(str(bundle)) == bundle.read_bytes()
    with pytest.raises(UsageError, match="missing"):
        trusted_cas(str(tmp_path / "missing"))


@pytest.mark.parametrize("place", ["trusted.pem", "trusted/corp.pem"])
def test_the_machine_s_store_has_the_company_s_ca(store, place):
    """Catches: the list that gRPC's package brings, which no company's CA is in; a store that is a folder only."""
    ours = make_certificates(store / "tls", []).ca
    target = store / place
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(ours.read_bytes())
    (target.parent / "README").write_text("no certificate")
    found = x509.load_pem_x509_certificates(trusted_cas("system"))
    assert found == x509.load_pem_x509_certificates(ours.read_bytes())
    ssl.create_default_context(cadata=trusted_cas("system").decode())


def test_a_machine_without_a_store_is_told(store):
    """Catches: a connection that trusts nobody, and an error that blames the server."""
    with pytest.raises(UsageError) as caught:
        trusted_cas("system")
    assert caught.value.code == "tls-ca-invalid"
    assert "SSL_CERT_FILE" in caught.value.hint
