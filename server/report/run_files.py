"""Read a run's files and summarise them for the report."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.common.config.run import SITES
from tsugiki.common.errors import StorageError
from tsugiki.common.files import read_json, read_lines
from tsugiki.server.run.at_sites import means_of, worst
from tsugiki.server.run.replies import DROPOUTS
from tsugiki.server.run.so_far import summary_of
from tsugiki.server.run.storage import AUDIT_FILE

Line = dict[str, Any]
"""One line of metrics.jsonl."""

Curve = dict[int, float]
"""A value by round."""

REPLY_STATES = ("accepted", "rejected", "no reply")
"""Possible outcomes of a request to a site."""

_LARGEST = 1e12  # a site may report any finite loss; a larger one would flatten everything else in a figure


@dataclass(frozen=True)
class Run:
    """The files of a run's folder.

    Args:
        name: name of the run.
        lines: the lines of metrics.jsonl, voided attempts included.
        summary: summary.json, or what is known so far of a run that has not ended.
        spec: spec.json; empty if the file is missing.
        config: config.toml as text; empty if the file is missing.
        baselines: baselines.json; empty if the file is missing.
        audit: privacy_audit.json; empty if the file is missing, or an audit of another privacy plan.
    """

    name: str
    lines: tuple[Line, ...]
    summary: dict[str, Any]
    spec: dict[str, Any]
    config: str
    baselines: dict[str, Any]
    audit: dict[str, Any] = field(default_factory=dict)

    @property
    def lower_is_better(self) -> list[str]:
        """Metrics of which smaller values are better, according to the task."""
        return list(self.summary.get("lower_is_better", ["loss"]))

    @property
    def completed(self) -> list[Line]:
        """The lines that changed or measured the model: round 0 and every round that reached its quorum."""
        return [line for line in self.lines if not line.get("voided")]

    @property
    def attempts(self) -> list[Line]:
        """The lines of rounds in which sites were asked, voided attempts included."""
        return [line for line in self.lines if "cohort" in line]

    @property
    def monitor(self) -> str:
        """The metric by which the best adapter was chosen; it begins with `SITES` if it is a mean over sites."""
        return str(self.summary.get("monitor", ""))

    @property
    def metric(self) -> str:
        """That metric, by the task's name for it."""
        return self.monitor.removeprefix(SITES)

    @property
    def best_round(self) -> int | None:
        """The round that left the best adapter; None if nothing was evaluated."""
        return self.summary.get("best_round") if self.summary.get("after") else None


def read_run(folder: Path) -> Run:
    """Read the files of a run.

    Raises:
        StorageError: `run-missing`, there is no run, or it has not begun; `run-corrupt`, a file is not JSON.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise StorageError(
            f"there is no metrics.jsonl in {folder}",
            "the folder of a run that has begun",
            "start the run",
            code="run-missing",
        )
    summary = summary_of(folder)
    config = folder / "config.toml"
    return Run(
        str(summary.get("name", folder.name)),
        tuple(read_lines(folder / "metrics.jsonl")),
        summary,
        _read_if_there(folder / "spec.json"),
        _text(config) if config.is_file() else "",
        _read_if_there(folder / "baselines.json"),
        _audit_of(folder, summary),
    )


def _audit_of(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the audit of the run's privacy plan; empty without one."""
    audit = _read_if_there(folder / AUDIT_FILE)
    if audit.get("plan_sha256") != summary.get("privacy", {}).get("plan_sha256"):
        return {}
    return audit


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is no UTF-8", "the file as the run wrote it", code="run-corrupt") from error


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def drawable(value: Any) -> float:
    """Return the value as a float, or NaN, a gap in the figure, if no axis could show it."""
    if isinstance(value, int | float) and abs(value) < _LARGEST:
        return float(value)
    return math.nan


def curve(values: Iterable[tuple[int, Any]]) -> Curve:
    """Return the values by round; rounds with the value None are left out."""
    return {round_number: drawable(value) for round_number, value in values if value is not None}


