"""The resident node: one long-lived process that keeps model and data loaded and answers the server's messages.

The stock SuperNode starts a process for every message, which imports torch and loads the model anew, and it runs the
code that the server ships. This one answers with the ClientApp that is installed here and never fetches any.

    connect -> look for a message (often while a round is on, seldom when idle) -> pull -> ClientApp -> send -> ...
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tsugiki.client.node.kept_answer import KINDS as KEPT_KINDS
from tsugiki.client.node.kept_answer import KeptAnswer
from tsugiki.client.node.status import describe_answered
from tsugiki.common.errors import Interrupted

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from tsugiki.client.node.connection import Connection
    from tsugiki.client.node.status import Lines

log = logging.getLogger("tsugiki.client")

SHORTEST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 3.0
PAUSE_GROWTH = 1.1
"""The pause grows to a tenth of the time since the last message: so polling adds at most a tenth to a wait."""
LOOK_S = 5.0
"""How often a node that has only said hello looks whether its site has changed."""
REST_S = 60.0
"""How long it looks no more after it has come back for that: data may change all the time."""
_HELLO = "query"
_ASKED_ANEW = (_HELLO, "evaluate")
"""Kinds of messages that are answered anew if asked twice: a hello is about now, and an evaluation has no effect."""
CONTEXTS = 4
"""Number of runs whose state a node keeps at once."""
GRACE_S = 5.0
"""Time that the current message may still take after the first signal, and then the time that sending may take."""
_ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
"""What asks a process to end. SIGBREAK is Ctrl-Break on Windows."""


class Ending:
    """Ends the node: the first signal after the current message or the grace period, the second one at once.

    The clock of the grace period is a thread, because Windows has no signal of a clock.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False
        self._clock: threading.Timer | None = None
        self._rings_at = 0.0
        self._rang = False

    def __call__(self) -> bool:
        """Return whether the node is to end."""
        return self.requested

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Take over the signals that ask a process to end inside a `with` block. Only for the main thread."""
        before = {number: signal.signal(number, self._asked) for number in _ENDING_SIGNALS}
        try:
            yield
        finally:
            self._stop_clock()
            if self._clock is not None:
                self._clock.join()  # else it could interrupt who comes after us
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the end of the grace period raise `Interrupted` inside a `with` block; each block has a period."""
        self._interruptible = True
        if self.requested:
            self._start_clock()
        try:
            yield
        finally:
            self._interruptible = False

    def _asked(self, number: int, frame: Any) -> None:
        if self._rang:  # by our own clock
            self._rang = False
            self._grace_may_be_over()
            return
        if self.requested:
            os._exit(130)  # at once: training code could catch a SystemExit
        self.requested = True
        self._start_clock()

    def _start_clock(self) -> None:
        self._stop_clock()
        self._rings_at = time.monotonic() + GRACE_S
        self._clock = threading.Timer(GRACE_S, self._ring)
        self._clock.daemon = True
        self._clock.start()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()

    def _ring(self) -> None:
        """Interrupt the main thread from the clock's, as a signal would."""
        self._rang = True
        _thread.interrupt_main(signal.SIGINT)

    def _grace_may_be_over(self) -> None:
        # A clock that was set anew may have rung just before.
        if self._interruptible and time.monotonic() >= self._rings_at:
            raise Interrupted("this site is being stopped", code="site-stopping")


class _Changes:
    """Looks for changes of a site since its last hello.

    Args:
        stamp: returns a text that changes whenever the site's file or data change.
    """

    def __init__(self, stamp: Callable[[], str]) -> None:
        self._stamp = stamp
        self._at_hello: str | None = None
        self._last_look = ""
        self._due = 0.0

    def begin(self) -> None:
        """Remember the site as it is now."""
        self._at_hello = self._stamp()
        self._last_look = self._at_hello

    def end(self) -> None:
        """Look no more until `begin`."""
        self._at_hello = None

    def found(self) -> bool:
        """Return whether the site has changed, and was the same at two looks: a file may be long in the writing."""
        if self._at_hello is None or time.monotonic() < self._due:
            return False
        before = self._last_look
        self._last_look = self._stamp()
        if self._last_look == self._at_hello or self._last_look != before:
            self._due = time.monotonic() + LOOK_S
            return False
        self.end()
        self._due = time.monotonic() + REST_S
        return True


