"""A node's link to the SuperLink: Flower's own gRPC Fleet API, with bounds on every wait.

Flower's `grpc_request_response` leaves calls without deadlines and ends the process when something is wrong. This link
speaks the same protocol through the same stubs and interceptors; it retries what a network may cause, for as long as it
was told to, and everything else becomes one error that names the cause (`client.diagnosis`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from common.errors import LinkError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.app import Message

log = logging.getLogger("tsugiki.client")

CALL_TIMEOUT_S = 20.0
SLOWEST_BYTES_PER_S = 8_000.0
"""A transfer that is slower than this has stopped."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5
"""Between looks at an object that the server is still uploading."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 10.0
HEARTBEAT_S = 0.7 * HEARTBEAT_MIN_INTERVAL
"""A node that is silent for twice the interval, 20 s, is gone for the server."""

TEMPORARY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Stopping(Exception):
    """The node was asked to stop while the server could not be reached."""


class RunOver(Exception):
    """The run of a message has ended, or the message is gone: there is nobody to answer."""


@dataclass(frozen=True)
class Link:
    """Where the SuperLink is, and how to talk to it.

    Args:
        address: HOST:PORT of the Fleet API.
        root_certificates: PEM of the CA that signed the server's certificate; None: no TLS.
        private_key: the node's; None: a new one for each connection, for servers that take unknown nodes.
        retry_s: how long to try again after the connection was lost.
    """

    address: str
    root_certificates: bytes | None
    private_key: EllipticCurvePrivateKey | None
    retry_s: float


class Connection:
    """An active node of a SuperLink, between `connect` and `close`.

    Args:
        link: the SuperLink.
        stopped: asked between retries; True ends them.
        note: told what an operator of the site would want to see.
    """

    def __init__(self, link: Link, stopped: Callable[[], bool], note: Callable[[str], None]) -> None:
        self.link, self._stopped, self._note = link, stopped, note
        self.bytes_down = self.bytes_up = 0
        key = link.private_key
        private, public = (key, key.public_key()) if key is not None else generate_key_pairs()
        self._public_key = public_key_to_bytes(public)
        self._channel = _open_channel(link, private, public)
        self._stub = FleetStub(self._channel)
        self._node: Node | None = None
        self._over = threading.Event()

    @property
    def node_id(self) -> int:
        """The id that the SuperLink gave; changes when the SuperLink forgot this node."""
        return self._node.node_id if self._node is not None else 0

    def connect(self) -> None:
        """Become an active node, and keep saying so in the background.

        Raises:
            LinkError: the server refuses this node, or cannot be reached for `retry_s`.
        """
        self._activate()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _activate(self) -> None:
        if self.link.private_key is None:
            self._call(self._stub.RegisterNode, RegisterNodeFleetRequest(public_key=self._public_key), known=False)
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        self._node = Node(node_id=self._call(self._stub.ActivateNode, request, known=False).node_id)

    def receive(self) -> tuple[Message, ObjectTree] | None:
        """Return the envelope of the oldest message for this node and what it holds, if there is one."""
        answer = self._call(self._stub.PullMessages, lambda: PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        return message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]

    def pull(self, envelope: Message, tree: ObjectTree, timeout_s: float) -> Message:
        """Return the whole message.

        Raises:
            RunOver: its run has ended, or it was not uploaded in time.
        """
        run_id, ends, pause_s = envelope.metadata.run_id, time.monotonic() + timeout_s, FIRST_PAUSE_S
        missing = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
        contents: dict[str, bytes] = {}
        while missing:
            for object_id in list(missing):
                answer = self._call(self._stub.PullObject, self._object_request(PullObjectRequest, run_id, object_id))
                if not answer.object_found:
                    raise RunOver("an object is gone")
                if answer.object_available:
                    contents[object_id] = answer.object_content
                    missing.remove(object_id)
                    self.bytes_down += len(answer.object_content)
            if missing:
                if time.monotonic() > ends or self._stopped():
                    raise RunOver("the server did not finish its upload")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        object_id = envelope.metadata.message_id
        done = lambda: ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=object_id)  # noqa: E731
        self._call(self._stub.ConfirmMessageReceived, done)
        message: Message = inflate_object_from_contents(object_id, contents)  # type: ignore[assignment]  # the root is one
        message.metadata.__dict__["_message_id"] = object_id
        return message

    def _object_request(self, kind: Any, run_id: int, object_id: str, **more: Any) -> Callable[[], Any]:
        return lambda: kind(node=self._node, run_id=run_id, object_id=object_id, **more)

    def send(self, reply: Message, seconds: float) -> None:
        """Upload a reply.

        Args:
            reply: the whole message.
            seconds: what the handler took.

        Raises:
            RunOver: its run has ended.
        """
        from flwr.app.message import remove_content_from_message

        reply.metadata.__dict__["_message_id"] = reply.object_id
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            envelope = message_to_proto(remove_content_from_message(reply) if reply.has_content() else reply)
            answer = self._call(
                self._stub.PushMessages,
                lambda: PushMessagesRequest(
                    node=self._node,
                    messages_list=[envelope],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[seconds],
                ),
            )
            for object_id in answer.objects_to_push:
                content = objects[object_id].deflate()
                more = {"object_content": content, "session_id": answer.session_id}
                request = self._object_request(PushObjectRequest, run_id, object_id, **more)
                timeout_s = CALL_TIMEOUT_S + len(content) / SLOWEST_BYTES_PER_S
                if not self._call(self._stub.PushObject, request, timeout_s=timeout_s).stored:
                    raise RunOver("the server does not take the upload any more")
                self.bytes_up += len(content)

    def close(self) -> None:
        """Tell the SuperLink that this node leaves, if it can be told, and hang up."""
        self._over.set()
        if self._node is not None:
            try:
                self._stub.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id), timeout=2.0)
                if self.link.private_key is None:
                    self._stub.UnregisterNode(UnregisterNodeFleetRequest(node_id=self.node_id), timeout=2.0)
            except grpc.RpcError as error:
                log.info("could not say goodbye: %s", error.code())
            self._node = None
        self._channel.close()

    def _call(self, method: Any, request: Any, *, known: bool = True, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call the server, again and again while the network fails, and once more if it forgot this node.

        Args:
            method: of the stub.
            request: what to send, or makes it: the node's id may have changed in between.
            known: whether the node has been activated, so that not being known means having been forgotten.
            timeout_s: of one try.

        Raises:
            LinkError: it refuses, or cannot be reached for `retry_s`.
            RunOver: it says that the run has ended.
            Stopping: there is no answer, and no time to wait for one.
        """
        started, pause_s, reported = time.monotonic(), FIRST_RETRY_S, False
        while True:
            try:
                answer = method(request() if callable(request) else request, timeout=timeout_s)
            except grpc.RpcError as error:
                status = error.code()
                if status == grpc.StatusCode.PERMISSION_DENIED:
                    raise RunOver("the run has ended") from error
                if known and status == grpc.StatusCode.UNAUTHENTICATED and "node ID" in str(error.details()):
                    self._note("the server does not know this node any more: connecting anew")
                    self._activate()
                    known = False
                    continue
                if status not in TEMPORARY:
                    raise _refusal(self.link, error) from error
                self._give_up_or_wait(error, started, pause_s, reported)
                pause_s, reported = min(2 * pause_s, LONGEST_RETRY_S), True
            else:
                if reported:
                    self._note(f"connected again after {time.monotonic() - started:.0f} s")
                return answer

    def _give_up_or_wait(self, error: grpc.RpcError, started: float, pause_s: float, reported: bool) -> None:
        """Sleep before another try.

        Raises:
            LinkError: it is no use.
            Stopping: it is not wanted any more.
        """
        from client.diagnosis import why_not

        if not reported:
            problem = why_not(self.link)
            if problem.code != "server-unreachable":
                raise problem from error
            self._note(f"{problem.what}: trying again for {self.link.retry_s:g} s")
        if time.monotonic() - started + pause_s > self.link.retry_s:
            raise why_not(self.link) from error
        ends = time.monotonic() + pause_s
        while time.monotonic() < ends:
            if self._stopped():
                raise Stopping
            time.sleep(0.1)

    def _beat(self) -> None:
        """Say that this node is alive; a failure is left to the calls of the main thread, which retry and report."""
        while not self._over.wait(HEARTBEAT_S):
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
            try:
                self._stub.SendNodeHeartbeat(request, timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                log.info("heartbeat failed: %s", error.code())


def _open_channel(link: Link, private: Any, public: Any) -> grpc.Channel:
    """Return a channel with Flower's interceptors; messages are at most one object, which Flower cuts at 5 MB."""
    options = [("grpc.max_send_message_length", 2**26), ("grpc.max_receive_message_length", 2**26)]
    if link.root_certificates is None:
        channel = grpc.insecure_channel(link.address, options)
    else:
        channel = grpc.secure_channel(link.address, grpc.ssl_channel_credentials(link.root_certificates), options)
    interceptors = [RuntimeVersionClientInterceptor("SuperNode"), NodeAuthClientInterceptor(private, public)]
    return grpc.intercept_channel(channel, *interceptors)


def _refusal(link: Link, error: grpc.RpcError) -> LinkError:
    """Return the error for a server that answers and says no."""
    from client.diagnosis import refused

    return refused(link, str(error.details()))
