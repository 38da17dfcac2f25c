"""The interface of an engine's grid, and the exchange of messages on it by polling.

Flower's `send_and_receive` sleeps for seconds between polls. `exchange` polls often at first and seldom later, yields
each reply as it comes, and keeps the deadline.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tsugiki.common.errors import Interrupted

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.5
RETURN_S = 15.0
"""How long a node that left may take to come back and be asked again, if nothing else is said. A dead connection makes
it leave after 20 s."""
MOST_REPEATS = 20
"""How often a node that came back is asked again. A dead line can make a node leave twice: the server misses its
heartbeats and takes it for gone; back on the line, the node leaves on purpose because it may have lost a message. The
bound is for a node that its message kills, and that is started again each time."""
NODE_UNAVAILABLE = 5
"""Flower's error code for a node that left (`flwr.common.constant.ErrorCode`, slow to import)."""


class RunGrid(Protocol):
    """The interface of a grid for a run: three of Flower's calls, and three members that Flower's grids do not have."""

    sequential: bool
    """Whether it answers one message for each poll. All nodes of such a grid are connected from the start."""
    simulated: bool
    """Whether all its nodes share this machine. They wait for each other, so a late reply says nothing about a site."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that have come since the last look."""

    def keep_replies(self, message_ids: set[str]) -> None:
        """Keep replies to these messages also while other exchanges look for other replies. The set may change."""

    def limit_replies(self, size_bytes: int) -> None:
        """Refuse replies that hold more than an adapter of this size and its envelope, if replies come from outside."""


class StockGrid:
    """The grid of Flower's own simulation, as a run needs it.

    Args:
        grid: answers several nodes at once, and bounds replies by itself or not at all.
    """

    sequential = False
    simulated = True

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

    def keep_replies(self, message_ids: set[str]) -> None:
        """No-op: Flower's grid drops nothing."""

    def limit_replies(self, size_bytes: int) -> None:
        """No-op: Flower's grid has no such limit."""


class Stop:
    """The user's request to stop. The current round is then abandoned, and the last checkpoint is kept.

    A signal asks this process to stop (`requested`); a file asks the current run only (`asked_by`).
    """

    def __init__(self) -> None:
        self.requested = False
        self._file: Path | None = None

    @contextmanager
    def asked_by(self, file: Path) -> Iterator[None]:
        """Also stop when another process makes this file, inside a `with` block. The file is removed.

        Raises:
            OSError: a file that was left there cannot be removed.
        """
        file.unlink(missing_ok=True)
        self._file = file
        try:
            yield
        finally:
            self._file = None
            with suppress(OSError):  # what ended the run may be the disk
                file.unlink(missing_ok=True)

    def request(self) -> None:
        """Stop at the next chance."""
        self.requested = True

    def pause(self, seconds: float) -> None:
        """Sleep, unless the user asks to stop.

        Raises:
            Interrupted: the user asked to stop.
        """
        deadline = Deadline(seconds)
        while deadline.left_s > 0:
            self.check()
            time.sleep(min(LONGEST_PAUSE_S, deadline.left_s))

    def check(self) -> None:
        """Check that no stop was requested.

        Raises:
            Interrupted: the user asked to stop.
        """
        if self.requested or (self._file is not None and self._file.exists()):
            raise Interrupted(
                "stopped by the user", hint="the same command with --resume RUN, which goes on from the last checkpoint"
            )


class Deadline:
    """The end of an exchange, `after_s` after its start. It may be moved while replies come."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """The time since the start."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float:
        """The time to the end; 0 or less: it is over."""
        return self.after_s - self.elapsed_s


def exchange(
    grid: RunGrid,
    messages: list[Message],
    timeout_s: float,
    stop: Stop,
    deadline: Deadline | None = None,
    return_s: Callable[[], float] = lambda: RETURN_S,
    outstanding: Outstanding | None = None,
) -> Iterator[Message]:
    """Yield the replies to `messages` as they come, until all are there or the time is up.

    A SuperLink delivers a message once. If a node loses it, with its connection or its process, nobody reports that.
    Such a node leaves and comes back (`client/node/connection.py`), and is asked again.

    Args:
        grid: a sequential grid has `timeout_s` for each message.
        messages: one for each node.
        timeout_s: for all messages together.
        stop: checked between polls.
        deadline: takes the place of `timeout_s`; the caller may move it between two replies.
        return_s: returns how long a node that left may take to come back.
        outstanding: the messages of exchanges that are over; replies to them are yielded too. Messages of this one that
            are not answered before its end are added. None: nobody waits for such replies.

    Raises:
        Interrupted: the user asked to stop.
    """
    pending = set(grid.push_messages(messages))
    if deadline is None:
        deadline = Deadline(timeout_s * (len(messages) if grid.sequential else 1))
    pause = FIRST_PAUSE_S
    away = _Away(grid, messages, return_s)
    late = outstanding or Outstanding()
    if outstanding is not None:
        grid.keep_replies(outstanding.ids)
    while (pending or away.nodes) and deadline.left_s > 0:
        stop.check()
        awaited = pending | late.ids if late.ids else pending  # mostly without a copy: there may be thousands
        replies = list(grid.pull_messages(awaited)) if awaited else []
        answered = bool(replies)
        replies = late.take(replies)
        pending -= {reply.metadata.reply_to_message_id for reply in replies}
        # the error of a node that left is withheld: it may come back and answer
        replies = [reply for reply in replies if not away.note(reply)]
        while replies:  # a reply is forgotten as soon as it is handed over: it may be large
            yield replies.pop(0)
        pending |= away.ask_again()
        late.ask_again()
        yield from away.given_up()
        # a sequential grid works while it is polled, so there is nothing to wait for
        if not answered and not grid.sequential:
            time.sleep(min(pause, max(0.0, deadline.left_s)))
        pause = FIRST_PAUSE_S if answered else min(pause * 1.5, LONGEST_PAUSE_S)
    # the time is up: nodes that are still away have failed
    yield from [error for error, _ in away.nodes.values()]
    late.add(pending, away)


