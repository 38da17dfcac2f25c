"""Send messages and collect replies on any of Flower's grids, polled by ourselves.

Flower's `send_and_receive` sleeps for seconds between looks. This one looks often in the beginning and seldom later,
hands every reply over as it comes, and keeps the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from common.errors import Interrupted

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

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
                "stopped by the user", do="the same command with --resume RUN goes on from the last checkpoint"
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
        replies = list(grid.pull_messages(pending))
        pending -= {reply.metadata.reply_to_message_id for reply in replies}
        yield from replies
        if not replies and not sequential:
            time.sleep(min(pause, max(0.0, ends - time.monotonic())))
        pause = FIRST_PAUSE_S if replies else min(pause * 1.5, LONGEST_PAUSE_S)


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
