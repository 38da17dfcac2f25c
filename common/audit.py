"""The audit log: append-only JSON lines, each with the hash of the one before it.

A changed, dropped or inserted line breaks the chain from there on; only the last lines can be cut off unseen. The
operator keeps one log for each run, and each site keeps its own. Logs contain codes, counts and hashes, never a site's
data.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tsugiki.common.errors import StorageError
from tsugiki.common.files import append_line, read_lines, write_atomically

_START = "0" * 64


class AuditLog:
    """Writes events to one file; an existing file is verified first and continued."""

    def __init__(self, path: Path) -> None:
        self._path = path
        records = verify(path)
        if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):  # a crash cut the last line off
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())
        self._last = records[-1]["hash"] if records else _START
        self._sequence = len(records)

    def write(self, event: str, **details: Any) -> None:
        """Append an event. Values are escaped as JSON, so that no value can forge a line."""
        record = {
            "sequence": self._sequence,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **details,
            "previous": self._last,
        }
        record["hash"] = _hash(record)
        append_line(self._path, record)
        self._last = record["hash"]
        self._sequence = self._sequence + 1


def verify(path: Path) -> list[dict[str, Any]]:
    """Return the events of an audit log, after checking the chain of hashes.

    Raises:
        StorageError: `audit-broken`, with the first line that does not follow from the one before it.
    """
    records = read_lines(path)
    previous = _START
    for number, record in enumerate(records):
        body = {key: value for key, value in record.items() if key != "hash"}
        linked = record.get("previous") == previous and record.get("sequence") == number
        if not linked or record.get("hash") != _hash(body):
            raise StorageError(f"line {number + 1} of {path} breaks the chain", "an untouched log", code="audit-broken")
        previous = record["hash"]
    return records


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
