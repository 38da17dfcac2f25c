"""The deployed engine: Flower's grid over HTTP, with every reply pulled by itself and none pulled without bounds.

Flower's own `pull_messages` waits for one reply after the other, because a reply becomes visible before its objects
are uploaded: a site that stops in mid-upload holds up all others for minutes. Here each announced reply is a transfer,
which small steps move on, with pauses of 0.02 s growing to 0.5 s. Each poll returns the replies that are complete by
then. The objects of a reply are counted before any is pulled, and their bytes are counted while they come.

The sender of a reply, and the message that it answers, are taken from the SuperLink's envelope and from the request.
The copy of the metadata inside an upload is written by the site, which could name another site there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from typing import cast

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.grid import HttpGrid

from tsugiki.common.errors import WireError
from tsugiki.common.wire.inflate import inflate
from tsugiki.common.wire.messages import SITE_ERROR
from tsugiki.server.engines.grid import NODE_UNAVAILABLE, RETURN_S, RunGrid, StockGrid

log = logging.getLogger("tsugiki.server")

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
PATIENCE_S = 0.05
"""How long one poll waits for transfers that may complete at once."""
CHUNK_BYTES = 5 * 2**20
"""Flower cuts arrays into objects of this size."""
SUPERLINK_NODE = 1
"""Id of the node from which a SuperLink's own errors come; no site can have it."""
REPLY_UNAVAILABLE = 4
UNAVAILABLE = (3, REPLY_UNAVAILABLE, NODE_UNAVAILABLE)
"""Flower's error codes (`flwr.common.constant.ErrorCode`) for: message, reply or node unavailable."""
SPARE_BYTES = 256 * 2**10
SPARE_OBJECTS = 16
"""Allowance for everything in a reply but its array: envelope, records, metrics."""


@dataclass
class Transfer:
    """A reply on its way.

    Args:
        node_id: the node that was asked.
        reply_to: id of the message that it answers.
        object_id: of the reply.
        missing: ids of the objects that are not here yet.
        contents: the bytes of the others, by id.
        pause_s: to the next poll, when nothing has come.
        due: the time of the next poll, as `time.monotonic` has it.
        left: whether the node was seen to be away since the last object came.
        back_since: since when it is connected again; None: it is not, or was never away.
        from_superlink: whether the SuperLink itself answers.
        step: the poll that is under way.
    """

    node_id: int
    reply_to: str
    object_id: str
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    pause_s: float = FIRST_PAUSE_S
    due: float = 0.0
    left: bool = False
    back_since: float | None = None
    from_superlink: bool = False
    step: Future[Message | None] | None = None


