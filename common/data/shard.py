"""A site's private data file: columns of checked values, or a coded refusal.

As in `common.data.table`, an error never repeats the content of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.table import MAX_LINE_BYTES, Request, Table, listed, load
from common.errors import DataError
from common.settings import DataFormat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from common.tasks.base import Column


@dataclass(frozen=True)
class Shard:
    """The rows of a data file, column by column.

    Args:
        columns: the task's name of a column -> one value a row: text as str, label as int, score as float.
        extra: columns that no task reads, as text: what a simulation splits by.
        notes: what is unusual but no error: `shard-one-class`.
    """

    columns: dict[str, list[Any]] = field(repr=False)
    extra: dict[str, list[str]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Shard:
        """Return the given rows, in the given order, with the notes that hold for them."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        extra = {name: [values[row] for row in rows] for name, values in self.extra.items()}
        return Shard(columns, extra, _notes(columns))


def read(
    path: Path,
    columns: Sequence[Column],
    data_format: DataFormat,
    *,
    labels: Sequence[str] = (),
    extra_columns: Sequence[str] = (),
    min_rows: int = 1,
    inside: Path | None = None,
) -> Shard:
    """Read a CSV, TSV, JSONL or Parquet file, by its ending, in UTF-8.

    Args:
        path: the file.
        columns: what the task reads. A column that is not required, is not in the file and is not mapped by
            `data_format` is left out.
        data_format: how the task's columns are called in the file, and how CSV is written. In JSONL a number is a key.
        labels: the classes in order. A label is a class's name, or its number where no class has a number for a name.
        extra_columns: further columns to return as text, by their names in `data_format` or else in the file.
        min_rows: the least number of rows.
        inside: the folder that the file, symlinks followed, must be in; None: its own.

    Raises:
        DataError: with the code `shard-outside`, `shard-missing`, `shard-format`, `shard-encoding`,
            `shard-line-too-long`, `shard-columns`, `shard-empty`, `shard-too-small`, `shard-empty-text`,
            `shard-label-range` or `shard-score`.
    """
    sources = {name: data_format.columns.get(name, name) for name in (*(c.name for c in columns), *extra_columns)}
    optional = {c.name for c in columns if not c.required} - set(extra_columns) - set(data_format.columns)
    table = load(_located(path, inside), Request(path, sources, frozenset(optional), data_format))
    least, rows = max(min_rows, 1), len(table.lines)
    if rows < least:
        code = "shard-too-small" if rows else "shard-empty"
        raise DataError(f"{path} has {rows} rows", f"at least {least}", "add rows", code=code)
    values = {c.name: _values(c, table, labels) for c in columns if c.name in table.cells}
    return Shard(values, {name: _extra(name, table) for name in extra_columns}, _notes(values))


def _located(path: Path, inside: Path | None) -> Path:
    """Return the file behind `path`. Of a path that leads outside it is not told whether there is one."""
    try:
        target, folder = path.resolve(), (inside or path.parent).resolve()
        is_file = target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, a loop of symlinks, a NUL in the name
        raise DataError(f"{path} cannot be followed", "a file", "correct the path", code="shard-missing") from error
    if not target.is_relative_to(folder):
        raise DataError(
            f"{path} leads out of {folder}", "a file in that folder", "copy the file there", code="shard-outside"
        )
    if not is_file:
        raise DataError(f"{path} does not exist or is not a file", "a file", "correct the path", code="shard-missing")
    return target


def _values(column: Column, table: Table, labels: Sequence[str]) -> list[Any]:
    if column.kind == "text":
        return _texts(column.name, table)
    return _classes(column.name, table, labels) if column.kind == "label" else _scores(column.name, table)


def _texts(name: str, table: Table) -> list[str]:
    cells, most = table.cells[name], f"at most {MAX_LINE_BYTES} characters"
    table.refuse(name, [not isinstance(c, str | None) for c in cells], "another type", "text", "shard-format")
    table.refuse(name, [not (c and c.strip()) for c in cells], "no text", "text in every row", "shard-empty-text")
    table.refuse(name, [_has_surrogates(c) for c in cells], "unpaired surrogates", "Unicode text", "shard-encoding")
    table.refuse(name, [len(c) > MAX_LINE_BYTES for c in cells], "too long a text", most, "shard-line-too-long")
    return cells


def _has_surrogates(text: str) -> bool:
    with suppress(UnicodeEncodeError):
        text.encode()
        return False
    return True


def _classes(name: str, table: Table, labels: Sequence[str]) -> list[int]:
    known = {label: index for index, label in enumerate(labels)}
    expected = f"one of the classes {listed(labels)}"
    if not any(label.removeprefix("-").isdecimal() for label in labels):  # else "1" might mean two classes
        known |= {str(index): index for index in range(len(labels))}
        expected += f", or a number from 0 to {len(labels) - 1}"
    found = [known.get(str(cell).strip()) for cell in table.cells[name]]
    do = "correct these rows, or list the classes under [task] labels"
    table.refuse(name, [index is None for index in found], "an unknown label", expected, "shard-label-range", do)
    return [index for index in found if index is not None]


def _scores(name: str, table: Table) -> list[float]:
    found = [_score(cell) for cell in table.cells[name]]
    table.refuse(name, [math.isnan(score) for score in found], "no finite number", "a finite number", "shard-score")
    return found


def _score(cell: Any) -> float:
    """Return the cell as a float; NaN for whatever is none."""
    with suppress(TypeError, ValueError, OverflowError):
        score = math.nan if isinstance(cell, bool) else float(cell)
        return score if math.isfinite(score) else math.nan
    return math.nan


def _extra(name: str, table: Table) -> list[str]:
    texts = ["" if cell is None else str(cell) for cell in table.cells[name]]
    table.refuse(
        name, [_has_surrogates(text) for text in texts], "unpaired surrogates", "Unicode text", "shard-encoding"
    )
    return texts


def _notes(columns: dict[str, list[Any]]) -> tuple[str, ...]:
    """Return `shard-one-class` if a column of labels, which are the only ints, has a single value."""
    single = any(values and isinstance(values[0], int) and len(set(values)) == 1 for values in columns.values())
    return ("shard-one-class",) if single else ()