class Outstanding:
    """Messages of exchanges that are over, whose replies may still come.

    Attributes:
        ids: of the messages.
    """

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self._away: list[_Away] = []

    def add(self, ids: set[str], away: _Away) -> None:
        """Add the messages of an exchange that have not been answered, and the nodes of it that are away."""
        self.ids |= ids
        away.nodes |= away.lost  # in a later round they have time to come back
        self._away.append(away)

    def keep_last(self, nodes: Container[int]) -> None:
        """Of the exchange that was added last, forget all nodes but these."""
        last = self._away[-1]
        last.messages = [message for message in last.messages if message.metadata.dst_node_id in nodes]
        self._away = [away for away in self._away if away.messages]

    def take(self, replies: list[Message]) -> list[Message]:
        """Return the replies without those to forgotten requests, and of nodes that left and are to be asked again."""
        taken = []
        for reply in replies:
            if reply.metadata.reply_to_message_id in self.ids:
                self.ids.discard(reply.metadata.reply_to_message_id)
                asked = [away for away in self._away if away.has_asked(reply)]
                if not asked or any(away.note(reply) for away in asked):
                    continue
            taken.append(reply)
        return taken

    def ask_again(self) -> None:
        """Send each node that is back its message again."""
        for away in self._away:
            self.ids |= away.ask_again()

    def forget(self, node: int) -> None:
        """Ask a node no more for what it was asked in these exchanges, and take no answer to it."""
        for away in self._away:
            away.forget(node)
        self._away = [away for away in self._away if away.messages]


class _Away:
    """The nodes that left before they answered.

    Attributes:
        messages: of the exchange.
        nodes: the SuperLink's error and the time of leaving, by node.
        lost: the same of nodes that were given up.
    """

    def __init__(
        self, grid: RunGrid, messages: list[Message], return_s: Callable[[], float] = lambda: RETURN_S
    ) -> None:
        self._grid = grid
        self.messages = messages
        self._return_s = return_s
        self._repeats: Counter[int] = Counter()
        self.nodes: dict[int, tuple[Message, float]] = {}
        self.lost: dict[int, tuple[Message, float]] = {}

    def note(self, reply: Message) -> bool:
        """Return whether the reply reports that its node left and can be asked again. Such a node is remembered."""
        node = reply.metadata.src_node_id
        left = reply.has_error() and reply.error.code == NODE_UNAVAILABLE and self._repeats[node] < MOST_REPEATS
        if left:
            self.nodes[node] = (reply, time.monotonic())
        return left

    def ask_again(self) -> set[str]:
        """Send each node that is back its message again, at most `MOST_REPEATS` times; return the messages' ids."""
        from flwr.app import Message

        # at nearly every poll nobody is away
        back = self.nodes.keys() & set(self._grid.get_node_ids()) if self.nodes else set()
        if not back:
            return set()
        again = [
            Message(
                message.content,
                message.metadata.dst_node_id,
                message.metadata.message_type,
                ttl=message.metadata.ttl,
                group_id=message.metadata.group_id,
            )
            for message in self.messages
            if message.metadata.dst_node_id in back
        ]
        self._repeats.update(back)
        for node in back:
            del self.nodes[node]
        return set(self._grid.push_messages(again))

    def has_asked(self, reply: Message) -> bool:
        """Return whether the sender of a reply is one of the nodes."""
        return any(message.metadata.dst_node_id == reply.metadata.src_node_id for message in self.messages)

    def forget(self, node: int) -> None:
        """Never ask this node again."""
        self.nodes.pop(node, None)
        self.lost.pop(node, None)
        self.messages = [message for message in self.messages if message.metadata.dst_node_id != node]

    def given_up(self) -> list[Message]:
        """Return the errors of the nodes that have been away for too long."""
        late = [node for node, (_, since) in self.nodes.items() if time.monotonic() - since >= self._return_s()]
        self.lost |= {node: self.nodes.pop(node) for node in late}
        return [self.lost[node][0] for node in late]


def wait_for_nodes(grid: RunGrid, count: int, timeout_s: float, stop: Stop, seen: Callable[[int], None]) -> list[int]:
    """Return the ids of the connected nodes, as soon as there are `count` of them or the time is up."""
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
