"""Flower's SuperLink with bounds on what a stranger can take. `superlink_process.py` runs this module as a child.

Flower's own command takes calls of up to 2 GiB, unpacks compressed ones, and reads a call before it looks at its key.
It serves the API for runs and keys on a TCP port, which every user of the machine can reach. Here a call is refused by
its metadata, before its message is read; a call is small and never unpacked; and the API for runs and keys is on a Unix
socket, in a folder that only the operator's user can enter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import uvicorn
from flwr.common.constant import PUBLIC_KEY_HEADER
from flwr.proto.fleet_pb2_grpc import add_FleetServicer_to_server
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import NodeStatus
from flwr.supercore.error import ApiErrorCode, FlowerError, rpc_error_translator
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.interceptors import (
    RpcErrorTranslationServerInterceptor,
    create_fleet_runtime_version_server_interceptor,
)
from flwr.supercore.logger import FLOWER_LOGGER, console_handler
from flwr.supercore.utils import get_metadata_bytes
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from tsugiki.common.wire.flower import CALL_OPTIONS

CALLS = 1000
"""Most calls at a time, as in Flower. A further call is refused, and a client tries it again."""
CALLS_OF_A_CONNECTION = 32
"""A resident client has two calls at a time, a stock SuperNode a few."""
CONNECTIONS = 4096
HANDSHAKE_S = 10
IDLE_S = 120
"""A connection without calls is closed after this time. Nodes call every 30 s or more often."""
KEEPALIVE_S = 210
"""As in Flower: some networks forget a connection that is silent for 4 minutes."""

OPTIONS = (
    *CALL_OPTIONS,
    # a compressed call is refused, because a few bytes of it may stand for gigabytes
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_concurrent_streams", CALLS_OF_A_CONNECTION),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_S),
    ("grpc.max_connection_idle_ms", 1000 * IDLE_S),
    ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
    ("grpc.http2.max_pings_without_data", 0),
)

_REFUSALS = {
    "RegisterNode": ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED,
    "ActivateNode": ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
}


class Doorkeeper(grpc.ServerInterceptor):  # type: ignore[misc]  # gRPC has no types
    """Refuses a call before its message is read, if its signature is wrong or its key is not registered.

    Args:
        states: gives Flower's state, which knows the registered keys.
        keys_only: whether only registered keys may call. Else every key is let in.
    """

    def __init__(self, states: LinkStateFactory, keys_only: bool) -> None:
        self._states = states
        self._keys_only = keys_only

    def intercept_service(self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails) -> Any:
        """Return a handler that reads the message of a call only if the caller may send one."""
        handler = continuation(details)  # Flower looks at the signature here
        if handler is None:
            return None
        key = get_metadata_bytes(details.invocation_metadata, PUBLIC_KEY_HEADER)

        # declared as a stream of messages: gRPC reads the message of any other call before it asks the handler
        def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            # Flower's handler of a call with a bad signature refuses every message, so it needs none
            if handler.request_deserializer is None:
                return handler.unary_unary(None, context)
            if self._keys_only and not self._is_registered(key):
                _refuse(details.method, context)
            return handler.unary_unary(next(messages), context)

        return grpc.stream_unary_rpc_method_handler(
            answer,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _is_registered(self, key: bytes | None) -> bool:
        return key is not None and self._states.state().get_node_id_by_public_key(key) is not None


def _refuse(method: str, context: grpc.ServicerContext) -> None:
    """End the call of a key that is not registered, with the code that Flower's own handler gives."""
    call = method.rpartition("/")[2]
    if call not in _REFUSALS:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")
    with rpc_error_translator(context, method):
        raise FlowerError(_REFUSALS[call], "a key that is not registered")


class ReturningNodes(InMemoryLinkState):
    """Flower's state, in which a node that was unregistered can be registered again, under its name and with its id.

    Flower's own refuses the key of an unregistered node for ever.
    """

    def create_node(  # noqa: D102  # as in Flower
        self,
        owner_aid: str,
        owner_name: str,
        public_key: bytes,
        heartbeat_interval: float,
        *,
        location: str | None = None,
        name: str | None = None,
    ) -> int:
        with self.lock:
            node = self.nodes.get(self.node_public_key_to_node_id.get(public_key, 0))
            if node is not None and (node.status, node.name) == (NodeStatus.UNREGISTERED, name):
                node.status = NodeStatus.REGISTERED
                node.ClearField("unregistered_at")
                return int(node.node_id)
        return int(
            super().create_node(owner_aid, owner_name, public_key, heartbeat_interval, location=location, name=name)
        )


class BoundedLifespan(SuperLinkLifespan):
    """Flower's servers, with our Fleet API and our state."""

    def __init__(self, config: SuperLinkLifespanConfig, state_factory: LinkStateFactory) -> None:
        super().__init__(config, state_factory)
        store = state_factory.objectstore_factory.store()
        state_factory.state_instance = ReturningNodes(state_factory.federation_manager, store)

    def _start_legacy_fleet_grpc_rere(self, fleet_address: str) -> None:
        """Start the Fleet API."""
        self.grpc_servers.append(fleet_server(self.config, self.state_factory, fleet_address))


def fleet_server(config: SuperLinkLifespanConfig, states: LinkStateFactory, address: str) -> grpc.Server:
    """Return Flower's Fleet API as a running gRPC server with our bounds.

    Args:
        config: from the command line.
        states: gives the state of nodes and messages.
        address: HOST:PORT.
    """
    keys_only = config.enable_supernode_auth
    # the first one is asked first
    interceptors = [
        Doorkeeper(states, keys_only),
        RpcErrorTranslationServerInterceptor(),
        NodeAuthServerInterceptor(states),
        create_fleet_runtime_version_server_interceptor(),
    ]
    workers = ThreadPoolExecutor(CALLS, "fleet")
    server = grpc.server(workers, interceptors=interceptors, options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    add_FleetServicer_to_server(FleetServicer(states, states.objectstore_factory, keys_only), server)
    if config.certificates is None:
        server.add_insecure_port(address)
    else:
        _, certificate, key = config.certificates
        server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    return server


def main() -> None:
    """Run a SuperLink until it is stopped, or until the process that started it ends.

    The first two arguments are the id of that process and the path of the Unix socket; Flower's own follow. Standard
    input has the server's private key, if that in its file has a passphrase.
    """
    start_parent_process_monitor(int(sys.argv.pop(1)))
    socket = Path(sys.argv.pop(1))
    config = _parse_superlink_lifespan_config()
    key = sys.stdin.buffer.read()
    if key and config.certificates is not None:
        config.certificates = (*config.certificates[:2], key)
    log_config = get_uvicorn_log_config(console_handler.level)
    # the only caller of the socket is the parent, which looks at the nodes every second
    FLOWER_LOGGER.addFilter(lambda record: "ListNodes" not in record.getMessage())
    uvicorn.run(
        create_app(config, BoundedLifespan), uds=str(socket), workers=1, log_config=log_config, access_log=False
    )
    # the socket's folder is the parent's to remove, unless that was killed
    with suppress(OSError):
        socket.parent.rmdir()


if __name__ == "__main__":
    main()
