"""The operator's commands for keys and certificates."""

from datetime import datetime, timedelta

import pytest
from typer.testing import CliRunner

from tests.support.command_line import invoke, printed
from tsugiki.cli import app
from tsugiki.client.site.policy import SitePolicy
from tsugiki.common.errors import UsageError


def test_from_a_new_key_to_a_registered_one_and_back(tmp_path):
    """Catches: a fingerprint at the site that is not the operator's; a private key named as the one to send."""
    key, keys = tmp_path / "acme", tmp_path / "keys"
    made = printed("keys", "new", key)
    assert f"{key}.pub: the public key; send it" in made
    fingerprint = made.split()[-1]
    assert fingerprint in printed("keys", "register", f"{key}.pub", "--keys", keys)
    assert printed("keys", "list", "--keys", keys).split() == ["acme", fingerprint]
    assert "acme is revoked" in printed("keys", "revoke", "acme", "--keys", keys)
    listed = printed("keys", "list", "--keys", keys).split()
    assert listed[:3] == ["acme", fingerprint, "revoked"]
    assert datetime.fromisoformat(listed[3]).utcoffset() == timedelta(0)


def test_restoring_a_key_needs_a_yes(tmp_path):
    """Catches: a stolen key that a slip of the keyboard lets in again; a script that waits for an answer."""
    key, keys = tmp_path / "acme", tmp_path / "keys"
    printed("keys", "new", key)
    printed("keys", "register", f"{key}.pub", "--keys", keys)
    printed("keys", "revoke", "acme", "--keys", keys)
    restoring = ["keys", "restore", "acme", "--keys", str(keys)]
    runner = CliRunner()
    for answer in ("", "n\n"):
        assert runner.invoke(app, restoring, input=answer).exit_code != 0
        assert "revoked" in printed("keys", "list", "--keys", keys)
    assert runner.invoke(app, restoring, input="y\n").exit_code == 0
    assert printed("keys", "list", "--keys", keys) == ""
    printed("keys", "register", f"{key}.pub", "--keys", keys)
    printed("keys", "revoke", "acme", "--keys", keys)
    assert "can be registered again" in printed(*restoring, "--yes")


def test_certificates_say_what_goes_where(tmp_path):
    """Catches: a CA key that is sent to the sites; a second call that claims a new CA."""
    first = printed("certs", "--host", "fed.example.org", "--tls", tmp_path)
    assert "ca.crt: the CA's certificate; give it to every site" in first.replace("\n", "")
    assert "fed.example.org" in first
    assert "ca.crt" not in printed("certs", "--host", "other.example.org", "--tls", tmp_path)


def test_a_fingerprint_is_what_another_site_pins(tmp_path):
    """Catches: a fingerprint that [policy] members does not take; the own key not found; a file for another machine."""
    made = printed("keys", "new", tmp_path / "acme.key").split()[-1]
    site = tmp_path / "site.toml"
    site.write_text('[site]\nname = "acme"\n[server]\nkey = "acme.key"\n')
    line = printed("keys", "fingerprint", "--site", site).strip()
    assert line == f"acme {made}"
    assert printed("keys", "fingerprint", tmp_path / "acme.key.pub").strip() == line
    assert printed("keys", "fingerprint", tmp_path / "acme.key").strip() == line
    assert SitePolicy(members=[line]).members == (line,)


@pytest.mark.parametrize(
    "text", ['[site]\nname = "acme"\n', '[server]\nkey = "acme.key"\n', 'site = "a"\nserver = 1\n']
)
def test_a_site_without_a_key_has_no_fingerprint(tmp_path, text):
    """Catches: a traceback in place of what is missing."""
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(UsageError, match="names no site or no key"):
        invoke("keys", "fingerprint", "--site", tmp_path / "site.toml")