class Node:
    """Answers messages until `ending` is requested.

    Args:
        app: the installed ClientApp.
        connection: a connection that is open.
        node_config: for the app's Context; `site` is the path of site.toml.
        status: shows what happens.
        ending: says when to stop.
        kept: the answer that the server may not have yet.
        stamp: returns a text that changes whenever the site's file or data change.
    """

    def __init__(
        self,
        app: ClientApp,
        connection: Connection,
        node_config: dict[str, Any],
        status: Lines,
        ending: Ending,
        kept: KeptAnswer,
        stamp: Callable[[], str] = str,
    ) -> None:
        self._app = app
        self._connection = connection
        self._node_config = node_config
        self._status = status
        self._ending = ending
        self._kept = kept
        self._contexts: dict[int, Context] = {}
        self._answers: dict[tuple[int, str], tuple[str, RecordDict]] = {}  # the last of each run and kind
        self._stamp = stamp
        self._changes = _Changes(stamp)

    def run(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Answer messages, one at a time.

        Raises:
            Stopping: `ending` was requested while the server did not answer.
        """
        pause_s = SHORTEST_PAUSE_S
        while not self._ending():
            received = self._connection.receive()
            if received is None:
                self._come_back_if_changed()
                sleep(pause_s)
                pause_s = min(pause_s * PAUSE_GROWTH, LONGEST_PAUSE_S)
            else:
                self._answer(*received)
                pause_s = SHORTEST_PAUSE_S

    def _come_back_if_changed(self) -> None:
        """Let the server say hello anew if the site has changed since it said hello, and was asked nothing after it.

        The hello may have been refused, here or at the server, which does not say so.
        """
        if self._changes.found():
            self._status.note("site.toml or the data has changed since the last hello: coming back for another")
            self._connection.come_back()

    def _answer(self, envelope: Message, tree: Any) -> None:
        from tsugiki.client.node.channel import MessageGone, RunOver

        kind = envelope.metadata.message_type
        if kind == _HELLO:
            self._changes.begin()
        else:
            self._changes.end()
        group = envelope.metadata.group_id
        down = self._connection.bytes_down
        up = self._connection.bytes_up
        started = time.perf_counter()
        self._status.begins(kind, group)
        try:
            with self._ending.interruptible():
                message = self._connection.pull(envelope, tree, timeout_s=envelope.metadata.ttl)
                reply = self._handle(message)
            with self._ending.interruptible():
                self._connection.send(reply)
            if kind in KEPT_KINDS:
                self._kept.forget()
            outcome = str(reply.error.reason) if reply.has_error() else describe_answered(kind, message.content)
        except Interrupted:
            outcome = "not sent: stopping"
        except MessageGone as gone:
            outcome = f"not sent: {gone}"
        except RunOver as over:
            if kind in KEPT_KINDS:
                self._kept.forget()
            self._forget(envelope.metadata.run_id)
            outcome = f"not sent: {over}"
        # The connection counts the bytes of all messages; the difference is this message's.
        seconds = time.perf_counter() - started
        self._status.ends(
            kind, group, outcome, seconds, self._connection.bytes_down - down, self._connection.bytes_up - up
        )

    def _handle(self, message: Message) -> Message:
        """Return the app's reply. An exception that leaves the app becomes a code, and the node continues.

        A server may repeat a request if it cannot know that its message arrived. The node then repeats its answer:
        nothing is trained, drawn, masked or opened twice. A nonce makes each request unique.
        """
        from flwr.app import Message, RecordDict

        from tsugiki.common.wire.messages import error_reply

        try:
            run_id = message.metadata.run_id
            kind = message.metadata.message_type
            context = self._context(run_id, kind)
            # A repeated request has the same nonce, and so the same id.
            asked = message.content.object_id
            asked_before, answer = self._answers.get((run_id, kind), ("", RecordDict()))
            if asked_before == asked:
                return Message(answer, reply_to=message)
            if kind in KEPT_KINDS:
                # by the process before this one; not if the site has changed: its policy may refuse the round now
                kept = self._kept.read(f"{asked} {self._stamp()}")
                if kept is not None:
                    return Message(kept, reply_to=message)
                self._kept.forget()  # the round that it was for is over
            reply = self._app(message, context)
            if kind not in _ASKED_ANEW and reply.has_content():
                self._answers[run_id, kind] = (asked, reply.content)
            if kind in KEPT_KINDS and reply.has_content():
                self._kept.keep(f"{asked} {self._stamp()}", reply.content)
            return reply
        except Exception as error:
            log.exception("the ClientApp failed")
            return error_reply(getattr(error, "code", "") or f"client-error:{type(error).__name__}", message)

    def _context(self, run_id: int, kind: str) -> Context:
        """Return the run's Context. Those of the last runs are kept, each with its session of secure aggregation.

        A hello has no state to keep, so a run that sends a hello alone does not displace another run.
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
            self._contexts[run_id] = context  # in the order of their last use
        for other in list(self._contexts)[:-CONTEXTS]:
            self._forget(other)
        return context

    def _forget(self, run_id: int) -> None:
        """Drop all state of a run, secrets included."""
        self._contexts.pop(run_id, None)
        self._answers = {key: answer for key, answer in self._answers.items() if key[0] != run_id}
