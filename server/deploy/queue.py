"""Runs that follow each other on one SuperLink, whose sites stay connected: of a list of files, or of a folder's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tsugiki.common.config.files import read
from tsugiki.common.errors import Interrupted, TsugikiError, UsageError
from tsugiki.server.engines.grid import Stop

LOOK_S = 1.0
"""How often a folder is looked at."""
SETTLED_LOOKS = 2
"""A file is read if this many looks after the first have found it the same: before, somebody may be writing it."""

_Stamp = tuple[str, int, int]
"""Of a file: its name, when it was changed, in ns, and its size, in bytes. A changed file has another."""


def files_in(folder: Path, stop: Stop, announce: Callable[[str], None]) -> Iterator[Path]:
    """Yield the run files of a folder in the order of their names, and wait for more until the user stops.

    A file is yielded once, and once more whenever it was changed. Names that begin with a dot or do not end in .toml
    are left out.

    Args:
        folder: with the run files.
        stop: ends the wait.
        announce: called with a message for the operator each time that the wait begins.

    Raises:
        UsageError: the folder cannot be read.
    """
    done: set[_Stamp] = set()
    looks: dict[_Stamp, int] = {}
    waiting = False
    while not stop.requested:
        found = {stamp: path for path, stamp in _stamps(folder).items() if stamp not in done}
        looks = {stamp: looks.get(stamp, 0) + 1 for stamp in found}
        settled = [stamp for stamp in found if looks[stamp] > SETTLED_LOOKS]
        if settled:
            waiting = False
            done.add(min(settled))
            yield found[min(settled)]
            continue
        if not found and not waiting:
            waiting = True
            announce(f"waiting for run files in {folder}")
        try:
            stop.pause(LOOK_S)
        except Interrupted:
            return


def _stamps(folder: Path) -> dict[Path, _Stamp]:
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".toml" and not path.name.startswith(".")]
        states = {path: path.stat() for path in paths if path.is_file()}
    except FileNotFoundError:  # one was renamed or removed meanwhile, or the folder is not there
        if folder.is_dir():
            return {}
        raise UsageError(f"there is no folder {folder}", "a folder for run files", "make it") from None
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}", "a folder for run files") from error
    return {path: (path.name, state.st_mtime_ns, state.st_size) for path, state in states.items()}


def run_each(
    files: Iterable[Path], run: Callable[[Path], None], stop: Stop, announce: Callable[[str], None]
) -> list[TsugikiError]:
    """Run one file after the other; return the errors of those that failed. They are named, and do not end the queue.

    A run that is asked to stop by itself (`tsugiki runs stop`) is one of those.

    Args:
        files: of the runs.
        run: reads a file and executes its run.
        stop: ends the queue.
        announce: called with each message for the operator.

    Raises:
        TsugikiError: of the run in which the user stopped the queue, or the SuperLink ended.
    """
    errors = []
    for path in files:
        announce(f"queue: {path.name} begins")
        try:
            run(path)
        except TsugikiError as error:
            if stop.requested:
                raise
            notes = getattr(error, "__notes__", [])
            announce("\n".join([f"queue: {path.name}: {error.code}: {error}", *notes]))
            errors.append(error)
        else:
            announce(f"queue: {path.name} is done")
        if stop.requested:
            break
    return errors


def check_files(files: Iterable[Path], overrides: list[str]) -> None:
    """Check all files of a list before the first run, so that a mistake in the last one is not found days later.

    Raises:
        ConfigError: one of them has mistakes.
        UsageError: two of them have the same run.
    """
    folders: dict[Path, Path] = {}
    for path in files:
        config = read(path, overrides)
        folder = (Path(config.run.output_dir) / config.run.name).absolute()
        if folder in folders:
            raise UsageError(
                f"{folders[folder]} and {path} are both of the run {config.run.name!r}",
                "a run.name for each",
                "change one of them",
            )
        folders[folder] = path
