"""The anchors of a run's logs: each checkpoint holds their lengths and last hashes.

A resumed run refuses a log that has lost lines which the checkpoint remembers. A checkpoint anchors lines only that are
on the disk before it: the audit log up to its round, and metrics.jsonl up to the round before, whose line is written
after the checkpoint. So a crash between the writes leaves all of them consistent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsugiki.common.audit import Anchor, AuditLog, verify
from tsugiki.common.errors import Code, StorageError
from tsugiki.common.files import lock_of, locked

Anchors = Mapping[str, Mapping[str, Any]]
"""By log: "audit", "metrics" and, in a private run, "ledger"."""

AUDIT = "audit.jsonl"
METRICS = "metrics.jsonl"
_CODES: dict[str, Code] = {"audit": "audit-behind", "metrics": "metrics-behind", "ledger": "ledger-behind"}


class RunLogs:
    """The logs of a run that goes on: it reads only lines that are new since the last look.

    Args:
        folder: of the run.
        audit: the run's audit log.
        ledger: path of the clients' ledger; None: of a run without privacy.
    """

    def __init__(self, folder: Path, audit: AuditLog, ledger: Path | None) -> None:
        self._audit = audit
        self._metrics = _Growing(folder / METRICS)
        self._folder = folder
        self._ledger_path = ledger
        self._ledger: AuditLog | None = None
        self._last: Anchors = {}

    def anchors(self) -> dict[str, dict[str, Any]]:
        """Return the anchors of all logs, as they are now.

        Raises:
            StorageError: `audit-behind`, `metrics-behind` or `ledger-behind`, a log is shorter than at the last call;
                `audit-broken`, a line that was added does not continue its chain.
        """
        found = {"audit": asdict(self._audit.head()), "metrics": asdict(self._metrics.head())}
        if self._ledger_path is not None and self._ledger_path.exists():
            # The lock keeps out lines of other runs that are not on the disk yet.
            with locked(lock_of(self._ledger_path)):
                self._ledger = self._ledger or AuditLog(self._ledger_path)
                try:
                    found["ledger"] = asdict(self._ledger.head())
                except StorageError as error:
                    # A chain that is whole, but does not continue the known one, is that of another file.
                    AuditLog(self._ledger_path)
                    raise _behind(self._ledger_path, self._last["ledger"], "ledger-behind") from error
        for name, anchor in self._last.items():
            if name not in found or found[name]["lines"] < anchor["lines"]:
                raise _behind(self._path(name), anchor, _CODES[name])
        self._last = found
        return found

    def metrics(self) -> dict[str, Any]:
        """Return the anchor of metrics.jsonl."""
        return asdict(self._metrics.head())

    def _path(self, name: str) -> Path:
        if name == "ledger" and self._ledger_path is not None:
            return self._ledger_path
        return self._folder / f"{name}.jsonl"


class _Growing:
    """A file of lines without a chain: its anchor has the SHA-256 of all its bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        self._lines = 0
        self._sha256 = hashlib.sha256()

    def head(self) -> Anchor:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._size:  # it was cut, or is gone: it begins anew, with fewer lines than before
            self._size = 0
            self._lines = 0
            self._sha256 = hashlib.sha256()
        if size > self._size:
            with self._path.open("rb") as file:
                file.seek(self._size)
                new = file.read()
            self._size += len(new)
            self._lines += new.count(b"\n")
            self._sha256.update(new)
        return Anchor(self._lines, self._sha256.hexdigest())


def check_anchors(folder: Path, anchors: Anchors, ledger: Path | None) -> None:
    """Check that the logs of a run have all the lines that its checkpoint remembers.

    Args:
        folder: of the run.
        anchors: of the checkpoint; empty in one of an older version.
        ledger: path of the clients' ledger; None: of a run without privacy.

    Raises:
        StorageError: `audit-behind`, `metrics-behind` or `ledger-behind`; `audit-broken`, a chain is broken.
    """
    chained = {"audit": folder / AUDIT}
    if ledger is not None:
        chained["ledger"] = ledger
    for name, path in chained.items():
        if name in anchors and not Anchor(**anchors[name]).holds(verify(path)):
            raise _behind(path, anchors[name], _CODES[name])
    if "metrics" in anchors and not metrics_hold(folder, anchors["metrics"]):
        raise _behind(folder / METRICS, anchors["metrics"], "metrics-behind")


def check_finished(folder: Path, round_number: int) -> None:
    """Check metrics.jsonl of a finished run, whose last line no checkpoint remembers: the audit log's last event does.

    Args:
        folder: of the run.
        round_number: of the checkpoint.

    Raises:
        StorageError: `metrics-behind`.
    """
    events = verify(folder / AUDIT)
    last: dict[str, Any] = events[-1] if events else {}
    if last.get("event") != "finished" or last["round"] != round_number or "metrics" not in last:
        return
    if not metrics_hold(folder, last["metrics"]):
        raise _behind(folder / METRICS, last["metrics"], "metrics-behind")


def metrics_hold(folder: Path, anchor: Mapping[str, Any]) -> bool:
    """Return whether metrics.jsonl still begins with what it had at the time of an anchor."""
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    wanted = int(anchor["lines"])
    digest = hashlib.sha256(b"".join(lines[:wanted])).hexdigest()
    return len(lines) >= wanted and digest == str(anchor["hash"])


def _behind(path: Path, anchor: Mapping[str, Any], code: Code) -> StorageError:
    return StorageError(
        f"{path} does not have the first {anchor['lines']} lines that the checkpoint remembers",
        "the file as the run wrote it",
        "put the file back from a backup, or start a new run",
        code=code,
    )
