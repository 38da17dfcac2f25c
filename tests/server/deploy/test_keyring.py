"""The folder of registered keys."""

import pytest

from tsugiki.common.errors import UsageError
from tsugiki.common.keys import fingerprint, new_key_pair, read_public_key
from tsugiki.server.deploy.keyring import register, registered, revoke


@pytest.fixture
def public(tmp_path):
    """A site's public key."""
    return new_key_pair(tmp_path / "acme")


def test_a_key_is_registered_listed_and_revoked(tmp_path, public):
    """Catches: a copy that is not the key; a name other than the file's; a revoked key that stays."""
    keys = tmp_path / "keys"
    assert register(keys, public) == ("acme", fingerprint(read_public_key(public)))
    assert list(registered(keys)) == ["acme"]
    assert registered(keys)["acme"].read_bytes() == public.read_bytes()
    revoke(keys, "acme")
    assert registered(keys) == {}


def test_one_key_is_one_node(tmp_path, public):
    """Catches: a site that takes part twice under two names; a key replaced without being revoked."""
    keys = tmp_path / "keys"
    register(keys, public)
    with pytest.raises(UsageError, match="registered already, as acme"):
        register(keys, public, "bolt")
    with pytest.raises(UsageError, match="acme has a key already"):
        register(keys, new_key_pair(tmp_path / "other"), "acme")
    assert list(registered(keys)) == ["acme"]


@pytest.mark.parametrize("name", ["../acme", "a/b", "A", "", "x" * 65, "con\n"])
def test_names_do_not_become_paths(tmp_path, public, name):
    """Catches: a file written or deleted outside the keyring."""
    keys = tmp_path / "keys"
    keys.mkdir()
    if name:  # an empty one means that of the file
        with pytest.raises(UsageError):
            register(keys, public, name)
    with pytest.raises(UsageError):
        revoke(keys, name)
    assert public.exists()
    assert list(keys.iterdir()) == []


def test_a_private_key_is_not_registered(tmp_path, public):
    """Catches: the site's secret, copied to the operator's folder."""
    with pytest.raises(UsageError, match="PRIVATE"):
        register(tmp_path / "keys", public.with_suffix(""))
    assert not (tmp_path / "keys").exists()
