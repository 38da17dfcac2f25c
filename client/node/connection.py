"""A node's link to the SuperLink: Flower's own gRPC Fleet API, with bounds on every wait.

It speaks the protocol of Flower's `grpc_request_response`, through the same stubs and interceptors: become a node, look
for messages, pull their objects, push replies, send a heartbeat every few seconds. The calls are in
`client/node/channel.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

import grpc
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
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
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from tsugiki.client.node.channel import (
    CALL_TIMEOUT_S,
    TEMPORARY,
    Channel,
    Forgotten,
    MessageGone,
    RunOver,
    Stopping,
)
from tsugiki.client.node.link import Link
from tsugiki.common.errors import LinkError, WireError
from tsugiki.common.wire.flower import set_message_id
from tsugiki.common.wire.inflate import inflate

if TYPE_CHECKING:
    from flwr.app import Message

log = logging.getLogger("tsugiki.client")

SLOWEST_BYTES_PER_S = 8_000.0
"""A transfer that is slower than this has stopped."""
UNKNOWN_BYTES = 256 * 2**20
"""Most bytes of a message before a run was opened here. A run begins with a hello, which is small; only a client that
was started anew in mid-round receives an adapter first."""
SPARE_BYTES = 16 * 2**20
"""Allowance for everything in a message but its adapter: settings, and what thousands of sites seal for this one."""
CHUNK_BYTES = 5 * 2**20
"""Flower cuts arrays into objects of this size."""
SPARE_OBJECTS = 16
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
"""Pauses between polls for an object that the server is still uploading."""
HEARTBEAT_TIMEOUT_S = 5.0
HEARTBEAT_S = 5.0
HEARTBEAT_INTERVAL_S = 10.0
"""The interval that the server expects, Flower's shortest. After twice as long, 20 s, it takes a node for gone."""

AWAY_S = 2.0
"""Long enough for the server to see that a node is away: it looks every 0.5 s."""

EARLY_S = 2.5 * HEARTBEAT_INTERVAL_S
"""How long a key may be refused at first. A server that has just started may not have registered its keys yet, and the
process before this one, if it was killed, counts as online for two intervals, in which its key is in use."""


