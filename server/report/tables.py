"""The report's sentences and tables, as plain data. Nothing here is escaped: the page's template does that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich import filesize

from tsugiki.common.config.run import SITES
from tsugiki.server.report.run_files import (
    Line,
    Run,
    SiteSum,
    baseline_metrics,
    central_curves,
    drawable,
    judged_line,
    sum_sites,
)
from tsugiki.server.run.at_sites import means_of
from tsugiki.server.run.so_far import describe_unfinished

MOST_OPEN_ROWS = 30
"""A table with more rows is folded."""

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        head: names of the columns.
        rows: the rows, each with one cell for each column.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @cached_property  # the template asks for each cell, and a table may have a row for each of many sites
    def kinds(self) -> list[str]:
        """`number` or `text` for each column; columns of numbers are aligned to the right."""
        return ["number" if self._has_number(column) else "text" for column in range(len(self.head))]

    def _has_number(self, column: int) -> bool:
        return any(isinstance(row[column], int | float) for row in self.rows)


@dataclass(frozen=True)
class Block:
    """A table or a text.

    Args:
        table: the table, if this block has one.
        text: the text, if this block has no table; its line breaks are kept.
        folded_under: a title that the reader clicks on to see the block; empty: the block is open.
    """

    table: Table | None = None
    text: str = ""
    folded_under: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        heading: title above the part.
        note: a remark on the blocks; may be empty.
        blocks: the content.
    """

    heading: str
    note: str
    blocks: Sequence[Block]


def story(run: Run) -> list[str]:
    """Return the course of the run in sentences."""
    unfinished = describe_unfinished(run.summary)
    sentences = (
        f"{unfinished.capitalize()}." if unfinished else "",
        _training(run),
        _head_sums(run),
        _outcome(run),
        _worst_site(run),
        _voided(run),
        _traffic(run),
    )
    return [sentence for sentence in sentences if sentence]


def _training(run: Run) -> str:
    rounds = run.summary.get("rounds", 0)
    sites = len({site for line in run.attempts for site in line["cohort"]})
    what = f"{run.summary.get('method', 'an')} adapter for {run.summary.get('task', 'its task')}"
    if not rounds and not run.attempts and run.summary.get("stopped") == "finished":
        return f"Nothing was trained: the run evaluated the {what} that it started from."
    if not rounds:
        return f"No round was completed: the {what} is as it was before training."
    sentence = f"{_count(sites, 'site')} trained one {what} in {_count(rounds, 'round')}, "
    sentence += f"with {run.summary.get('strategy', 'the server')} averaging their updates"
    if run.summary.get("stopped") == "early":
        sentence += ", stopping before the rounds that were planned"
    return f"{sentence}."


def _outcome(run: Run) -> str:
    before = run.summary.get("before")
    after = run.summary.get("after")
    metric = run.monitor
    if not before or not after or metric not in before or metric not in after:
        return _no_change(run)
    start = before[metric]
    end = after[metric]
    rows, name = "the operator's held-out rows", metric
    if metric.startswith(SITES):
        sites = _count(len(run.summary["at_sites"]["compared"]), "site")
        rows, name = f"the own evaluation rows of {sites}, each with its weight in the mean,", run.metric
    if start is None or end is None:
        return f"On {rows} {name} is not a finite number."
    if not run.summary.get("rounds"):
        return f"{name} is {start:.4g} on {rows.rstrip(',')}."
    if run.best_round == 0:
        return f"No round was better than the start: {name} {start:.4g} on {rows.rstrip(',')}."
    since = f"after round {first}" if (first := run.summary.get("before_round")) else "before training"
    change = f"from {start:.4g} {since} to {end:.4g} ({end - start:+.3g})"
    return f"On {rows} {name} went {change}, best after round {run.best_round}."


def _no_change(run: Run) -> str:
    """Return why the page cannot say in one sentence whether the model became better."""
    if judged_line(run):
        return (
            f"No site measured {run.metric} both before training and after the best round, so there is no mean to "
            "compare; the sites' own evaluations are below."
        )
    return "There was no evaluation, so nothing here says whether the model became better."


