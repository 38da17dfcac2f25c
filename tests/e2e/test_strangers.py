"""A whole deployment, attacked while it runs: by a stranger without a key, by a registered site, by another user."""

import re
from pathlib import Path

import grpc
import pytest
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, UnregisterNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest

from tests.support.serving import make_identity, serve_and_join, started, summary, superlinks, tiny_run
from tsugiki.client.site.split import split
from tsugiki.common.keys import read_private_key
from tsugiki.server.deploy.control import Control
from tsugiki.server.deploy.superlink_process import Endpoint

pytestmark = pytest.mark.e2e

MIB = 2**20


def test_a_run_under_attack_ends_as_if_nothing_had_happened(tmp_path, model):
    """Catches: a run that a stranger's call, or an unregistered site, ends; the operator's paths shown to a site."""
    names = ["site-0", "site-1", "site-2"]
    config = tiny_run(tmp_path, model, "attacked", 3, run={"rounds": 12}, strategy={"connect_timeout_s": 300.0})
    sites = split(config, tmp_path / "sites")
    with started() as start:
        tls, keys = make_identity(start, tmp_path, names)
        identity = tmp_path / "identity"
        client_extra = ["--ca", str(tls / "ca.crt"), "--key", str(identity / "{name}.key"), "--retry", "60"]
        # the run waits for its third site until the stranger has called
        server, clients = serve_and_join(
            start, tmp_path, config, ["--tls", tls, "--keys", keys], client_extra, sites[:2]
        )
        server.wait_for("2 of 3 nodes connected", 120)
        (child,) = superlinks([server.process.pid])
        arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        address = arguments[arguments.index("--fleet-api-address") + 1]

        # a stranger: 0.3 MB that stand for 300 MiB
        credentials = grpc.ssl_channel_credentials((tls / "ca.crt").read_bytes())
        sizes = [("grpc.max_send_message_length", -1)]
        with (
            grpc.secure_channel(address, credentials, sizes, grpc.Compression.Gzip) as channel,
            pytest.raises(grpc.RpcError),
        ):
            FleetStub(channel).PushObject(PushObjectRequest(object_content=bytes(300 * MIB)), timeout=60)
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child}/status").read_text())[1]) / 1024
        assert peak < 400

        # a registered site asks what the SuperLink knows of the run
        control = Control(Endpoint("superlink", None, socket=next(Path(one) for one in arguments if "/api" in one)))
        known = {one.name: one.node_id for one in control._client.ListNodes(ListNodesRequest()).nodes_info}
        (run_id,) = control._client.ListRuns(ListRunsRequest()).run_dict
        assert sorted(known) == names
        key = read_private_key(identity / "site-0.key")
        with grpc.secure_channel(address, credentials) as channel:
            stub = FleetStub(grpc.intercept_channel(channel, NodeAuthClientInterceptor(key, key.public_key())))
            shown = str(stub.GetRun(GetRunRequest(run_id=run_id, node=Node(node_id=known["site-0"])), timeout=20))
        assert "attacked" in shown
        assert str(tmp_path) not in shown

        # in mid-run, somebody who can reach the socket unregisters a site
        options = [part.format(name="site-2") for part in client_extra]
        clients.append(
            start(tmp_path / "clients", "site-2", "client", "--server", address, "--site", sites[2], *options)
        )
        server.wait_for("round 1", 200)
        control._client.UnregisterNode(UnregisterNodeRequest(node_id=known["site-0"]))
        control.close()
        server.wait_for("site-0 was unregistered by somebody else", 20)
        assert server.wait(150) == 0, server.text()[-3000:]
        assert [client.process.poll() for client in clients] == [None] * 3, clients[0].text()[-2000:]
    assert summary(config)["rounds"] == 12
