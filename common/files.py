"""Atomic file replacement, durable appends to JSON-lines files, and locks between processes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tsugiki.common.errors import StorageError

_LOCK_POLL_S = 0.01
"""How often a process that waits for a lock tries it again."""


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file beside its place, flush it to the disk, and rename it into place.

    Args:
        path: of the file.
        parts: of its content, written one after the other.

    Raises:
        StorageError: `disk-full` or `not-writable`; an earlier file at this path is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else the rename itself may be lost
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk, the unfinished file would take space
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> StorageError:
    """Return the error for a file that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StorageError(
        f"cannot write {path}: {os.strerror(error.errno or 0)}",
        "a writable folder with free space",
        "free some space" if full else "check the folder and its permissions",
        code="disk-full" if full else "not-writable",
    )


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it to the disk.

    Raises:
        StorageError: `disk-full` or `not-writable`.
    """
    append_lines(path, [record])


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines and flush them to the disk once.

    Raises:
        StorageError: `disk-full` or `not-writable`; some of the lines may be in the file.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def read_lines(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, without a last line that a crash cut off.

    Args:
        path: of the file; without a file there are no records.
        start: in bytes, the beginning of the first line to read.

    Raises:
        StorageError: `run-corrupt`, a line before the last is not JSON, or holds no object.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8").split("\n")
    complete = [line for line in lines[:-1] if line]  # what follows the last newline was cut off
    try:
        records = [json.loads(line) for line in complete]
    except (json.JSONDecodeError, RecursionError) as error:
        raise StorageError(f"a line of {path} is no JSON", "one JSON record a line", code="run-corrupt") from error
    if not all(isinstance(record, dict) for record in records):
        raise StorageError(f"a line of {path} holds no record", "one JSON record a line", code="run-corrupt")
    return records


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that a run has written.

    Raises:
        StorageError: `run-corrupt`, the file is not JSON or holds no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} is no JSON", "the file as the run wrote it", code="run-corrupt") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} holds no object", "the file as the run wrote it", code="run-corrupt")
    return content


def lock_of(path: Path) -> Path:
    """Return the path of the lock for a log that several processes append to."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file inside a `with` block, against other processes and other threads.

    The operating system releases the lock of a process that crashes. The file is empty and may stay.

    Args:
        path: path of the lock file, in an existing folder.
        wait: wait until the lock is free; False: raise an error if it is held.

    Raises:
        StorageError: `locked`, only without `wait`; `disk-full` or `not-writable`, the file cannot be created.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.stat()  # filelock would create a folder that has vanished, and with it a new, empty ledger or log
        lock.acquire(timeout=-1 if wait else 0, poll_interval=_LOCK_POLL_S)
    except Timeout:
        raise StorageError(
            f"the folder {path.parent} is in use by another process", "one process at a time", code="locked"
        ) from None
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()
