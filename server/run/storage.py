"""The run's folder: created once, locked while in use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsugiki.common.errors import StorageError
from tsugiki.common.files import locked, make_folder, refuse_links_in, unwritable

LEAST_FREE_BYTES = 64 * 2**20
"""No run starts on a disk with less free space: else it would train, and then fail to write its checkpoint."""

AUDIT_FILE = "privacy_audit.json"
"""What `tsugiki audit privacy` writes into a run's folder, also before there is a run."""

_NO_RUN = {".lock", AUDIT_FILE}
"""Files that may be in a new run's folder. A start that failed early leaves a lock file behind."""


@contextmanager
def run_folder(path: Path, *, resume: bool) -> Iterator[Path]:
    """Create the run's folder, or open an existing one to resume, and hold its lock inside a `with` block.

    Raises:
        StorageError: `run-exists`, `run-missing`, `locked`, `linked`, `disk-full` or `not-writable`.
    """
    try:
        if resume and not (path / "config.toml").is_file():
            raise StorageError(f"there is no run in {path}", "a folder with config.toml", code="run-missing")
        if not resume and path.exists() and any(item.name not in _NO_RUN for item in path.iterdir()):
            raise StorageError(
                f"the folder {path} is there already",
                "a new folder for a new run",
                f"--resume {path} in place of the file, which goes on with it; or --set run.name=... for another run",
                code="run-exists",
            )
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
        yield path