def _worst_site(run: Run) -> str:
    worst = (run.summary.get("at_sites") or {}).get("worst")
    if not worst:
        return ""
    return f"The worst site is {worst['site']}: {worst['metric']} {worst['value']:.4g} on its own evaluation rows."


def _voided(run: Run) -> str:
    voided = len(run.lines) - len(run.completed)
    if not voided:
        return ""
    were = "attempt at a round was" if voided == 1 else "attempts at rounds were"
    return f"{voided} {were} voided, because too few replies were accepted; that left the model unchanged."


def _traffic(run: Run) -> str:
    numbers = f"{run.summary.get('adapter_parameters', 0):,} parameters"
    head = run.summary.get("head_parameters", 0)
    if head:
        numbers += f" and {head:,} of the task's head{_read_by_the_head(run)}"
    asked = sum(len(line["cohort"]) for line in run.attempts)
    if not asked and run.summary.get("stopped") == "finished":  # nothing came back
        return f"Only the adapter travelled: {numbers}, to each site that evaluated. The base model stayed frozen."
    # The mean over what was sent, or the size in the spec if nothing was.
    if asked:
        size_bytes = sum(line.get("bytes_down", 0) for line in run.attempts) / asked
    else:
        size_bytes = run.spec.get("size_bytes", 0)
    size = filesize.decimal(round(size_bytes))
    return (
        f"Only the adapter travelled: {numbers}, {size} to each site in a round, and as much back. The base model "
        "stayed frozen."
    )


def _head_sums(run: Run) -> str:
    first = next((line for line in run.completed if "warm_head" in line), None)
    if first is None:
        return ""
    sites = len(first["warm_head"]["sites"])
    size = filesize.decimal(round(first.get("bytes_up", 0) / sites))
    return (
        f"Before round 1, sums of the base's features over the rows of {_count(sites, 'site')} gave the head: round 0 "
        f"is their linear probe. For that each site sent {size} once, beside the adapter of the rounds."
    )


def _read_by_the_head(run: Run) -> str:
    """Return what a head reads if it pools by itself, as the end of a sentence about it."""
    reads = {
        "mean": " (it reads the mean of a text's hidden states)",
        "first": " (it reads the hidden state of a text's first token)",
    }
    return reads.get(run.summary.get("agreed", {}).get("pooling", ""), "")


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "s"
    return f"{number:,} {noun}{plural}"


def compared(run: Run) -> dict[str, dict[str, float]]:
    """Return the metrics of the federated adapter and of the baselines by label, ordered by how much data is shared."""
    rows = baseline_metrics(run)
    after = run.summary.get("after")
    if after:
        # the baselines are measured on the operator's rows
        central = {name: value for name, value in after.items() if not name.startswith(SITES)}
        rows[f"federated, round {run.best_round}"] = central
    order = ("untouched", "linear probe", "local-only", "federated", "centralised")

    def position(label: str) -> int:
        return next(index for index, start in enumerate(order) if label.startswith(start))

    return {label: rows[label] for label in sorted(rows, key=position)}


def sections(run: Run) -> list[Section]:
    """Return the sections below the figures; those without content are left out."""
    found = (_comparison(run), _sites(run), _rounds(run), _config(run), _fingerprints(run))
    return [section for section in found if section is not None]


def _comparison(run: Run) -> Section | None:
    rows = compared(run)
    if not run.baselines or not rows:
        return None
    metrics = list(dict.fromkeys(name for found in rows.values() for name in found))
    table = Table(["", *metrics], [[name, *map(found.get, metrics)] for name, found in rows.items()])
    blocks = [Block(table)]
    local = run.baselines.get("local", {})
    if local:
        blocks.append(Block(_by_site(local), folded_under="Each site alone"))
    own = run.baselines.get("own_rows", {})
    if own:
        rows = {f"{site}, {kind}": own[kind][site] for site in own["local"] for kind in own if site in own[kind]}
        blocks.append(Block(_by_site(rows), folded_under="On each site's own evaluation rows: alone, and federated"))
    note = (
        "All measured on the operator's held-out rows. Local-only: each site trained alone, and its own adapter was "
        "measured. Centralised: all rows in one place. "
        "Linear probe: a head in closed form on the frozen base's features of all rows."
    )
    rates = run.baselines.get("learning_rates", {})
    if rates:
        note += f" Learning rates: {', '.join(f'{name} {rate:.2g}' for name, rate in rates.items())}."
    return Section("Against the baselines", note, blocks)


