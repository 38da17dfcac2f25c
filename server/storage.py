"""The run's folder: made once, locked while in use, written so that a crash leaves the old or the new, never half."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import StorageError

LEAST_FREE_BYTES = 64 * 2**20
"""A run is not started on a disk with less: a checkpoint that does not fit is found out too late."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it into place.

    Raises:
        StorageError: `disk-full` or `not-writable`; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
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
            temporary.unlink(missing_ok=True)  # on a full disk, what was written of it is in the way
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


@contextmanager
def run_folder(path: Path, *, resume: bool) -> Iterator[Path]:
    """Make the run's folder, or open an existing one to resume, and hold its lock inside a `with` block.

    Raises:
        StorageError: `run-exists`, `run-missing`, `locked`, `disk-full` or `not-writable`.
    """
    try:
        if resume and not (path / "config.toml").is_file():
            raise StorageError(f"no run in {path}", "a folder with config.toml", code="run-missing")
        if not resume and path.exists() and any(item.name != ".lock" for item in path.iterdir()):
            raise StorageError(
                f"{path} is there already",
                "a new folder for a new run",
                f"`tsugiki simulate --resume {path}` goes on with it; --set run.name=... starts another",
                code="run-exists",
            )
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < LEAST_FREE_BYTES:
            raise StorageError(
                f"{path}: {free // 2**20} MiB free", f"at least {LEAST_FREE_BYTES // 2**20} MiB", code="disk-full"
            )
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise unwritable(path, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{path} is in use by another process", "one process a run", code="locked") from None
        yield path


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it to the disk.

    Raises:
        StorageError: `disk-full` or `not-writable`.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a last line that a crash cut off is left out.

    Raises:
        StorageError: a line before the last is no JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").split("\n")
    complete = [line for line in lines[:-1] if line]  # what follows the last newline was cut off
    try:
        return [json.loads(line) for line in complete]
    except json.JSONDecodeError as error:
        raise StorageError(f"{path}: a line is no JSON", "one record a line", code="run-corrupt") from error