def central_curves(run: Run) -> dict[str, Curve]:
    """Return the curve of every metric of the central evaluation, the one by which rounds are judged first."""
    lines = [(line["round"], line["eval"]) for line in run.completed if "eval" in line]
    names = dict.fromkeys(name for _, metrics in lines for name in metrics)
    return {
        name: curve((round_number, metrics.get(name)) for round_number, metrics in lines)
        for name in sorted(names, key=lambda name: name != run.metric)
    }


def mean_curve(run: Run, metric: str) -> Curve:
    """Return the curve of a metric's mean over the sites that evaluated the round."""
    return curve((line["round"], means_of(line).get(metric)) for line in run.completed)


def curves_by_site(lines: list[Line], key: str, metric: str) -> dict[str, Curve]:
    """Return each site's curve of `line[key][site][metric]`, by site name."""
    found = [(line["round"], line.get(key, {})) for line in lines]
    sites = sorted({site for _, entries in found for site in entries})
    return {
        site: curve((round_number, entries.get(site, {}).get(metric)) for round_number, entries in found)
        for site in sites
    }


def judged_line(run: Run) -> Line | None:
    """Return the line in which the sites evaluated the best adapter, else the last one in which they evaluated any."""
    judged = [line for line in run.completed if line.get("sites_eval")]
    if not judged:
        return None
    return next((line for line in judged if line["round"] == run.best_round), judged[-1])


def worst_site(
    values: Mapping[str, Mapping[str, Any]], monitor: str, lower_is_better: Collection[str] = ("loss",)
) -> tuple[str, str, float] | None:
    """Return (site, metric, value) of the site whose own evaluation is worst; None without any metric.

    Args:
        values: metrics by site.
        monitor: the metric to compare, if the sites have it; else the first that they have.
        lower_is_better: metrics of which the largest value is the worst.
    """
    names = {name for entry in values.values() for name in entry} - {"rows"}
    if not names:
        return None
    metric = monitor if monitor in names else min(names)
    having = {site: values[site][metric] for site in sorted(values) if values[site].get(metric) is not None}
    if not having:
        return None
    site = worst(having, metric in lower_is_better)
    return site, metric, having[site]


def bytes_by_round(run: Run) -> dict[str, Curve]:
    """Return the bytes sent to all sites (`down`) and received from them (`up`), voided attempts included."""
    layers: dict[str, Curve] = {"down": {}, "up": {}}
    for line in run.attempts:
        for name, layer in layers.items():
            layer[line["round"]] = layer.get(line["round"], 0) + line.get(f"bytes_{name}", 0)
    return layers


def seconds_by_round(run: Run) -> dict[str, Curve]:
    """Return the server's seconds by phase, in the order of a round, voided attempts included."""
    found = {phase for line in run.lines for phase in line.get("seconds", {})}
    # The known phases first, in their order in a round; then any others.
    known = [phase for phase in ("wait", "aggregate", "checkpoint", "evaluate") if phase in found]
    layers: dict[str, Curve] = {phase: {} for phase in known + sorted(found - set(known))}
    for line in run.lines:
        for phase, layer in layers.items():
            layer[line["round"]] = layer.get(line["round"], 0) + drawable(line.get("seconds", {}).get(phase, 0))
    return layers


def replies_by_site(run: Run) -> dict[str, dict[int, str]]:
    """Return the outcome of each request, by site and round; if a round was tried again, the last attempt counts."""
    sites = sorted({site for line in run.attempts for site in line["cohort"]})
    replies: dict[str, dict[int, str]] = {site: {} for site in sites}
    for line in run.attempts:
        for site in line["cohort"]:
            replies[site][line["round"]] = _reply_state(line, site)
    return replies


