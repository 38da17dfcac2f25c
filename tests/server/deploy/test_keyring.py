"""The folder of registered keys."""

import pytest

from tsugiki.common.errors import StorageError, UsageError
from tsugiki.common.keys import fingerprint, new_key_pair, read_public_key
from tsugiki.server.deploy.keyring import register, registered, restore, revoke, revoked


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


@pytest.mark.parametrize("name", ["acme", "bolt"])
def test_a_revoked_key_does_not_come_back(tmp_path, public, name):
    """Catches: a key that was stolen and revoked, registered again from the same file, under its name or another."""
    keys = tmp_path / "keys"
    _, fingerprint_shown = register(keys, public)
    revoke(keys, "acme")
    with pytest.raises(UsageError, match="was revoked on 20") as caught:
        register(keys, public, name)
    assert caught.value.code == "key-revoked"
    assert registered(keys) == {}
    assert list(revoked(keys)) == [fingerprint_shown]
    assert register(keys, new_key_pair(tmp_path / "new"), "acme")[0] == "acme"


@pytest.mark.parametrize("by", ["fingerprint", "name"])
def test_a_restored_key_is_registered_and_revoked_again(tmp_path, public, by):
    """Catches: a key that stays revoked; one that cannot be revoked a second time."""
    keys = tmp_path / "keys"
    name, shown = register(keys, public)
    for _ in range(2):
        revoke(keys, "acme")
        assert restore(keys, {"fingerprint": shown, "name": name}[by]).name == "acme"
        assert revoked(keys) == {}
        register(keys, public)
    revoke(keys, "acme")
    assert list(revoked(keys)) == [shown]


def test_what_is_restored_is_one_key(tmp_path, public):
    """Catches: one of two keys of a name restored by chance; a key restored that was never revoked."""
    keys = tmp_path / "keys"
    register(keys, public)
    with pytest.raises(UsageError, match="none is revoked"):
        restore(keys, "acme")
    revoke(keys, "acme")
    register(keys, new_key_pair(tmp_path / "second"), "acme")
    revoke(keys, "acme")
    assert len(revoked(keys)) == 2
    with pytest.raises(UsageError, match="not one revoked key"):
        restore(keys, "acme")


@pytest.mark.parametrize("content", [b"\xff\n", b"{}\n", b"[]\n", b"nonsense\n"])
def test_a_damaged_list_of_revoked_keys_is_not_an_empty_one(tmp_path, public, content):
    """Catches: all revoked keys let in again, because the list cannot be read."""
    keys = tmp_path / "keys"
    register(keys, public)
    (keys / "revoked").write_bytes(content)
    with pytest.raises(StorageError) as caught:
        register(keys, new_key_pair(tmp_path / "new"))
    assert caught.value.code == "run-corrupt"


def test_a_node_that_cannot_be_remembered_stays_registered(tmp_path, public):
    """Catches: a key that is shut out for now, and accepted again because nobody remembers it."""
    keys = tmp_path / "keys"
    register(keys, public)
    (keys / ".revoked.tmp").mkdir()
    with pytest.raises(StorageError) as caught:
        revoke(keys, "acme")
    assert caught.value.code == "not-writable"
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
