"""Atomic file replacement, durable appends to JSON-lines files, and locks between processes.

Nothing is written through a link: somebody who can write into a run's folder could plant one that leads to a file of
the operator. Each file that a run or a site writes is opened here.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tsugiki.common.errors import StorageError

_LOCK_POLL_S = 0.01
"""How often a process that waits for a lock tries it again."""
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Flags to open a file with, where the system has them: not through a link, and without waiting for a pipe's reader."""
_LINKED = (errno.ELOOP, errno.EMLINK)
"""What systems answer to `O_NOFOLLOW` at a link."""


def open_new(path: Path, mode: int = 0o666) -> BinaryIO:
    """Create a file and open it for writing.

    Args:
        path: of the file.
        mode: its permissions, before the process's umask.

    Raises:
        FileExistsError: something is there already; a link counts, wherever it leads.
        OSError: the file cannot be created.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, mode), "wb")


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for writing at its end; create it if it is missing.

    Raises:
        StorageError: `linked`, the path is a link, a pipe or the like; `disk-full` or `not-writable`.
    """
    try:
        return os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
    except OSError as error:
        raise unwritable(path, error) from error


def cut_file(path: Path, size: int) -> None:
    """Cut a file to `size` bytes.

    Raises:
        StorageError: `linked`, `disk-full` or `not-writable`.
    """
    try:
        with os.fdopen(_open_own(path, os.O_WRONLY), "wb") as file:
            file.truncate(size)
    except OSError as error:
        raise unwritable(path, error) from error


def _open_own(path: Path, flags: int) -> int:
    """Return a descriptor of a plain file with one name.

    Raises:
        OSError: ELOOP, it is something else; or the system's error.
    """
    if path.is_symlink():  # for systems without `O_NOFOLLOW`
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    descriptor = os.open(path, flags | _NO_LINK, 0o666)
    found = os.fstat(descriptor)
    # a second name is a hard link: what is written here would change the file there
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return descriptor


def make_folder(path: Path, *, parents: bool = False) -> None:
    """Create a folder unless it is there. The folders above it may be links.

    Args:
        path: of the folder.
        parents: whether to create the folders above it too.

    Raises:
        StorageError: `linked`, the folder is a link; `disk-full` or `not-writable`.
    """
    try:
        refuse_link(path)
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def refuse_link(path: Path) -> None:
    """Check that a path is no symbolic link. There may be nothing at all.

    Raises:
        StorageError: `linked`.
    """
    if path.is_symlink():
        raise _linked(path)


def refuse_links_in(folder: Path) -> None:
    """Check that no member of a folder is a symbolic link.

    Raises:
        StorageError: `linked`, with the first of them.
        OSError: the folder cannot be read.
    """
    for member in sorted(folder.iterdir()):
        refuse_link(member)


def write_atomically(path: Path, *parts: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file beside its place, flush it to the disk, and rename it into place.

    Args:
        path: of the file.
        parts: of its content, written one after the other.
        mode: its permissions, before the process's umask.

    Raises:
        StorageError: `disk-full` or `not-writable`; an earlier file at this path is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a write that was interrupted, or a link that somebody has planted
        with open_new(temporary, mode) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)  # else the rename itself may be lost
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk, the unfinished file would take space
        raise unwritable(path, error) from error


def _flush_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk. No-op on Windows, which opens no folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> StorageError:
    """Return the error for a file that could not be written."""
    if error.errno in _LINKED:
        return _linked(path)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StorageError(
        f"cannot write {path}: {os.strerror(error.errno or 0)}",
        "a writable folder with free space",
        "free some space" if full else "check the folder and its permissions",
        code="disk-full" if full else "not-writable",
    )


def _linked(path: Path) -> StorageError:
    return StorageError(
        f"{path} is a link to another place",
        "plain files and folders, each with one name",
        "find out who made the link, and remove it",
        code="linked",
    )


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as strict JSON: infinity and NaN, which JSON does not have, are null."""
    return json.dumps(without_non_finite(value), indent=indent, allow_nan=False)


def without_non_finite(value: Any) -> Any:
    """Return a copy of a JSON value with None for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_non_finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(one) for one in value]
    return value


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it to the disk.

    Raises:
        StorageError: `linked`, `disk-full` or `not-writable`.
    """
    append_lines(path, [record])


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines and flush them to the disk once.

    Raises:
        StorageError: `linked`, `disk-full` or `not-writable`; some of the lines may be in the file.
    """
    try:
        is_new = not path.exists()
        with open_to_append(path) as file:
            file.writelines(to_json(record).encode() + b"\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _flush_folder(path.parent)  # else a crash may lose the file with its lines
    except OSError as error:
        raise unwritable(path, error) from error


def read_lines(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, without a last line that a crash cut off.

    Args:
        path: of the file; without a file there are no records.
        start: in bytes, the beginning of the first line to read.

    Raises:
        StorageError: `run-corrupt`, a line before the last is no JSON object in UTF-8.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")
    complete = [line for line in lines[:-1] if line]  # what follows the last newline was cut off
    records = [_object(line) for line in complete]
    whole = [record for record in records if record is not None]
    if len(whole) < len(records):
        raise StorageError(
            f"line {records.index(None) + 1} of what is read from {path} is no JSON object",
            "one JSON object a line, in UTF-8",
            "find out who changed the file; a backup of it can take its place",
            code="run-corrupt",
        )
    return whole


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that a run has written.

    Raises:
        StorageError: `run-corrupt`, the file is not JSON or holds no object.
    """
    content = _object(path.read_bytes())
    if content is None:
        raise StorageError(f"{path} is no JSON object", "the file as the run wrote it", code="run-corrupt")
    return content


def lock_of(path: Path) -> Path:
    """Return the path of the lock for a log that several processes append to."""
    return path.with_name(f".{path.name}.lock")


def _object(text: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a text; None: it is something else, or no JSON in UTF-8."""
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError):  # the latter from thousands of brackets
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file inside a `with` block, against other processes and other threads.

    The operating system releases the lock of a process that crashes. The file is empty and may stay.

    Args:
        path: path of the lock file, in an existing folder.
        wait: wait until the lock is free; False: raise an error if it is held.

    Raises:
        StorageError: `locked`, only without `wait`; `linked`, the file is a link; `disk-full` or `not-writable`, it
            cannot be created.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.stat()  # filelock would create a folder that has vanished, and with it a new, empty ledger or log
        refuse_link(path)
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
