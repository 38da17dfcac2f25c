"""The in-process engine: one process, one base model, no Ray, the same bytes each time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from tsugiki.common.wire.flower import identify_process, set_message_id
from tsugiki.common.wire.messages import error_reply

Fault = Callable[[int, Message], list[Message]]
"""Returns the replies that arrive in place of a node's reply: usually [reply]. Tests lose, repeat or forge it."""


class InProcessGrid(Grid):
    """A Grid that calls the ClientApp itself, one message for each poll, in the order in which they were pushed.

    Args:
        client_app: answers every message.
        nodes: number of nodes; their ids count from 1 and their node config has `partition-id`, as in Flower.
        fault: see `Fault`.
    """

    sequential = True
    simulated = True

    def __init__(self, client_app: ClientApp, nodes: int, fault: Fault | None = None) -> None:
        identify_process()
        self._app = client_app
        self._fault = fault
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, nodes + 1)
        }
        # of all dicts, this one alone finds its first key at once after many of them were removed
        self._queue: OrderedDict[str, Message] = OrderedDict()
        self._sent = 0

    def get_node_ids(self) -> list[int]:
        """Return all node ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; return their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            set_message_id(message, str(self._sent))
            self._queue[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer the oldest queued message among `message_ids`."""
        # no copy of a set: one with all messages of a round comes at every poll
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        message_id = next((queued for queued in self._queue if queued in wanted), None)
        if message_id is None:
            return []
        # one message for each poll: the caller may stop between two of them
        message = self._queue.pop(message_id)
        node = message.metadata.dst_node_id
        try:
            reply = self._app(message, self._contexts[node])
        except Exception as error:  # noqa: BLE001  # an app of someone else's; ours answers with a code itself
            reply = error_reply(f"client-error:{type(error).__name__}", message)
        return [reply] if self._fault is None else self._fault(node, reply)

    def keep_replies(self, message_ids: set[str]) -> None:
        """No-op: a reply is made when it is asked for."""

    def limit_replies(self, size_bytes: int) -> None:
        """No-op: replies come from this process."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Answer all messages at once."""
        ids = self.push_messages(messages)
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]

    def set_run(self, run: Any) -> None:
        """No-op: there is one run."""

    @property
    def run(self) -> Any:
        """Always None: only a SuperLink describes a run."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Return a message."""
        return Message(*args, **kwargs)
