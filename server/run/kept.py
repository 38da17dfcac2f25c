"""What a server keeps outside its memory when it is large: updates that are needed one by one, and moments.

Such a file has no name in the run's folder, so the system removes it with the last use, also after a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.files import unwritable
from tsugiki.common.strategies import WeightedUpdate
from tsugiki.common.wire.spec import Vector, blocks

HELD_BYTES = 64 * 2**20
"""Up to this many bytes of updates stay in memory."""
LARGE_BYTES = 4 * 2**20
"""An adapter of more bytes than these is worth some care: its moments go into files, and freed memory is given back."""

_NOTHING: Vector = np.zeros(0, np.float32)


class KeptUpdates:
    """The accepted updates of one attempt at a round.

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

    def settle(self, weights: Mapping[str, int], factors: Mapping[str, float]) -> None:
        """Give the updates their weights, and scale some of them where they are. No update may be added afterwards.

        Args:
            weights: of each update, by site name.
            factors: by site name, of those that are scaled.

        Raises:
            StorageError: the file cannot be written.
        """
        for number, one in enumerate(self._updates):
            if one.site in factors:
                try:
                    self._scale(number, np.float32(factors[one.site]))
                except OSError as error:
                    raise unwritable(self._folder, error) from error
            self._updates[number] = replace(self._updates[number], weight=weights[one.site])

    def _scale(self, number: int, factor: np.float32) -> None:
        one = self._updates[number]
        if self._file is None:
            self._updates[number] = replace(one, update=one.update * factor)
            return
        for part in blocks(self._size):
            place = 4 * (number * self._size + part.start)
            self._file.seek(place)
            values = np.frombuffer(self._file.read(4 * (part.stop - part.start)), np.float32)
            self._file.seek(place)
            self._file.write((values * factor).data)

    def one_by_one(self) -> Iterator[WeightedUpdate]:
        """Yield the updates in the order of arrival; each is read from the file when its turn comes.

        Raises:
            StorageError: the file cannot be written.
        """
        self._flush()
        for number, one in enumerate(self._updates):
            if self._file is None:
                yield one
                continue
            self._file.seek(4 * number * self._size)
            yield replace(one, update=np.frombuffer(self._file.read(4 * self._size), np.float32))

    def updates(self) -> list[WeightedUpdate]:
        """Return the updates by site name; those in the file are mapped into memory, and read where they are used.

        Raises:
            StorageError: the file cannot be written.
        """
        self._flush()
        found = self._updates
        if self._file is not None:
            rows = np.memmap(self._file, np.float32, "r", shape=(len(found), self._size))
            found = [replace(one, update=np.asarray(row)) for one, row in zip(found, rows, strict=True)]
        return sorted(found, key=lambda one: one.site)

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error


class KeptMoment:
    """A moment of the strategy, written block by block in a round and read in the next one.

    Args:
        folder: of the run, for the file; None: it stays in memory.
        size: of the moment.
        held_bytes: a longer moment goes into the file.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, folder: Path | None, size: int, held_bytes: int = LARGE_BYTES) -> None:
        self._size = size
        self._blocks: list[Vector] = []
        self._file: IO[bytes] | None = None
        if folder is None or 4 * size <= held_bytes:
            return
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open until all of it is there
        except OSError as error:
            raise unwritable(folder, error) from error

    def add(self, block: npt.NDArray[Any]) -> None:
        """Add the next block.

        Raises:
            StorageError: the file cannot be written.
        """
        if self._file is None:
            self._blocks.append(np.array(block, np.float32))
            return
        try:
            self._file.write(np.ascontiguousarray(block, np.float32).data)
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def vector(self) -> Vector:
        """Return all of it, shape (size,). From the file it is mapped into memory, and read where it is used.

        Raises:
            StorageError: the file cannot be written.
        """
        if self._file is None:
            return np.concatenate(self._blocks)
        try:
            self._file.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error
        with self._file as file:  # the mapping stays when the file is closed
            return np.memmap(file, np.float32, "r", shape=(self._size,))


def let_go(vectors: Iterable[npt.NDArray[Any]]) -> None:
    """Let the system drop the mapped vectors among these from memory. They are read again where they are used."""
    for vector in vectors:
        if isinstance(vector, np.memmap):
            mapping: mmap.mmap = vector._mmap  # type: ignore[attr-defined]  # NumPy has no public name for it
            mapping.madvise(mmap.MADV_DONTNEED)


def give_back_memory(size: int) -> None:
    """Give freed memory back to the system, if the run's adapter has a large size, in numbers.

    glibc keeps up to 64 MiB of what was freed, which may be several adapters.
    """
    if 4 * size > LARGE_BYTES:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such function
        if trim is not None:
            trim(0)
