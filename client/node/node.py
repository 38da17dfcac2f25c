"""The resident node: one process that stays, keeps model and data loaded, and answers the server's messages.

The stock SuperNode starts a process for every message, which imports torch and loads the model anew, and it runs the
code that the server ships. This one answers with the ClientApp that is installed here and never fetches any.

    connect -> look for a message (often while a round is on, seldom when idle) -> pull -> ClientApp -> send -> ...
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import Interrupted

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from tsugiki.client.node.connection import Connection
    from tsugiki.client.node.status import Lines

log = logging.getLogger("tsugiki.client")

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 3.0
PAUSE_GROWTH = 1.1
"""The pause is then a tenth of the time since the last message: what polling adds to a wait, and what it costs."""
_ASKED_ANEW = ("query", "evaluate")
"""A hello is a question about now, and an evaluation can be repeated."""
CONTEXTS = 4
"""Of how many runs at once a node remembers what it does for them."""
GRACE_S = 5.0
"""How long the message at work may still take after the first signal, and then how long sending may take."""


class Ending:
    """Set by the first signal: finish what is at work within the grace period, then leave. The second: at once."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    def __call__(self) -> bool:
        """Return whether the node is to leave."""
        return self.requested

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Take over SIGINT, SIGTERM and SIGALRM inside a `with` block."""
        handlers: dict[signal.Signals, Any] = {
            signal.SIGINT: self._asked,
            signal.SIGTERM: self._asked,
            signal.SIGALRM: self._grace_is_over,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the end of the grace period raise `Interrupted` inside a `with` block; each block has a period."""
        self._interruptible = True
        if self.requested:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        try:
            yield
        finally:
            self._interruptible = False

    def _asked(self, number: int, frame: Any) -> None:
        if self.requested:
            os._exit(130)  # at once: SystemExit could be caught by what is at work
        self.requested = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def _grace_is_over(self, number: int, frame: Any) -> None:
        if self._interruptible:
            raise Interrupted("this site is being stopped", code="site-stopping")


class Node:
    """Answers messages until it is told to end.

    Args:
        app: the installed ClientApp.
        connection: connected.
        node_config: for the app's Context; names site.toml as `site`.
        status: shows what happens.
        ending: when to stop.
    """

    def __init__(
        self, app: ClientApp, connection: Connection, node_config: dict[str, Any], status: Lines, ending: Ending
    ) -> None:
        self._app, self._connection, self._node_config = app, connection, node_config
        self._status, self._ending = status, ending
        self._contexts: dict[int, Context] = {}
        self._answers: dict[tuple[int, str], tuple[str, RecordDict]] = {}  # the last of each run and kind

    def run(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Answer messages, one at a time.

        Raises:
            LinkError: the server cannot be reached any more, or refuses this node.
        """
        pause_s = SHORTEST_PAUSE_S
        while not self._ending():
            received = self._connection.receive()
            if received is None:
                sleep(pause_s)
                pause_s = min(pause_s * PAUSE_GROWTH, LONGEST_PAUSE_S)
            else:
                self._answer(*received)
                pause_s = SHORTEST_PAUSE_S

    def _answer(self, envelope: Message, tree: Any) -> None:
        from tsugiki.client.node.channel import RunOver

        kind, group = envelope.metadata.message_type, envelope.metadata.group_id
        down, up, started = self._connection.bytes_down, self._connection.bytes_up, time.perf_counter()
        self._status.begins(kind, group)
        try:
            with self._ending.interruptible():
                message = self._connection.pull(envelope, tree, timeout_s=envelope.metadata.ttl)
                reply = self._handle(message)
            with self._ending.interruptible():
                self._connection.send(reply)
            outcome = str(reply.error.reason) if reply.has_error() else "done"
        except Interrupted:
            outcome = "not sent: stopping"
        except RunOver as over:
            self._forget(envelope.metadata.run_id)
            outcome = f"not sent: {over}"
        seconds = time.perf_counter() - started
        self._status.ends(
            kind, group, outcome, seconds, self._connection.bytes_down - down, self._connection.bytes_up - up
        )

    def _handle(self, message: Message) -> Message:
        """Return the app's reply; whatever the app lets through becomes a code, and the node lives on.

        What is asked for twice, because a server could not know that its message had arrived, is answered as before:
        nothing is trained, drawn, masked or opened twice. A nonce makes each request unique.
        """
        from flwr.app import Message, RecordDict

        from tsugiki.common.wire.messages import error_reply

        try:
            run_id, kind = message.metadata.run_id, message.metadata.message_type
            context, asked = self._context(run_id, kind), message.content.object_id
            before, answer = self._answers.get((run_id, kind), ("", RecordDict()))
            if before == asked:
                return Message(answer, reply_to=message)
            reply = self._app(message, context)
            if kind not in _ASKED_ANEW and reply.has_content():
                self._answers[run_id, kind] = (asked, reply.content)
            return reply
        except Exception as error:
            log.exception("the ClientApp failed")
            return error_reply(getattr(error, "code", "") or f"client-error:{type(error).__name__}", message)

    def _context(self, run_id: int, kind: str) -> Context:
        """Return the run's Context; those of the last runs are kept, each with its session of secure aggregation.

        A hello begins nothing that would have to be kept: who only greets pushes no run out.
        """
        from flwr.app import Context, RecordDict

        from tsugiki.common.wire.flower import identify_process

        identify_process(run_id, self._connection.node_id)
        known = self._contexts.pop(run_id, None)
        context = known or Context(
            run_id=run_id,
            node_id=self._connection.node_id,
            node_config=dict(self._node_config),
            state=RecordDict(),
            run_config={},
        )
        if known is not None or kind not in _ASKED_ANEW:
            self._contexts[run_id] = context  # the last to be used stands last
        for other in list(self._contexts)[:-CONTEXTS]:
            self._forget(other)
        return context

    def _forget(self, run_id: int) -> None:
        """Drop what is remembered of a run, secrets included."""
        self._contexts.pop(run_id, None)
        self._answers = {key: answer for key, answer in self._answers.items() if key[0] != run_id}
