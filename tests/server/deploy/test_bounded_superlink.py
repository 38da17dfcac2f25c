"""What a stranger can take from a real SuperLink of ours, while a registered node goes on."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from tsugiki.client.node.connection import Connection
from tsugiki.client.node.link import Link
from tsugiki.common.keys import new_key_pair, read_private_key
from tsugiki.common.wire.flower import MOST_CALL_BYTES
from tsugiki.server.deploy.certs import make_certificates
from tsugiki.server.deploy.control import Control
from tsugiki.server.deploy.keyring import register
from tsugiki.server.deploy.superlink_process import free_port, superlink

pytestmark = pytest.mark.e2e

MIB = 2**20
MOST_MIB = 400
"""The most memory of a SuperLink under attack."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A SuperLink with TLS that knows acme; gives (child, certificates, folder of keys, control)."""
    folder = tmp_path_factory.mktemp("strangers")
    files = make_certificates(folder / "tls", [])
    register(folder / "keys", new_key_pair(folder / "acme"))
    with superlink(f"127.0.0.1:{free_port()}", files, folder / "state") as child:
        control = Control(child.endpoint)
        control.synchronise(folder / "keys")
        yield child, files, folder, control
        control.close()


@pytest.fixture
def acme(server):
    """The registered node, connected; its notes are in `notes`."""
    child, files, folder, _ = server
    notes = []
    link = Link(child.listen, files.ca.read_bytes(), read_private_key(folder / "acme"), 20.0)
    one = Connection(link, lambda: False, notes.append)
    one.notes = notes
    one.connect()
    yield one
    one.close()


@pytest.fixture
def stranger(server):
    """Makes stubs of the Fleet API, without a limit on what is sent: with a key that nobody knows, or none."""
    child, files, _, _ = server
    credentials = grpc.ssl_channel_credentials(files.ca.read_bytes())
    channels = []

    def make(key=None, **options):
        sizes = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        channels.append(grpc.secure_channel(child.listen, credentials, sizes, **options))
        if key is None:
            return FleetStub(channels[-1])
        return FleetStub(grpc.intercept_channel(channels[-1], NodeAuthClientInterceptor(key, key.public_key())))

    yield make
    for one in channels:
        one.close()


def status_of(call):
    """Return the status and the details with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def peak_mib(process):
    """Return the most memory that a process has had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.parametrize("with_key", [False, True])
def test_a_compressed_call_of_a_stranger_is_not_unpacked(server, acme, stranger, with_key):
    """Catches: 0.3 MB from anybody that become gigabytes in the server before it looks at the key."""
    key = ec.generate_private_key(ec.SECP384R1()) if with_key else None
    stub = stranger(key, compression=grpc.Compression.Gzip)
    request = PushObjectRequest(object_content=bytes(300 * MIB))
    status, _ = status_of(lambda: stub.PushObject(request, timeout=60))
    assert status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
    assert peak_mib(server[0].process) < MOST_MIB
    assert acme.receive() is None


def test_a_call_of_a_stranger_is_refused_before_it_is_read(server, acme, stranger):
    """Catches: many calls at once, each within the limit, that together fill the server's memory."""
    stub = stranger(ec.generate_private_key(ec.SECP384R1()))
    request = PushObjectRequest(object_content=bytes(MOST_CALL_BYTES - MIB))
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(status_of, lambda: stub.PushObject(request, timeout=60)) for _ in range(8)]
    assert {call.result() for call in calls} == {(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")}
    assert peak_mib(server[0].process) < MOST_MIB
    assert acme.receive() is None


def test_a_registered_node_sends_no_larger_call_than_the_limit(server, acme, stranger):
    """Catches: a limit for strangers only, where one site can end the run of all."""
    key = read_private_key(server[2] / "acme")
    request = PushObjectRequest(node=acme._node, object_content=bytes(MOST_CALL_BYTES + MIB))
    status, _ = status_of(lambda: stranger(key).PushObject(request, timeout=60))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert acme.receive() is None


def test_a_stranger_gets_the_codes_of_flower(stranger):
    """Catches: a client without a registered key that cannot say what is wrong."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(key.public_key())
    stub = stranger(key)
    answers = [
        status_of(lambda: stub.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30), timeout=20)),
        status_of(lambda: stub.RegisterNode(RegisterNodeFleetRequest(public_key=public), timeout=20)),
    ]
    codes = [FlowerError.from_json(details).code for _, details in answers]
    assert codes == [
        ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
        ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED,
    ]


def test_a_connection_that_says_nothing_is_closed(server):
    """Catches: connections without a handshake that a stranger keeps open until no more fit."""
    host, _, port = server[0].listen.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as silent:
        silent.settimeout(30)
        assert silent.recv(1) == b""


def test_the_api_for_runs_and_keys_is_for_this_user_only(server):
    """Catches: a port on loopback, through which every user of the machine reads settings and unregisters sites."""
    child = server[0]
    assert child.endpoint.socket.parent.stat().st_mode & 0o777 == 0o700
    inodes = {
        Path(link).readlink().name for link in Path(f"/proc/{child.process.pid}/fd").iterdir() if link.is_symlink()
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(int(fields[1].rpartition(":")[2], 16))
    assert set(listening) == {int(child.listen.rpartition(":")[2])}


def test_what_somebody_else_did_to_the_nodes_is_undone(server, acme):
    """Catches: a node that was unregistered behind the server's back and never comes back; one that was added so."""
    _, _, folder, control = server
    before = control.node_names()
    (node_id,) = before
    control._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
    foreign = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    added = control._client.RegisterNode(RegisterNodeRequest(public_key=foreign, name="mallory")).node_id
    with ThreadPoolExecutor(1) as pool:
        # the node asks while its key is refused, for longer than a new node would
        asking = pool.submit(acme.receive)
        time.sleep(7)
        done = control.synchronise(folder / "keys")
        asking.result(20)
    assert done == [
        f"node {added} was registered by somebody else, and is removed",
        "acme was unregistered by somebody else",
        "acme registered",
    ]
    assert control.node_names() == before
    assert control.synchronise(folder / "keys") == []
    assert acme.receive() is None
    assert acme.node_id == node_id
    assert sum("trying again" in note for note in acme.notes) == 1
