"""The audit log: append-only JSON lines, each with the hash of the one before it.

A changed, dropped or inserted line breaks the chain from there on. The chain alone does not show that its last lines
were cut off, or that the whole file is gone: for that, an `Anchor` in another file holds the length and the last hash
that the log once had. The operator keeps one log for each run, and each site keeps its own. Logs contain codes, counts
and hashes, never a site's data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tsugiki.common.errors import StorageError
from tsugiki.common.files import append_lines, cut_file, read_lines, unwritable, without_non_finite

_START = "0" * 64


@dataclass(frozen=True)
class Anchor:
    """The state of a log at some time, as another file remembers it.

    Args:
        lines: its number of lines.
        hash: of the last line; zeros if the log has none.
    """

    lines: int = 0
    hash: str = _START

    def holds(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether a log, whose chain is intact, still begins with what it had at that time."""
        if not 0 <= self.lines <= len(records):
            return False
        return not self.lines or records[self.lines - 1]["hash"] == self.hash


class AuditLog:
    """Writes events to one file; an existing file is verified first and continued.

    Each line is verified once, also where other processes append to the same file. They need a lock around `write`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = _START
        self._sequence = 0
        self._size = 0  # in bytes, of what is verified
        self._catch_up()

    def write(self, event: str, **details: Any) -> None:
        """Append an event, which is on the disk when this returns."""
        self.write_all([(event, details)])

    def write_all(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Append events with one flush to the disk for all of them.

        Values are escaped as JSON, so that no value can forge a line. Whatever depends on an event has to wait until
        this returns.
        """
        self._catch_up()
        records = []
        last = self._last
        for sequence, (event, details) in enumerate(events, self._sequence):
            record = {
                "sequence": sequence,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": event,
                **without_non_finite(details),  # the hash is over what is written
                "previous": last,
            }
            last = _hash(record)
            records.append({**record, "hash": last})
        append_lines(self._path, records)
        self._saw(records)
        self._last = last
        self._sequence += len(records)
        self._size = self._path.stat().st_size

    def head(self) -> Anchor:
        """Return the log's present length and last hash.

        Raises:
            StorageError: `audit-broken`, lines that were added do not continue the chain.
        """
        self._catch_up()
        return Anchor(self._sequence, self._last)

    def _saw(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Called with all records in their order, as they are verified or written."""

    def _forgot(self) -> None:
        """Called when the file has become shorter: its records come again, from the first."""

    def _catch_up(self) -> None:
        """Verify the lines that the file has had since the last look."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            size = 0
        # an operator has moved the log away, or cut it off
        if size < self._size:
            self._last = _START
            self._sequence = 0
            self._size = 0
            self._forgot()
        if size == self._size:
            return
        records = read_lines(self._path, self._size)
        _check(self._path, records, self._sequence, self._last)
        self._saw(records)
        if records:
            self._last = records[-1]["hash"]
        self._sequence += len(records)
        self._size = _cut_to_whole_lines(self._path)


def verify(path: Path) -> list[dict[str, Any]]:
    """Return the events of an audit log, after checking the chain of hashes.

    Raises:
        StorageError: `audit-broken`, with the first line that does not follow from the one before it.
    """
    records = read_lines(path)
    _check(path, records, 0, _START)
    return records


def _check(path: Path, records: list[dict[str, Any]], first: int, previous: str) -> None:
    """Check that records continue a chain.

    Args:
        path: of the log.
        records: of the log.
        first: the sequence number that the first of them must have.
        previous: the hash of the record before them.
    """
    for number, record in enumerate(records, first):
        body = {key: value for key, value in record.items() if key != "hash"}
        linked = record.get("previous") == previous and record.get("sequence") == number
        if not linked or record.get("hash") != _hash(body):
            raise StorageError(f"line {number + 1} of {path} breaks the chain", "an untouched log", code="audit-broken")
        previous = record["hash"]


def _cut_to_whole_lines(path: Path) -> int:
    """Remove a last line that a crash cut off: the next one would be glued to it. Return the file's size in bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unwritable(path, error) from error
    size = content.rfind(b"\n") + 1
    if size < len(content):
        cut_file(path, size)
    return size


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