def _sites(run: Run) -> Section | None:
    sites = sum_sites(run)
    if not sites:
        return None
    head = ["site", "rows", "asked", "accepted", "rejected", "why", "mean seconds", "last loss", "bytes up"]
    title = ""
    if len(sites) > MOST_OPEN_ROWS:
        title = _count(len(sites), "site")
    blocks = [Block(Table(head, [_site(site) for site in sites]), folded_under=title)]
    judged = judged_line(run)
    if judged:
        title = f"On each site's own evaluation rows, after round {judged['round']}"
        blocks.append(Block(_by_site(judged["sites_eval"]), folded_under=title))
    note = (
        "Rows, seconds and loss are what the sites report; rows never count for more than a site announced. "
        "Rejected includes requests without a reply (gone, slow or silent). Bytes are those of accepted updates."
    )
    return Section("Sites", note, blocks)


def _by_site(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each site and a column for each metric."""
    metrics = list(dict.fromkeys(name for entry in found.values() for name in entry))
    return Table(["site", *metrics], [[site, *map(found[site].get, metrics)] for site in sorted(found)])


def _site(site: SiteSum) -> list[Cell]:
    why = ", ".join(f"{reason} × {count}" for reason, count in site.rejected.items())  # noqa: RUF001  # a multiplication sign
    if site.detail:
        why += f" (last: {site.detail[:160]})"
    refused = sum(site.rejected.values())
    return [
        site.name, site.rows, site.asked, site.accepted, refused, why, site.mean_seconds, site.last_loss, site.bytes_up
    ]  # fmt: skip


def _rounds(run: Run) -> Section:
    """Return the numbers behind the figures."""
    metrics = list(central_curves(run))
    # Only runs with LoRA factors have an aggregation error; others need no column for it.
    lora = []
    if any("aggregation_error" in line for line in run.lines):
        lora = ["aggregation error"]
    at_sites = list(dict.fromkeys(name for line in run.completed for name in means_of(line)))
    means = [f"{SITES}{name}" for name in at_sites]
    head = ["round", "asked", "accepted", "training loss", *lora, *metrics, *means, "seconds", ""]
    rows: list[list[Cell]] = [
        [
            line["round"],
            len(line.get("cohort", ())),
            len(line.get("accepted", ())),
            line.get("train_loss"),
            *(line.get("aggregation_error") for _ in lora),
            *(line.get("eval", {}).get(metric) for metric in metrics),
            *map(means_of(line).get, at_sites),
            sum(map(drawable, line.get("seconds", {}).values())),
            _remark(run, line),
        ]
        for line in run.lines
    ]
    return Section("Rounds", "", [Block(Table(head, rows), folded_under="The numbers behind the figures")])


def _remark(run: Run, line: Line) -> str:
    if line.get("voided"):
        return "voided"
    return "best" if line["round"] == run.best_round else ""


def _config(run: Run) -> Section:
    text = run.config or "config.toml is missing."
    title = "config.toml, with every default filled in"
    return Section("Configuration", "", [Block(text=text, folded_under=title)])


def _fingerprints(run: Run) -> Section:
    rows: list[list[Cell]] = [
        ["base model (SHA-256 of its tensors)", run.summary.get("base_fingerprint")],
        ["adapter spec", run.spec.get("sha256")],
        ["adapter after the last round", run.summary.get("adapter_sha256")],
        ["best adapter", run.summary.get("best_sha256")],
        ["device and threads of the server", f"{run.summary.get('device', '?')}, {run.summary.get('threads', '?')}"],
    ]
    return Section("Fingerprints", "", [Block(Table(["of", "value"], rows))])


def cell_text(cell: Cell) -> str:
    """Return a cell as text; characters that could disguise their neighbours become question marks."""
    if cell is None:
        return "–"  # noqa: RUF001  # a dash for a missing value
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return "".join(letter if letter.isprintable() else "?" for letter in cell)