class SuperlinkGrid(HttpGrid):
    """Flower's grid, made from the grid that a ServerApp receives. Sites' uploads cannot block or flood it."""

    @classmethod
    def adopt(cls, grid: HttpGrid) -> SuperlinkGrid:
        """Return a grid that uses the connection of another one. Flower still closes the connection."""
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(grid))
        adopted._asked = {}
        adopted._transfers = {}
        adopted._kept = set()
        adopted._workers = ThreadPoolExecutor(4, "tsugiki-pull")
        adopted.limit_replies(0)
        return adopted

    sequential = False
    simulated = False
    _asked: dict[str, int]
    _transfers: dict[str, Transfer]
    _kept: set[str]
    _workers: ThreadPoolExecutor
    _most_bytes: int
    _most_objects: int

    def close(self) -> None:
        """Release the workers. The connection stays open: its owner closes it."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def limit_replies(self, size_bytes: int) -> None:
        """Refuse replies that hold more than an adapter of this size and its envelope."""
        self._most_bytes = ceil(1.05 * size_bytes) + SPARE_BYTES
        self._most_objects = ceil(size_bytes / CHUNK_BYTES) + SPARE_OBJECTS

    def keep_replies(self, message_ids: set[str]) -> None:
        """Keep replies to these messages also while other exchanges look for other replies. The set may change."""
        self._kept = message_ids

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; return the ids of those that the SuperLink took."""
        messages = list(messages)
        nodes = [message.metadata.dst_node_id for message in messages]
        ids = cast("list[str | None]", list(super().push_messages(messages)))
        taken = {message_id: node for message_id, node in zip(ids, nodes, strict=True) if message_id}
        self._asked.update(taken)
        return list(taken)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are complete; never waits for an upload.

        Replies to messages that are neither in `message_ids` nor kept are dropped.
        """
        wanted = set(message_ids)
        alive = wanted | self._kept
        self._asked = {key: node for key, node in self._asked.items() if key in alive}
        self._transfers = {key: transfer for key, transfer in self._transfers.items() if key in alive}
        self._look_for_new(wanted - self._transfers.keys())
        return self._move_on(wanted)

    def _look_for_new(self, message_ids: set[str]) -> None:
        """Begin a transfer for each reply that the SuperLink announces: it announces each once."""
        if not message_ids:
            return
        answer = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=sorted(message_ids)))
        for envelope, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            reply_to = envelope.metadata.reply_to_message_id
            # one object more than allowed is enough to see that there are too many
            if reply_to in self._asked:
                objects = [one.object_id for one in islice(iterate_object_tree(tree), self._most_objects + 1)]
                message_id = envelope.metadata.message_id
                transfer = Transfer(self._asked[reply_to], reply_to, message_id, objects)
                transfer.from_superlink = envelope.metadata.src_node_id == SUPERLINK_NODE
                self._transfers[reply_to] = transfer

    def _move_on(self, wanted: set[str]) -> list[Message]:
        """Let every wanted transfer that is due take a step, and return the replies that are complete."""
        now = time.monotonic()
        transfers = {key: transfer for key, transfer in self._transfers.items() if key in wanted}
        for transfer in transfers.values():
            if transfer.step is None and transfer.due <= now:
                transfer.step = self._workers.submit(self._step, transfer)
        wait([transfer.step for transfer in transfers.values() if transfer.step], timeout=PATIENCE_S)
        complete = []
        for key, transfer in transfers.items():
            if transfer.step is not None and transfer.step.done():
                reply = transfer.step.result()
                transfer.step = None
                if reply is not None:
                    complete.append(reply)
                    del self._transfers[key]
        return complete

    def _step(self, transfer: Transfer) -> Message | None:
        """Pull the objects that are there. Return the reply, or an error in its place, once no more are to come."""
        try:
            if len(transfer.missing) > self._most_objects:
                raise WireError("a reply is too large", "no more than an adapter and its envelope", code="size")
            for object_id in list(transfer.missing):
                # the limit is for the whole reply, so each object may use what the others left
                left = self._most_bytes - sum(map(len, transfer.contents.values()))
                content = self._pull_object(object_id, left)
                if content is not None:
                    transfer.contents[object_id] = content
                    transfer.missing.remove(object_id)
                    transfer.left = False
                    transfer.back_since = None
            if transfer.missing:
                if self._was_abandoned(transfer):
                    return _readdressed(Error(NODE_UNAVAILABLE, "left"), transfer, self.run.run_id)
                transfer.due = time.monotonic() + transfer.pause_s
                transfer.pause_s = min(2 * transfer.pause_s, LONGEST_PAUSE_S)
                return None
            self._confirm(transfer)
            message = inflate(transfer.object_id, transfer.contents, self._most_bytes)
            return _readdressed(message, transfer, self.run.run_id)
        except WireError as error:
            log.warning("a reply is not acceptable: %s", error.code)
            with suppress(httpx.HTTPError):
                self._confirm(transfer)  # else the SuperLink keeps it until the run ends
            return _readdressed(Error(SITE_ERROR, error.code), transfer, self.run.run_id)
        except httpx.HTTPError as error:  # the SuperLink did not answer; the deadline bounds how often this is tried
            log.warning("the SuperLink did not answer: %s", type(error).__name__)
            transfer.due = time.monotonic() + LONGEST_PAUSE_S
            return None

    def _was_abandoned(self, transfer: Transfer) -> bool:
        """Return whether the node left in mid-upload, is back, and does not go on: its process was started anew.

        Such a node is asked again, and sends what it has kept. While it is away, its upload is waited for.
        """
        if transfer.pause_s < LONGEST_PAUSE_S:
            return False
        if transfer.node_id not in self.get_node_ids():
            transfer.left = True
            transfer.back_since = None
        elif transfer.left:
            transfer.back_since = transfer.back_since or time.monotonic()
        return transfer.back_since is not None and time.monotonic() - transfer.back_since >= RETURN_S

    def _pull_object(self, object_id: str, most_bytes: int) -> bytes | None:
        """Return an object, or None while it is being uploaded. Read little more than `most_bytes`.

        Raises:
            WireError: `size`; or `decode`, if the SuperLink does not have it any more.
        """
        client = self._runtime_client
        request = PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=object_id)
        http_request = client._client.build_request(
            "POST",
            f"{client._base_url}/v1/runtime/pull-object",
            content=request.SerializeToString(deterministic=True),
            headers={"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE, "accept-encoding": "identity"},
        )
        # as a stream: Flower's own call would read the whole answer into memory first
        call = ProtobufRequestContext("/flwr.proto.Runtime/PullObject", request, http_request)
        response = client._send(call, stream=True)
        body = bytearray()
        try:
            response.raise_for_status()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > most_bytes + 1024:  # what protobuf itself needs
                    raise WireError("a reply is too large", "no more than an adapter and its envelope", code="size")
        finally:
            response.close()
        answer = PullObjectResponse.FromString(bytes(body))
        if not answer.object_found:
            raise WireError("an object of a reply is gone", "all objects of a reply", code="decode")
        return answer.object_content if answer.object_available else None

    def _confirm(self, transfer: Transfer) -> None:
        """Allow the SuperLink to delete the reply's objects."""
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=transfer.object_id)
        )


def run_grid(grid: Grid) -> RunGrid:
    """Return the grid for a run, from the one that a ServerApp receives; replies from a SuperLink are bounded."""
    if isinstance(grid, HttpGrid):
        return SuperlinkGrid.adopt(grid)
    return StockGrid(grid)


def _readdressed(reply: Message | Error, transfer: Transfer, run_id: int) -> Message:
    """Return a reply whose metadata name the node that was asked, and the message with which it was asked."""
    metadata = Metadata(
        run_id=run_id,
        message_id=transfer.object_id,
        src_node_id=transfer.node_id,
        dst_node_id=1,
        message_type="query",  # nobody looks; Flower allows few
        group_id="",
        ttl=3600.0,
        reply_to_message_id=transfer.reply_to,
        created_at=time.time(),
    )
    if isinstance(reply, Error):
        return make_message(metadata, error=reply)
    if reply.has_error() and reply.error.code in UNAVAILABLE and not transfer.from_superlink:
        return make_message(metadata, error=Error(SITE_ERROR, "unexpected-reply"))  # a site that says it is gone
    if reply.has_error():
        return make_message(metadata, error=reply.error)
    return make_message(metadata, content=reply.content)
