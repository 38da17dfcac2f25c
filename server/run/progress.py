"""The progress of a run, for its operator: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tsugiki.common.config.run import SITES
from tsugiki.server.run.privacy_words import NOT_PRIVATE

Record = dict[str, Any]

_SHOWN = 4
"""Most names of sites on one line."""
_SHOWN_ROWS = 20
"""Most sites whose rows are shown."""
_EFFECTS = {
    "capped": "each weighs at most strategy.max_site_share of a round, or an equal share",
    "rows": 'with strategy.weighting = "rows" they decide as much; "capped" or "equal" would bound it',
    "equal": "each weighs as much as any other",
}
"""What many rows of a site mean under a `strategy.weighting`."""


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
        """Called with each message for the operator."""

    def round_begins(self, round_: int, rounds: int, cohort: list[str]) -> None:
        """Called before the cohort of a round is asked."""

    def reply(self, site: str, outcome: str) -> None:
        """Called when a site has answered; the outcome is "accepted" or the code of a rejection."""

    def round_ends(self, record: Record) -> None:
        """Called when the round's line for metrics.jsonl is complete."""


class Lines(Progress):
    """One line for each event, for logs."""

    def note(self, text: str) -> None:
        """Write the line."""
        print(text, file=sys.stderr, flush=True)

    def round_ends(self, record: Record) -> None:
        """Write the round's line."""
        self.note(describe(record))


class Bars(Progress):
    """A bar for the rounds, and one for the sites of the current round."""

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
        shown = ", ".join(cohort[:_SHOWN])
        if len(cohort) > _SHOWN:
            shown += "..."
        self._bars.reset(self._sites, total=len(cohort), note=shown)

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


def _privacy(figures: Record | None) -> list[str]:
    """Return the epsilon so far against an adversary that sees the models; empty for a run without privacy."""
    if figures is None:
        return []
    epsilon = figures["epsilon"].get("release")
    if epsilon is None or not figures["private"]:
        return [NOT_PRIVATE]
    return [f"epsilon {epsilon:.3g}"]


def describe_sites(at_sites: Mapping[str, Any] | None) -> str:
    """Return a line about the means over sites in a summary; empty without any.

    Args:
        at_sites: of the summary, see `at_sites.results`.
    """
    if at_sites is None:
        return ""
    compared = at_sites["compared"]
    line = f"{SITES}*: means over {len(compared)} sites that evaluated both rounds"
    if not compared:
        line = f"{SITES}*: means over {len(at_sites['evaluated'])} sites; none of them evaluated the first round"
    if worst := at_sites["worst"]:
        line += f"; worst site {worst['site']}, {worst['metric']} {shown(worst['value'])}"
    return line


def _at_sites(record: Record) -> list[str]:
    """Return the mean over the sites' own evaluations with the worst site, and what it is compared over."""
    parts = []
    if worst := record.get("sites_worst"):
        metric = worst["metric"]
        count = sum(metric in found for found in record["sites_eval"].values())
        mean = f"{SITES}{metric} {shown(record['sites_mean'][metric])}"
        parts.append(f"{mean} (mean of {count} sites, worst {worst['site']} {shown(worst['value'])})")
    if compared := record.get("sites_compared"):
        both = len(compared["sites"])
        best = f"round {compared['round']}"
        of = f"of its {compared['of']} sites"
        parts.append(f"compared with {best} at {both} {of}" if both else f"not compared with {best}: too few {of}")
    return parts


def shown(value: float | None) -> str:
    """Return a metric with four digits; a dash for one that is not finite, which is null in a file."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}"


def describe(record: Record) -> str:
    """Return one line about a round."""
    parts = [f"round {record['round']}"]
    if record.get("voided"):
        parts.append("voided")
    if "warm_head" in record:
        parts.append(f"linear probe from {len(record['warm_head']['sites'])} sites' sums")
    if record.get("accepted"):
        # no site may share its loss
        if record["train_loss"] is not None:
            parts.append(f"loss {record['train_loss']:.4f}")
        parts.append(f"{len(record['accepted'])} sites")
        parts += [
            f"{site} {one['steps']} of {one['steps'] + one['missed_steps']} steps"
            for site, one in record["accepted"].items()
            if one.get("missed_steps")
        ]
        parts += [f"{site} late by {one['late_by']}" for site, one in record["accepted"].items() if one.get("late_by")]
    rejected = record.get("rejected", {})
    if rejected:
        parts.append("without " + ", ".join(f"{site} ({why['reason']})" for site, why in rejected.items()))
    if record.get("left_out"):
        parts.append("not asked: " + ", ".join(record["left_out"]))
    parts += [f"{site}'s update of round {number} is expected" for site, number in record.get("expected", {}).items()]
    parts += [f"{site} not asked until round {again} (silent)" for site, again in record.get("not_asked", {}).items()]
    parts += [
        f"{site} not asked to evaluate until round {again} (silent)"
        for site, again in record.get("sites_eval_not_asked", {}).items()
    ]
    if "aggregation_error" in record:
        parts.append(f"aggregation error {record['aggregation_error']:.2g}")
    if "update_cosine" in record:
        parts.append(f"update cosine {record['update_cosine']:.2f}")
    parts += [f"{name} {shown(value)}" for name, value in record.get("eval", {}).items()]
    parts += _at_sites(record)
    parts += _privacy(record.get("privacy"))
    parts.append(f"{sum(record['seconds'].values()):.1f} s")
    line = ", ".join(parts)
    if record.get("best"):
        return f"{line} (best)"
    return line


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
        shown = ", ".join(sites[:_SHOWN])
        if len(sites) > _SHOWN:
            shown += f" and {len(sites) - _SHOWN} more sites"
        lines.append(f"{code}: {shown}")
    return lines


def describe_missing(started: int, missing: Mapping[str, str]) -> str:
    """Return a line about the sites that are missing at the start.

    Args:
        started: how many sites are there.
        missing: the others, with the reason; at least one.
    """
    named = ", ".join(f"{site} ({why})" for site, why in list(missing.items())[:_SHOWN_ROWS])
    if len(missing) > _SHOWN_ROWS:
        named += f" and {len(missing) - _SHOWN_ROWS} more (audit.jsonl has all)"
    return f"starting with {started} sites, without {named}; they may join in a later round"


def describe_rows(rows: Mapping[str, int], dominant: Sequence[str], weighting: str) -> list[str]:
    """Return a line with the rows of every site, and a warning where a few sites have most of them.

    Args:
        rows: of each site, by its hello; at least one site.
        dominant: sites that have far more rows than the others.
        weighting: how updates are weighted, `strategy.weighting`.
    """
    largest = sorted(rows, key=lambda site: (-rows[site], site))[:_SHOWN_ROWS]
    line = "rows: " + ", ".join(f"{site} {rows[site]:,}" for site in sorted(largest))
    if len(rows) > _SHOWN_ROWS:
        line += f" and {len(rows) - _SHOWN_ROWS} more sites with fewer (audit.jsonl has all)"
    lines = [line]
    if dominant:
        total = sum(rows.values())
        named = ", ".join(f"{site} ({rows[site] / total:.0%} of all rows)" for site in dominant[:_SHOWN])
        if len(dominant) > _SHOWN:
            named += f" and {len(dominant) - _SHOWN} more sites"
        lines.append(f"warning: far more rows than others, by their own count: {named}; {_EFFECTS[weighting]}")
    return lines
