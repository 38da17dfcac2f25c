"""What the operator of a site sees of its node: one line that is kept up to date on a terminal, events in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

REFRESH_S = 0.25
_WORDS = {
    "query": "hello",
    "query.keys": "exchanging keys",
    "query.shares": "exchanging shares",
    "query.unmask": "opening the sum",
    "train": "training",
    "train.masked": "training, masked",
    "evaluate": "evaluating",
}


class Lines:
    """One line for each event."""

    def __init__(self) -> None:
        self.rounds, self.bytes_down, self.bytes_up = 0, 0, 0

    def note(self, text: str) -> None:
        """Write a line."""
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def begins(self, kind: str, group: str) -> None:
        """Nothing: the end says it all."""

    def step(self, step: int, steps: int, losses: Any) -> None:
        """Nothing: too much for a log."""

    def ends(self, kind: str, group: str, outcome: str, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """Write what was asked, how it went, and what travelled."""
        self.bytes_down, self.bytes_up = self.bytes_down + bytes_down, self.bytes_up + bytes_up
        traffic = f"{size(bytes_down)} received, {size(bytes_up)} sent"
        self.note(f"{describe(kind, group)}: {outcome}, {seconds:.1f} s, {traffic}")


class Live(Lines):
    """The same lines, and below them the one of the moment."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = 0.0
        self._doing = "waiting"

    def note(self, text: str) -> None:
        """Write a line above the status line."""
        sys.stderr.write("\r\x1b[K")
        super().note(text)
        self._show(self._doing, at_once=True)

    def begins(self, kind: str, group: str) -> None:
        """Show what is at work."""
        self._doing = describe(kind, group)
        self._show(self._doing, at_once=True)

    def step(self, step: int, steps: int, losses: Any) -> None:
        """Show step and mean loss, a few times a second."""
        if step == steps or time.monotonic() - self._shown > REFRESH_S:
            self._show(f"{self._doing}, step {step}/{steps}, loss {float(losses[:step].mean()):.4f}")

    def ends(self, kind: str, group: str, outcome: str, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """Write the event, then wait."""
        self._doing = "waiting"
        super().ends(kind, group, outcome, seconds, bytes_down, bytes_up)

    def _show(self, text: str, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._shown > REFRESH_S:
            self._shown = time.monotonic()
            line = f"connected | {text} | {size(self.bytes_down)} received, {size(self.bytes_up)} sent"
            sys.stderr.write(f"\r\x1b[K{line[:160]}")
            sys.stderr.flush()


def choose() -> Lines:
    """Return a live line on a terminal, lines elsewhere."""
    return Live() if sys.stderr.isatty() else Lines()


def describe(kind: str, group: str) -> str:
    """Return what a message asks for, in words. `group` is the server's, so that only digits of it are shown."""
    words = _WORDS.get(kind) or _WORDS.get(kind.split(".")[0], "unknown")
    number = group if group.isdigit() and len(group) < 7 else ""
    return f"round {number}: {words}" if number else words


def size(count: int) -> str:
    """Return bytes for people: 1,234 as "1.2 kB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
