"""Fault 21: who is not who they say, at a real SuperLink with node keys; the registered node is unaffected."""

import datetime

import pytest
from flwr.client.grpc_rere_client import node_auth_client_interceptor as signing
from flwr.proto.node_pb2 import Node

from tsugiki.client.node.channel import Stopping
from tsugiki.client.node.connection import Connection
from tsugiki.client.node.link import Link
from tsugiki.common.errors import LinkError
from tsugiki.common.keys import new_key_pair, read_private_key
from tsugiki.server.deploy.certs import make_certificates
from tsugiki.server.deploy.control import Control
from tsugiki.server.deploy.keyring import register, revoke
from tsugiki.server.deploy.superlink_process import free_port, superlink

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A SuperLink that knows acme and bolt; gives (address, CA, folder of keys, control)."""
    folder = tmp_path_factory.mktemp("identity")
    files = make_certificates(folder / "tls", [])
    for name in ("acme", "bolt", "gone"):
        register(folder / "keys", new_key_pair(folder / name))
    new_key_pair(folder / "stranger")
    with superlink(f"127.0.0.1:{free_port()}", files, folder / "state") as child:
        control = Control(child.endpoint)
        control.synchronise(folder / "keys")
        yield child.listen, files.ca.read_bytes(), folder, control
        control.close()


@pytest.fixture
def connect(server):
    """Makes connections with a key, and closes them."""
    address, authority, folder, _ = server
    made = []

    def make(name, stopped=lambda: False, note=lambda text: None):
        key = read_private_key(folder / name)
        made.append(Connection(Link(address, authority, key, 2.0), stopped, note))
        made[-1].connect()
        return made[-1]

    yield make
    for one in made:
        one.close()


def refused(connect, name):
    """Return the code with which a connection is refused."""
    with pytest.raises(LinkError) as caught:
        connect(name)
    return caught.value.code


def test_an_unregistered_key_is_refused(connect):
    """Catches: a server that registers whoever comes."""
    registered = connect("acme")
    assert refused(connect, "stranger") == "key-refused"
    assert registered.receive() is None


def test_the_same_key_twice_is_refused(connect):
    """Catches: two processes that answer for one site, and messages that reach either."""
    first = connect("acme")
    assert refused(connect, "acme") == "key-refused"
    assert first.receive() is None


def test_a_node_cannot_speak_for_another(connect):
    """Catches: messages handed out by the id that a client sends in place of the key that it signs with."""
    acme, bolt = connect("acme"), connect("bolt")
    theirs = acme.node_id
    own = bolt.node_id
    bolt._node = Node(node_id=theirs)
    assert bolt.receive() is None  # refused under this id, it becomes itself again
    assert bolt.node_id == own
    assert acme.receive() is None


def test_a_clock_that_is_off_is_told(connect, monkeypatch):
    """Catches: signatures that never go stale; a wrong clock that looks like a wrong key."""
    real = signing.now
    for seconds in (-600, 10):
        monkeypatch.setattr(signing, "now", lambda off=seconds: real() + datetime.timedelta(seconds=off))
        assert refused(connect, "acme") == "clock-skew"
    monkeypatch.undo()
    assert connect("acme").receive() is None


def test_a_clock_that_is_set_does_not_end_an_accepted_node(connect, monkeypatch):
    """Catches: every site of a run that leaves for good, because a clock stepped by 30 s for a moment."""
    acme = connect("acme")
    real = signing.now
    steps = [30, 30]
    signed = []

    def now():
        signed.append(steps.pop(0) if steps else 0)
        return real() + datetime.timedelta(seconds=signed[-1])

    monkeypatch.setattr(signing, "now", now)
    assert acme.receive() is None
    assert signed.count(30) == 2


def test_a_revoked_key_is_shut_out_at_once(server, connect):
    """Catches: a revoked node that stays until it reconnects."""
    _, _, folder, control = server
    notes = []
    # an accepted node asks again until it is stopped: its key may come back
    gone = connect("gone", lambda: any("key-refused" in note for note in notes), notes.append)
    acme = connect("acme")
    assert gone.receive() is None
    revoke(folder / "keys", "gone")
    assert control.synchronise(folder / "keys") == ["gone revoked"]
    with pytest.raises(Stopping):
        gone.receive()
    assert acme.receive() is None
