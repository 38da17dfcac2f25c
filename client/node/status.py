"""The status of a node, for the operator of its site: a live line on a terminal, events in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import RecordDict
    from rich.console import Console

REFRESH_S = 0.25
_WORDS = {
    "query": "hello",
    "query.head_sums": "summing features",
    "query.keys": "exchanging keys",
    "query.shares": "exchanging shares",
    "query.unmask": "opening the sum",
    "query.ended": "end of a run",
    "train": "training",
    "train.masked": "training, masked",
    "evaluate": "evaluating",
}


class Lines:
    """One line for each event. Used as a context manager, so that `LiveLine` can take its line back."""

    def __init__(self) -> None:
        self.bytes_down = 0
        self.bytes_up = 0

    def __enter__(self) -> Lines:
        """Return the status."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No-op: a log keeps what was written."""

    def note(self, text: str) -> None:
        """Write a line."""
        print(_stamped(text), file=sys.stderr, flush=True)

    def begins(self, kind: str, group: str) -> None:
        """No-op: `ends` logs the whole event."""

    def step(self, step: int, steps: int, losses: Any) -> None:
        """No-op: a line for each step is too much for a log."""

    def ends(self, kind: str, group: str, outcome: str, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """Write what a message asked for, how it went, and the bytes that travelled."""
        self.bytes_down += bytes_down
        self.bytes_up += bytes_up
        self.note(f"{describe(kind, group)}: {outcome}, {seconds:.1f} s, {_traffic(bytes_down, bytes_up)}")


class LiveLine(Lines):
    """The same lines on a terminal, and below them one that shows the current work.

    Args:
        console: the terminal; None: stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self._doing = "waiting"
        self._shown_s = 0.0
        self._console = console or Console(stderr=True)
        # Redrawn by `_show` alone: a thread that redraws would take time from training.
        self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)

    def __enter__(self) -> Lines:
        """Show the line."""
        self._live.start()
        # The second signal ends the process at once (`Ending`), and nobody would show a hidden cursor again.
        self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the line back."""
        self._live.stop()

    def note(self, text: str) -> None:
        """Write a line above the live one."""
        from rich.text import Text

        self._console.print(Text(_stamped(text)), soft_wrap=True)
        self._show(self._doing)

    def begins(self, kind: str, group: str) -> None:
        """Show what a message asks for."""
        self._doing = describe(kind, group)
        self._show(self._doing)

    def step(self, step: int, steps: int, losses: Any) -> None:
        """Show the step and the mean loss, a few times a second; the loss may have to come from a GPU."""
        if step == steps or time.monotonic() - self._shown_s > REFRESH_S:
            self._show(f"{self._doing}, step {step}/{steps}, loss {float(losses[:step].mean()):.4f}")

    def ends(self, kind: str, group: str, outcome: str, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """Write the event, then show that the node waits."""
        self._doing = "waiting"
        super().ends(kind, group, outcome, seconds, bytes_down, bytes_up)

    def _show(self, text: str) -> None:
        from rich.text import Text

        self._shown_s = time.monotonic()
        line = f"connected | {text} | {_traffic(self.bytes_down, self.bytes_up)}"
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)


def choose() -> Lines:
    """Return a live line on a terminal, lines elsewhere."""
    return LiveLine() if sys.stderr.isatty() else Lines()


def describe(kind: str, group: str) -> str:
    """Describe the request of a message in words. `group` comes from the server: it is shown only if it is a number."""
    words = _WORDS.get(kind) or _WORDS.get(kind.split(".")[0], "unknown")
    if group.isdigit() and len(group) < 7:
        return f"round {group}: {words}"
    return words


def describe_answered(kind: str, content: RecordDict) -> str:
    """Return what became of a message that was answered: done, or which run is over."""
    from tsugiki.common.wire.messages import ENDED, read_ended

    if kind != f"query.{ENDED}":
        return "done"
    ended = read_ended(content)  # the app has read it, too
    mine = "" if ended.rounds_in < 0 else f", {ended.rounds_in} of them with this site"
    return f"run {ended.run} is over ({ended.outcome}), {ended.rounds} rounds{mine}"


def _stamped(text: str) -> str:
    return f"{time.strftime('%H:%M:%S')} {text}"


def _traffic(bytes_down: int, bytes_up: int) -> str:
    from rich.filesize import decimal

    return f"{decimal(bytes_down)} received, {decimal(bytes_up)} sent"