class Connection:
    """An active node of a SuperLink, between `connect` and `close`.

    Args:
        link: the SuperLink.
        stopped: asked between retries; True ends them.
        note: called with each message for the site's operator.
        adapter_bytes: returns the bytes of the largest adapter that a message may hold; 0: it is not known yet.
    """

    def __init__(
        self,
        link: Link,
        stopped: Callable[[], bool],
        note: Callable[[str], None],
        adapter_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.link = link
        self._stopped = stopped
        self._note = note
        self._adapter_bytes = adapter_bytes
        self.bytes_down = self.bytes_up = 0
        key = link.private_key
        private, public = (key, key.public_key()) if key is not None else generate_key_pairs()
        self._public_key = public_key_to_bytes(public)
        self._channel = Channel(link, (private, public), stopped, note)
        self._node: Node | None = None
        self._over = threading.Event()
        self._beating = threading.Lock()
        self._lost = False  # whether a message may have been lost

    @property
    def node_id(self) -> int:
        """The id from the SuperLink; 0 without one. It changes when the SuperLink has forgotten this node."""
        return self._node.node_id if self._node is not None else 0

    def connect(self) -> None:
        """Activate this node, and send its heartbeats in the background.

        Raises:
            LinkError: the server has never accepted this node, and refuses it, or cannot be reached for `retry_s`.
            Stopping: the node was asked to stop before.
        """
        self._activate()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _activate(self) -> None:
        if self.link.private_key is None:
            self._channel.call("RegisterNode", RegisterNodeFleetRequest(public_key=self._public_key))
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_INTERVAL_S)
        ends = time.monotonic() + EARLY_S
        noted = False
        while True:
            try:
                self._node = Node(node_id=self._channel.call("ActivateNode", request).node_id)
                self._channel.accepted = True
                # the process before this one may have been asked for something: it was connected until a moment ago
                self._lost = self._lost or noted
                return
            except LinkError as error:  # only before the server has accepted this node
                if error.code != "key-refused" or time.monotonic() > ends:
                    raise
                if self._stopped():
                    raise Stopping from error
                if not noted:
                    self._note(f"{error.problem}: trying again for {EARLY_S:g} s")
                    noted = True
                time.sleep(0.5)

    def receive(self) -> tuple[Message, ObjectTree] | None:
        """Return the envelope of the oldest message for this node, and the tree of its objects; None without a message.

        The server delivers each message once. If an answer of the server was lost, and a message perhaps with it, the
        node leaves and comes back, so that the server asks it again.
        """
        try:
            answer = self._channel.call("PullMessages", PullMessagesRequest(node=self._node))
            self._lost |= self._channel.repeated
            if answer.messages_list:
                self._lost = False
                return message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
            if self._lost:
                self._leave_and_come_back()
        except Forgotten:
            self._activate_anew()
        return None

    def come_back(self) -> None:
        """Leave at the next look without a message, and come back, so that the server says hello anew."""
        self._lost = True

    def pull(self, envelope: Message, tree: ObjectTree, timeout_s: float) -> Message:
        """Return the whole message.

        Raises:
            MessageGone: the server has deleted it.
            RunOver: its run has ended, it was not uploaded in time, or it is larger than any message of its run.
        """
        run_id = envelope.metadata.run_id
        most_bytes = self._most_bytes()
        ends = time.monotonic() + timeout_s
        pause_s = FIRST_PAUSE_S
        # Objects become available one by one, while the server is still uploading.
        missing = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
        if len(missing) > ceil(most_bytes / CHUNK_BYTES) + SPARE_OBJECTS:
            raise RunOver("the server's message is not acceptable: size")
        contents: dict[str, bytes] = {}
        left = most_bytes
        while missing:
            for object_id in list(missing):
                request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
                answer = self._call_of_run("PullObject", request)
                if not answer.object_found:
                    raise MessageGone("an object is gone")
                if answer.object_available:
                    contents[object_id] = answer.object_content
                    missing.remove(object_id)
                    self.bytes_down += len(answer.object_content)
                    left -= len(answer.object_content)
                    # counted while it comes: a server could send without end
                    if left < 0:
                        raise RunOver("the server's message is not acceptable: size")
            if missing:
                if time.monotonic() > ends or self._stopped():
                    raise RunOver("the server did not finish its upload")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        object_id = envelope.metadata.message_id
        done = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=object_id)
        self._call_of_run("ConfirmMessageReceived", done)
        try:
            message = inflate(object_id, contents, most_bytes)
        except WireError as error:
            raise RunOver(f"the server's message is not acceptable: {error.code}") from error
        set_message_id(message, object_id)
        return message

    def _most_bytes(self) -> int:
        """Return the most bytes that a message may have."""
        adapter = self._adapter_bytes()
        if not adapter:
            return UNKNOWN_BYTES
        return ceil(1.05 * adapter) + SPARE_BYTES

    def send(self, reply: Message) -> None:
        """Upload a reply, without the time that the handler took: it would reveal something about the rows.

        Args:
            reply: the whole message.

        Raises:
            MessageGone: the server does not wait for this reply any more.
            RunOver: its run has ended.
        """
        from flwr.app.message import remove_content_from_message

        set_message_id(reply, reply.object_id)
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply)
            tree = get_object_tree(reply)
            envelope = message_to_proto(remove_content_from_message(reply) if reply.has_content() else reply)
            # First what the reply consists of; the server answers which objects it lacks.
            announced = PushMessagesRequest(
                node=self._node,
                messages_list=[envelope],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            answer = self._call_of_run("PushMessages", announced)
            if not answer.objects_to_push:  # a new reply always lacks its own object at least
                raise MessageGone("the server does not take this reply any more")
            for object_id in answer.objects_to_push:
                content = objects[object_id].deflate()
                request = PushObjectRequest(
                    node=self._node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=answer.session_id,
                )
                timeout_s = CALL_TIMEOUT_S + len(content) / SLOWEST_BYTES_PER_S
                stored = self._call_of_run("PushObject", request, timeout_s).stored
                if not stored and not self._channel.repeated:  # repeated: the first try stored it, unheard
                    raise MessageGone("the server does not take the upload any more")
                self.bytes_up += len(content)

    def close(self) -> None:
        """Deactivate this node at the SuperLink, if it can be reached, and close the channel."""
        self._over.set()
        if self._node is not None:
            try:
                self._channel.once("DeactivateNode", DeactivateNodeRequest(node_id=self.node_id), 2.0)
                if self.link.private_key is None:
                    self._channel.once("UnregisterNode", UnregisterNodeFleetRequest(node_id=self.node_id), 2.0)
            except grpc.RpcError as error:
                log.info("could not say goodbye: %s", error.code())
            self._node = None
        self._channel.close()

    def _call_of_run(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call the server about a message of a run.

        Raises:
            RunOver: the run has ended, or the server forgot this node, and the run with it.
        """
        try:
            return self._channel.call(method, request, timeout_s)
        except Forgotten as error:
            self._activate_anew()
            raise RunOver("the server was restarted") from error

    def _leave_and_come_back(self) -> None:
        # Without heartbeats in between: one would bring the node back before the server has seen it leave.
        with self._beating:
            try:
                self._channel.once("DeactivateNode", DeactivateNodeRequest(node_id=self.node_id), CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                if error.code() in TEMPORARY:
                    return  # the next look tries again
                log.info("could not leave: %s", error.code())  # it was taken for gone already, which does as well
            self._lost = False
            ends = time.monotonic() + AWAY_S
            while time.monotonic() < ends and not self._stopped():
                time.sleep(0.1)
            self._channel.call("SendNodeHeartbeat", self._heartbeat())

    def _activate_anew(self) -> None:
        self._note("the server does not know this node any more: connecting anew")
        self._lost = False
        # Without heartbeats in between: a node whose key comes back has its old id. One heartbeat would bring it
        # online, and a node that is online cannot be activated.
        with self._beating:
            self._activate()

    def _heartbeat(self) -> SendNodeHeartbeatRequest:
        return SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL_S)

    def _beat(self) -> None:
        """Send heartbeats. A failure is left to the calls of the main thread, which retry and report."""
        while not self._over.wait(HEARTBEAT_S):
            try:
                with self._beating:
                    self._channel.once("SendNodeHeartbeat", self._heartbeat(), HEARTBEAT_TIMEOUT_S)
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was replaced meanwhile
                log.info("heartbeat failed: %s", error)
