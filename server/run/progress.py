"""What an operator sees while a run goes on: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tsugiki.server.run.privacy_words import NOT_PRIVATE

Record = dict[str, Any]

_SHOWN = 4
"""Names of sites on one line."""


class Progress:
    """The events of a run; this one shows nothing."""

    def __enter__(self) -> Progress:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def round_begins(self, round_: int, rounds: int, cohort: list[str]) -> None:
        """The cohort has been asked."""

    def reply(self, site: str, outcome: str) -> None:
        """A site has answered; the outcome is "accepted" or the code of a rejection."""

    def round_ends(self, record: Record) -> None:
        """The round's line for metrics.jsonl is complete."""


class Lines(Progress):
    """One line for each event, for logs."""

    def note(self, text: str) -> None:
        """Write the line."""
        print(text, file=sys.stderr, flush=True)

    def round_ends(self, record: Record) -> None:
        """Write the round's line."""
        self.note(describe(record))


class Bars(Progress):
    """A bar for the rounds and one for the sites of the round in flight."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = RichProgress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._rounds = self._bars.add_task("rounds", total=None, note="")
        self._sites = self._bars.add_task("sites", total=None, note="")

    def __enter__(self) -> Progress:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()

    def note(self, text: str) -> None:
        """Write a line above the bars."""
        self._bars.console.print(text, highlight=False, markup=False)

    def round_begins(self, round_: int, rounds: int, cohort: list[str]) -> None:
        """Start the sites' bar anew."""
        self._bars.update(self._rounds, total=rounds, completed=round_ - 1)
        self._bars.reset(
            self._sites, total=len(cohort), note=", ".join(cohort[:_SHOWN]) + ("..." if len(cohort) > _SHOWN else "")
        )

    def reply(self, site: str, outcome: str) -> None:
        """Move the sites' bar."""
        self._bars.update(self._sites, advance=1, note=f"{site} {outcome}")

    def round_ends(self, record: Record) -> None:
        """Move the rounds' bar and write the round's line."""
        self._bars.update(self._rounds, completed=record["round"])
        self.note(describe(record))


def choose() -> Progress:
    """Return bars on a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()


def _privacy(told: Record | None) -> list[str]:
    """Return what a private round has cost so far, against whoever sees the models."""
    if told is None:
        return []
    epsilon = told["epsilon"].get("release")
    return [f"epsilon {epsilon:.3g}" if told["private"] and epsilon is not None else NOT_PRIVATE]


def describe(record: Record) -> str:
    """Return one line about a round."""
    parts = [f"round {record['round']}"]
    if record.get("voided"):
        parts.append("voided")
    if record.get("accepted"):
        loss = "" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}, "
        parts.append(f"{loss}{len(record['accepted'])} sites")
    rejected = record.get("rejected", {})
    if rejected:
        parts.append("without " + ", ".join(f"{site} ({why['reason']})" for site, why in rejected.items()))
    if "aggregation_error" in record:
        parts.append(f"aggregation error {record['aggregation_error']:.2g}")
    parts += [f"{name} {value:.4f}" for name, value in record.get("eval", {}).items()]
    parts += _privacy(record.get("privacy"))
    parts.append(f"{sum(record['seconds'].values()):.1f} s")
    return ", ".join(parts) + (" (best)" if record.get("best") else "")


def describe_notes(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line about each kind of note.

    Args:
        notes: of each site's hello, as `shard-texts-cut:12`.
    """
    found: dict[str, list[str]] = {}
    for site in sorted(notes):
        for note in notes[site]:
            code, _, count = note.partition(":")
            found.setdefault(code, []).append(f"{site} ({count})" if count else site)
    lines = []
    for code, sites in sorted(found.items()):
        more = f" and {len(sites) - _SHOWN} more sites" if len(sites) > _SHOWN else ""
        lines.append(f"{code}: {', '.join(sites[:_SHOWN])}{more}")
    return lines
