"""The operator's commands for keys and certificates, and what `serve` says of wrong calls."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tsugiki.cli import app
from tsugiki.common.errors import UsageError


def call(*arguments):
    """Run a command; return its output, or raise what it raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_from_a_new_key_to_a_registered_one_and_back(tmp_path):
    """Catches: a fingerprint at the site that is not the operator's; a private key named as the one to send."""
    key, keys = tmp_path / "acme", tmp_path / "keys"
    made = call("keys", "new", key)
    assert f"{key}.pub: the public key; send it" in made
    fingerprint = made.split()[-1]
    assert fingerprint in call("keys", "register", f"{key}.pub", "--keys", keys)
    assert call("keys", "list", "--keys", keys).split() == ["acme", fingerprint]
    assert "acme is revoked" in call("keys", "revoke", "acme", "--keys", keys)
    assert call("keys", "list", "--keys", keys) == ""


def test_certificates_say_what_goes_where(tmp_path):
    """Catches: a CA key that is sent to the sites; a second call that claims a new CA."""
    first = call("certs", "--host", "fed.example.org", "--tls", tmp_path)
    assert "ca.crt: the CA's certificate; give it to every site" in first.replace("\n", "")
    assert "fed.example.org" in first
    assert "ca.crt" not in call("certs", "--host", "other.example.org", "--tls", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [("serve",), ("serve", "run.toml", "--resume", "runs/x"), ("serve", "run.toml", "--previous")],
)
def test_wrong_calls(arguments):
    """Catches: a run that starts although it is not clear which."""
    with pytest.raises(UsageError):
        call(*arguments)


def test_a_client_without_a_server_or_a_ca_is_told(tmp_path):
    """Catches: a client that connects in the clear because nothing was said; to another machine even when it was."""
    site = tmp_path / "site.toml"
    call("site", "init", site, "--name", "acme")
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    for options, words in (
        ((), "--server"),
        (("--server", "127.0.0.1:1"), "CA certificate"),
        (("--server", "192.0.2.1:1", "--insecure"), "loopback"),
        (("--server", "127.0.0.1:1", "--ca", tmp_path / "missing"), "Cannot read"),
    ):
        with pytest.raises(UsageError, match=words):
            call("client", "--site", site, *options)
    assert Path(site).is_file()
