"""What an operator sees of the runs in a folder: their state, rounds, best metric, times and sites."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsugiki.common.audit import verify
from tsugiki.common.config.files import read
from tsugiki.common.errors import StorageError, TsugikiError
from tsugiki.common.files import read_lines
from tsugiki.server.run.so_far import summary_of
from tsugiki.server.run.storage import is_running


@dataclass(frozen=True)
class Listed:
    """A run as it is listed.

    Args:
        name: of its folder.
        state: "running"; why it ended, as in summary.json; "unfinished"; "no round"; or the code of an error, if its
            files cannot be read.
        rounds: that are done.
        planned_rounds: of its settings.
        monitor: the metric by which the best round is chosen.
        best: the value of that metric; None without a central evaluation.
        best_round: its round.
        begun: time of its first event, in UTC, ISO 8601; empty if there is none.
        last: time of its last event.
        sites: number of rounds in which each site had an accepted reply, by name.
    """

    name: str
    state: str
    rounds: int = 0
    planned_rounds: int = 0
    monitor: str = ""
    best: float | None = None
    best_round: int = 0
    begun: str = ""
    last: str = ""
    sites: dict[str, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the entries as plain values."""
        return asdict(self)


def list_runs(folder: Path) -> list[Listed]:
    """Return the runs in a folder, those that began last at the end.

    Raises:
        StorageError: `run-missing`, there is no such folder.
    """
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}", "the folder of runs (run.output_dir)", code="run-missing")
    runs = [look_at(path.parent) for path in folder.glob("*/config.toml")]
    return sorted(runs, key=lambda run: (run.begun, run.name))


def look_at(folder: Path) -> Listed:
    """Return one run. One whose files cannot be read is listed with the code of its error.

    Raises:
        StorageError: `run-missing`, there is no run in the folder.
    """
    if not (folder / "config.toml").is_file():
        raise StorageError(f"there is no run in {folder}", "a folder with config.toml", code="run-missing")
    try:
        return _read(folder)
    except TsugikiError as error:
        return Listed(folder.name, error.code)


def _read(folder: Path) -> Listed:
    config = read(folder / "config.toml")
    times = [str(event["time"]) for event in verify(folder / "audit.jsonl")]
    lines = [line for line in read_lines(folder / "metrics.jsonl") if not line.get("voided")]
    sites: dict[str, int] = {}
    for line in lines:
        for site in line.get("accepted", {}):
            sites[site] = sites.get(site, 0) + 1
    known: dict[str, Any] = {"planned_rounds": config.run.rounds, "monitor": config.monitor}
    if times:
        known |= {"begun": times[0], "last": times[-1]}
    running = is_running(folder)
    if not lines:
        return Listed(folder.name, "running" if running else "no round", **known)
    summary = summary_of(folder)
    best = (summary.get("after") or {}).get(config.monitor)
    evaluated = summary["rounds"] or not config.run.rounds
    state = str(summary["stopped"]) if evaluated else "no round"
    return Listed(
        folder.name,
        "running" if running else state,
        summary["rounds"],
        best=best,
        best_round=summary["best_round"],
        sites=dict(sorted(sites.items())),
        **known,
    )
