"""A Fleet API in this process, over real gRPC on loopback, that does what a test tells it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from tsugiki.common.wire.flower import set_message_id
from tsugiki.server.deploy.certs import CertificateFiles


class Fleet(FleetServicer):  # type: ignore[misc]  # generated, without types
    """Registers everybody, hands out messages, takes replies."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.known: dict[bytes, int] = {}
        self.messages: list[Message] = []
        self.objects: dict[str, bytes | None] = {}
        self.replies: list[Any] = []
        self.uploaded: dict[str, bytes] = {}
        self.fail: dict[str, list[tuple[grpc.StatusCode, str]]] = {}
        self.keys_only = False

    def _called(self, name: str, context: grpc.ServicerContext) -> None:
        self.calls.append(name)
        if self.fail.get(name):
            context.abort(*self.fail[name].pop(0))

    def offer(self, message: Message, available: bool = True) -> dict[str, bytes]:
        """Put a message into the node's box; return its objects, there or still to come."""
        set_message_id(message, message.object_id)
        contents = {key: one.deflate() for key, one in get_all_nested_objects(message).items()}
        self.objects |= contents if available else dict.fromkeys(contents)
        self.messages.append(message)
        return contents

    def RegisterNode(self, request: Any, context: Any) -> Any:
        """Take a key, unless only registered ones are taken."""
        self._called("RegisterNode", context)
        if self.keys_only:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, json.dumps({"code": 2001, "public_message": "no"}))
        self.known[request.public_key] = 1000 + len(self.calls)
        return fleet_pb2.RegisterNodeFleetResponse(node_id=self.known[request.public_key])

    def ActivateNode(self, request: Any, context: Any) -> Any:
        """Let a known key in."""
        self._called("ActivateNode", context)
        if request.public_key not in self.known:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, json.dumps({"code": 2004, "public_message": "no"}))
        return fleet_pb2.ActivateNodeResponse(node_id=self.known[request.public_key])

    def DeactivateNode(self, request: Any, context: Any) -> Any:
        """Note it."""
        self._called("DeactivateNode", context)
        return fleet_pb2.DeactivateNodeResponse()

    def UnregisterNode(self, request: Any, context: Any) -> Any:
        """Note it."""
        self._called("UnregisterNode", context)
        return fleet_pb2.UnregisterNodeFleetResponse()

    def SendNodeHeartbeat(self, request: Any, context: Any) -> Any:
        """Note it."""
        self._called("SendNodeHeartbeat", context)
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=True)

    def PullMessages(self, request: Any, context: Any) -> Any:
        """Hand out the next envelope."""
        self._called("PullMessages", context)
        if request.node.node_id not in self.known.values():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")
        if not self.messages:
            return fleet_pb2.PullMessagesResponse()
        message = self.messages.pop(0)
        envelope = message_to_proto(remove_content_from_message(message))
        return fleet_pb2.PullMessagesResponse(messages_list=[envelope], message_object_trees=[get_object_tree(message)])

    def PullObject(self, request: Any, context: Any) -> Any:
        """Hand out an object."""
        self._called("PullObject", context)
        content = self.objects.get(request.object_id)
        return message_pb2.PullObjectResponse(
            object_found=request.object_id in self.objects,
            object_available=content is not None,
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request: Any, context: Any) -> Any:
        """Note it."""
        self._called("ConfirmMessageReceived", context)
        return message_pb2.ConfirmMessageReceivedResponse()

    def PushMessages(self, request: Any, context: Any) -> Any:
        """Take a reply's envelope; want all its objects."""
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        self._called("PushMessages", context)
        self.replies += list(request.messages_list)
        wanted = {one.object_id for tree in request.message_object_trees for one in iterate_object_tree(tree)}
        return fleet_pb2.PushMessagesResponse(objects_to_push=sorted(wanted), session_id="session")

    def PushObject(self, request: Any, context: Any) -> Any:
        """Take an object."""
        self._called("PushObject", context)
        self.uploaded[request.object_id] = request.object_content
        return message_pb2.PushObjectResponse(stored=True)


@contextmanager
def listening(fleet: Fleet, files: CertificateFiles | None = None, port: int = 0) -> Iterator[int]:
    """Serve it inside a `with` block; gives the port."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_FleetServicer_to_server(fleet, server)
    if files is None:
        port = server.add_insecure_port(f"127.0.0.1:{port}")
    else:
        pair = (files.server_key.read_bytes(), files.server.read_bytes())
        port = server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()
