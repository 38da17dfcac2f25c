"""The updates of a round that are needed one by one: in memory while they are few, then in a file without a name."""

from __future__ import annotations

import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from tsugiki.common.files import unwritable
from tsugiki.common.strategies import WeightedUpdate
from tsugiki.common.wire.spec import Vector

HELD_BYTES = 64 * 2**20
"""Up to this many bytes of updates stay in memory."""

_NOTHING: Vector = np.zeros(0, np.float32)


class KeptUpdates:
    """The accepted updates of one attempt at a round.

    The file has no name in its folder, so the system removes it with the last use, also after a crash.

    Args:
        folder: of the run, for the file.
        size: of an update.
        held_bytes: more bytes than these go into the file.
    """

    def __init__(self, folder: Path, size: int, held_bytes: int = HELD_BYTES) -> None:
        self._folder = folder
        self._size = size
        self._held_bytes = held_bytes
        self._updates: list[WeightedUpdate] = []  # in the order of arrival; empty vectors once they are in the file
        self._file: IO[bytes] | None = None
        self.write_s = 0.0
        """Seconds spent on writing."""

    def add(self, one: WeightedUpdate) -> None:
        """Keep an update.

        Raises:
            StorageError: the file cannot be written.
        """
        self._updates.append(one)
        if self._file is None and 4 * self._size * len(self._updates) <= self._held_bytes:
            return
        started = time.perf_counter()
        try:
            self._write()
        except OSError as error:
            raise unwritable(self._folder, error) from error
        self.write_s += time.perf_counter() - started

    def _write(self) -> None:
        """Move the updates that are still in memory into the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # open as long as this object
            weakref.finalize(self, self._file.close)
        for number, one in enumerate(self._updates):
            if one.update.size:
                self._file.write(np.ascontiguousarray(one.update, np.float32).data)
                self._updates[number] = replace(one, update=_NOTHING)

    def updates(self) -> list[WeightedUpdate]:
        """Return the updates by site name; those in the file are mapped into memory, and read where they are used.

        Raises:
            StorageError: the file cannot be written.
        """
        found = self._updates
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise unwritable(self._folder, error) from error
            rows = np.memmap(self._file, np.float32, "r", shape=(len(found), self._size))
            found = [replace(one, update=np.asarray(row)) for one, row in zip(found, rows, strict=True)]
        return sorted(found, key=lambda one: one.site)