def _reply_state(line: Line, site: str) -> str:
    if site in line.get("accepted", {}):
        return "accepted"
    reason = line.get("rejected", {}).get(site, {}).get("reason", "silent")
    return "no reply" if reason in DROPOUTS else "rejected"


def count_replies(replies: Mapping[str, Mapping[int, str]]) -> dict[str, Curve]:
    """Return the number of sites in each state, by round."""
    rounds = sorted({round_number for states in replies.values() for round_number in states})
    counts: dict[str, Curve] = {state: dict.fromkeys(rounds, 0) for state in REPLY_STATES}
    for states in replies.values():
        for round_number, state in states.items():
            counts[state][round_number] += 1
    return counts


@dataclass(frozen=True)
class SiteSum:
    """One site over the whole run, voided attempts included.

    Args:
        name: name of the site.
        rows: rows of the last accepted reply; None if no reply was accepted.
        asked: number of requests.
        accepted: number of accepted replies.
        rejected: number of other replies by reason; missing replies count as `gone`, `slow` or `silent`.
        detail: the guard's words on the last rejection.
        mean_seconds: mean duration of local training, as the site reported it; None if no reply was accepted.
        last_loss: local training loss of the last accepted reply; None if no reply was accepted.
        bytes_up: bytes of accepted replies.
    """

    name: str
    rows: int | None
    asked: int
    accepted: int
    rejected: dict[str, int]
    detail: str
    mean_seconds: float | None
    last_loss: float | None
    bytes_up: int


def sum_sites(run: Run) -> list[SiteSum]:
    """Return the sums of every site that was asked, in the order of their names."""
    asked: dict[str, list[Line]] = {}
    for line in run.attempts:
        for site in line["cohort"]:
            asked.setdefault(site, []).append(line)
    return [_sum_site(site, asked[site]) for site in sorted(asked)]


def _sum_site(site: str, lines: list[Line]) -> SiteSum:
    accepted = [line["accepted"][site] for line in lines if site in line.get("accepted", {})]
    rejected = [line["rejected"][site] for line in lines if site in line.get("rejected", {})]
    reasons = [str(entry.get("reason", "")) for entry in rejected]
    last_accepted: Line = {}
    mean_seconds = None
    if accepted:
        last_accepted = accepted[-1]
        mean_seconds = sum(entry.get("seconds", 0.0) for entry in accepted) / len(accepted)
    return SiteSum(
        name=site,
        rows=last_accepted.get("rows"),
        asked=len(lines),
        accepted=len(accepted),
        rejected={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        detail=str(rejected[-1].get("detail", "")) if rejected else "",
        mean_seconds=mean_seconds,
        last_loss=last_accepted.get("loss"),
        bytes_up=sum(entry.get("bytes_up", 0) for entry in accepted),
    )


def baseline_metrics(run: Run) -> dict[str, dict[str, float]]:
    """Return the metrics of the run's baselines by label; local-only training counts as the mean over sites."""
    found: dict[str, dict[str, float]] = {}
    if "untouched" in run.baselines:
        found["untouched base"] = run.baselines["untouched"]
    if "linear_probe" in run.baselines:
        found["linear probe, all rows"] = run.baselines["linear_probe"]
    local = list(run.baselines.get("local", {}).values())
    if local:
        # A mean over sites needs metrics that every site has.
        shared = [metric for metric in local[0] if all(metric in entry for entry in local)]
        found["local-only, mean"] = {metric: sum(entry[metric] for entry in local) / len(local) for metric in shared}
    if "centralised" in run.baselines:
        found["centralised"] = run.baselines["centralised"]
    return found


def baseline_curves(run: Run, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return a metric of the baselines that were evaluated on the way, by label.

    Args:
        run: with its baselines.
        metric: its name.

    Returns:
        Pairs of a round of the federation, by which its sites together had seen as many samples, and the value.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for name, points in run.baselines.get("curves", {}).items():
        pairs = [(point["round"], point[metric]) for point in points if metric in point]
        if pairs:
            found[name] = pairs
    return found
