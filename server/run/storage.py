"""The run's folder: created once, locked while in use."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsugiki.common.errors import StorageError
from tsugiki.common.files import (
    locked,
    make_folder,
    open_to_append,
    read_lines,
    refuse_link,
    refuse_links_in,
    unwritable,
)

LEAST_FREE_BYTES = 64 * 2**20
"""No run starts on a disk with less free space: else it would train, and then fail to write its checkpoint."""

AUDIT_FILE = "privacy_audit.json"
"""What `tsugiki audit privacy` writes into a run's folder, also before there is a run."""

STOP_FILE = ".stop"
"""With this file in its folder a run is asked to stop."""

_NO_RUN = {".lock", AUDIT_FILE}
"""Files that may be in a new run's folder. A start that failed early leaves a lock file behind."""

_BEGUN = ("checkpoint/round-*", "metrics.jsonl", "spec.json")
"""What a run without a round leaves, and a new start writes again. Its logs, which only grow, stay."""


@contextmanager
def run_folder(path: Path, *, resume: bool) -> Iterator[Path]:
    """Create the run's folder, or open an existing one to resume, and hold its lock inside a `with` block.

    Raises:
        StorageError: `run-exists`, `run-missing`, `locked`, `linked`, `disk-full` or `not-writable`.
    """
    try:
        if resume and not (path / "config.toml").is_file():
            raise StorageError(f"there is no run in {path}", "a folder with config.toml", code="run-missing")
        if not resume:
            _check_free(path)
        make_folder(path, parents=True)
        refuse_links_in(path)
        free = shutil.disk_usage(path).free
        if free < LEAST_FREE_BYTES:
            raise StorageError(
                f"{path} has {free // 2**20} MiB free", f"at least {LEAST_FREE_BYTES // 2**20} MiB", code="disk-full"
            )
    except OSError as error:
        raise unwritable(path, error) from error
    with locked(path / ".lock", wait=False):
        if not resume:
            _check_free(path)  # again: another process may have had the lock
        yield path


def _check_free(path: Path) -> None:
    """Check that a new run may have a folder: it is not there, or holds a run of which no round was done.

    Raises:
        StorageError: `run-exists`.
        OSError: the folder cannot be read.
    """
    if not path.exists() or all(item.name in _NO_RUN for item in path.iterdir()):
        return
    if (path / "config.toml").is_file() and not is_begun(path):
        return
    raise StorageError(
        f"the folder {path} is there already",
        "a new folder for a new run",
        f"--resume {shlex.quote(str(path))} in place of the file, which goes on with it; or --set run.name=... for "
        "another run",
        code="run-exists",
    )


def is_begun(path: Path) -> bool:
    """Return whether a run has anything to lose: a round, a result, or a checkpoint of another version."""
    checkpoints = [file.name for file in (path / "checkpoint").glob("*.*")]
    rounds = any(not name.startswith("round-000000-") for name in checkpoints if not name.startswith("."))
    lines = any(line["round"] and not line.get("voided") for line in read_lines(path / "metrics.jsonl"))
    return rounds or lines or (path / "summary.json").exists()


def clear_start(path: Path) -> None:
    """Remove what a run of which no round was done has left, so that it can be started again.

    Raises:
        StorageError: `not-writable`.
    """
    try:
        for pattern in _BEGUN:
            for file in path.glob(pattern):
                file.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def is_running(path: Path) -> bool:
    """Return whether a process has a run's folder in use.

    Raises:
        StorageError: `linked` or `not-writable`, its lock cannot be looked at.
    """
    if not (path / ".lock").exists():
        return False
    try:
        with locked(path / ".lock", wait=False):
            return False
    except StorageError as error:
        if error.code != "locked":
            raise
        return True


def ask_to_stop(path: Path) -> None:
    """Ask the process that runs a run to stop at the next chance.

    Raises:
        StorageError: `not-writable`.
    """
    open_to_append(path / STOP_FILE).close()


def remove(path: Path) -> None:
    """Remove a run's folder with everything in it.

    Raises:
        StorageError: `locked`, the run is running; `linked`, the folder is a link; `not-writable`.
    """
    try:
        refuse_link(path)
        with locked(path / ".lock", wait=False):
            shutil.rmtree(path)
    except OSError as error:
        raise unwritable(path, error) from error
