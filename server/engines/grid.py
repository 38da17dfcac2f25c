"""Send messages and collect replies on any of Flower's grids, polled by ourselves.

Flower's `send_and_receive` sleeps for seconds between looks. This one looks often in the beginning and seldom later,
hands every reply over as it comes, and keeps the deadline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from common.errors import Interrupted

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

log = logging.getLogger("tsugiki.server")

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.5


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
                "stopped by the user", do="`tsugiki simulate --resume RUN` goes on from the last checkpoint"
            )


def exchange(grid: Grid, messages: list[Message], timeout_s: float, stop: Stop) -> Iterator[Message]:
    """Yield the replies to `messages` as they come, until all are there or the time is up.

    Args:
        grid: an in-process grid answers one message each time it is polled, and counts each site's time by itself.
        messages: one for each node.
        timeout_s: for all of them.
        stop: checked between polls.

    Raises:
        Interrupted: the user asked to stop.
    """
    pending = set(grid.push_messages(messages))
    sequential = getattr(grid, "sequential", False)
    ends = time.monotonic() + timeout_s * (len(messages) if sequential else 1)
    pause = FIRST_PAUSE_S
    while pending and time.monotonic() < ends:
        stop.check()
        replies, unreadable = _pull(grid, pending, sequential)
        pending -= unreadable | {reply.metadata.reply_to_message_id for reply in replies}
        yield from replies
        if not replies and not sequential:
            time.sleep(min(pause, max(0.0, ends - time.monotonic())))
        pause = FIRST_PAUSE_S if replies else min(pause * 1.5, LONGEST_PAUSE_S)


def _pull(grid: Grid, pending: set[str], sequential: bool) -> tuple[list[Message], set[str]]:
    """Return the replies that are there, and the ids of those that cannot be read.

    Over a network Flower inflates what a site uploaded before anyone can look at it, and raises whatever a malformed
    object makes it raise. One at a time, such a reply costs its own site the round and takes no other with it.
    """
    if sequential:
        return list(grid.pull_messages(pending)), set()
    replies: list[Message] = []
    unreadable: set[str] = set()
    for message_id in sorted(pending):
        try:
            replies += grid.pull_messages([message_id])
        except Exception as error:  # noqa: BLE001  # see above: there is no telling which
            log.warning("a reply cannot be read: %s", type(error).__name__)
            unreadable.add(message_id)
    return replies, unreadable


def wait_for_nodes(grid: Grid, count: int, timeout_s: float, stop: Stop, seen: Callable[[int], None]) -> list[int]:
    """Return the ids of the connected nodes once there are `count`, or of those there are when the time is up."""
    ends, pause, known = time.monotonic() + timeout_s, FIRST_PAUSE_S, -1
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
