"""What a run needs of an engine's grid, and an exchange of messages on it, polled by ourselves.

Flower's `send_and_receive` sleeps for seconds between looks. This one looks often in the beginning and seldom later,
hands every reply over as it comes, and keeps the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from tsugiki.common.errors import Interrupted

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.5
RETURN_S = 15.0
"""How long a node that left may take to come back and be asked again. A dead line makes a node leave after 20 s."""
NODE_UNAVAILABLE = 5
"""Of Flower's error codes (`flwr.common.constant.ErrorCode`, slow to import)."""


class RunGrid(Protocol):
    """What a run needs of a grid: three of Flower's calls, and two things that Flower's grids do not have."""

    sequential: bool
    """Whether it answers one message each time it is polled. All nodes of such a grid are connected from the start."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have come since the last look."""

    def limit_replies(self, size_bytes: int) -> None:
        """Refuse replies that hold more than an adapter of this size and its envelope, if replies come from outside."""


class StockGrid:
    """One of Flower's own grids, as a run needs it.

    Args:
        grid: answers several nodes at once, and bounds replies by itself or not at all.
    """

    sequential = False

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have come since the last look."""
        return self._grid.pull_messages(message_ids)

    def limit_replies(self, size_bytes: int) -> None:
        """Limit nothing: Flower's grid has no such bound."""


class Stop:
    """Asked to stop by the user: the round in flight is abandoned, the last checkpoint kept."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Stop at the next chance."""
        self.requested = True

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises:
            Interrupted: it was.
        """
        if self.requested:
            raise Interrupted(
                "stopped by the user", hint="the same command with --resume RUN, which goes on from the last checkpoint"
            )


def exchange(grid: RunGrid, messages: list[Message], timeout_s: float, stop: Stop) -> Iterator[Message]:
    """Yield the replies to `messages` as they come, until all are there or the time is up.

    A SuperLink hands a message out once: if a node loses it, with its connection or its process, nobody tells. Such a
    node leaves and comes back (`client/node/connection.py`), and is asked again.

    Args:
        grid: a sequential one has `timeout_s` for each message.
        messages: one for each node.
        timeout_s: for all of them.
        stop: checked between polls.

    Raises:
        Interrupted: the user asked to stop.
    """
    pending = set(grid.push_messages(messages))
    ends = time.monotonic() + timeout_s * (len(messages) if grid.sequential else 1)
    pause = FIRST_PAUSE_S
    away = _Away(grid, messages)
    while (pending or away.nodes) and time.monotonic() < ends:
        stop.check()
        replies = list(grid.pull_messages(pending)) if pending else []
        pending -= {reply.metadata.reply_to_message_id for reply in replies}
        for reply in replies:
            if not away.note(reply):
                yield reply
        pending |= away.ask_again()
        yield from away.given_up()
        if not replies and not grid.sequential:
            time.sleep(min(pause, max(0.0, ends - time.monotonic())))
        pause = FIRST_PAUSE_S if replies else min(pause * 1.5, LONGEST_PAUSE_S)
    yield from (error for error, _ in away.nodes.values())


class _Away:
    """The nodes that left while they were asked: node -> the SuperLink's error, and when it left."""

    def __init__(self, grid: RunGrid, messages: list[Message]) -> None:
        self._grid = grid
        self._messages = messages
        self._asked_again: set[int] = set()
        self.nodes: dict[int, tuple[Message, float]] = {}

    def note(self, reply: Message) -> bool:
        """Return whether the reply says that its node left, which may be asked again; and remember it."""
        node = reply.metadata.src_node_id
        left = reply.has_error() and reply.error.code == NODE_UNAVAILABLE and node not in self._asked_again
        if left:
            self.nodes[node] = (reply, time.monotonic())
        return left

    def ask_again(self) -> set[str]:
        """Send the nodes that are back their message once more, and only once; return its ids."""
        from flwr.app import Message

        back = self.nodes.keys() & set(self._grid.get_node_ids()) if self.nodes else set()
        again = [
            Message(
                message.content,
                message.metadata.dst_node_id,
                message.metadata.message_type,
                ttl=message.metadata.ttl,
                group_id=message.metadata.group_id,
            )
            for message in self._messages
            if back and message.metadata.dst_node_id in back
        ]
        self._asked_again |= back
        for node in back:
            del self.nodes[node]
        return set(self._grid.push_messages(again)) if again else set()

    def given_up(self) -> list[Message]:
        """Return the errors of the nodes that have been away for too long."""
        late = [node for node, (_, since) in self.nodes.items() if time.monotonic() - since >= RETURN_S]
        return [self.nodes.pop(node)[0] for node in late]


def wait_for_nodes(grid: RunGrid, count: int, timeout_s: float, stop: Stop, seen: Callable[[int], None]) -> list[int]:
    """Return the ids of the connected nodes once there are `count`, or of those there are when the time is up."""
    ends = time.monotonic() + timeout_s
    pause = FIRST_PAUSE_S
    known = -1
    while True:
        stop.check()
        nodes = sorted(grid.get_node_ids())
        if len(nodes) != known:
            known = len(nodes)
            seen(known)
        if len(nodes) >= count or time.monotonic() >= ends:
            return nodes
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_S)
