"""Read a site's private data file: return columns of checked values, or raise a coded error.

As in `common/data/table.py`, an error never repeats the content of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsugiki.common.data import images
from tsugiki.common.data.table import MAX_LINE_BYTES, Table, TableSpec, class_numbers, load
from tsugiki.common.errors import Code, DataError
from tsugiki.common.settings import DataFormat

if TYPE_CHECKING:
    import numpy.typing as npt

    from tsugiki.common.data.columns import Column


@dataclass(frozen=True)
class Shard:
    """The rows of a data file, column by column.

    Args:
        columns: one value per row, by the task's name of the column: text as str, label as int, score as float, an
            image as uint8 of shape (height, width) or (height, width, 3). Images of equal shape are one array.
        extra: columns that no task reads, as text; a simulation can split by them.
        notes: unusual but no error: `shard-one-class`, all rows have one class; `shard-images-mixed:COUNT`, COUNT
            images do not have the most common shape, and are brought to one size like all others.
    """

    columns: dict[str, Any] = field(repr=False)
    extra: dict[str, list[str]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Shard:
        """Return the given rows, in the given order, with the notes that apply to them."""
        columns = {name: _taken(values, rows) for name, values in self.columns.items()}
        extra = {name: [values[row] for row in rows] for name, values in self.extra.items()}
        return Shard(columns, extra, _notes(columns))


def _taken(values: Any, rows: Sequence[int] | npt.NDArray[np.int64]) -> Any:
    if isinstance(values, np.ndarray):
        return values[np.asarray(rows, np.int64)]
    return [values[row] for row in rows]


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
    """Read a CSV, TSV, JSONL, Parquet or text file in UTF-8, by its ending; for images see `images.read`.

    Args:
        path: the file.
        columns: what the task reads. An optional column is left out if it is neither in the file nor mapped by
            `data_format`.
        data_format: the file's names for the task's columns, and its form of CSV. In JSONL a number is a key.
        labels: the classes in order. A row's label is a class name, or a class number if no class name is a number.
        extra_columns: further columns to return as text, by their names in `data_format` or else in the file.
        min_rows: fewest rows of the file.
        inside: the folder that must contain the file after symlinks are followed; None: the path's own folder.

    Raises:
        DataError: with the code `shard-outside`, `shard-missing`, `shard-format`, `shard-encoding`,
            `shard-line-too-long`, `shard-columns`, `shard-empty`, `shard-too-small`, `shard-empty-text`,
            `shard-label-range` or `shard-score`; for images, the codes of `images.read`.
    """
    if any(column.kind == "image" for column in columns):
        return _read_images(path, columns, data_format, labels, extra_columns, min_rows, inside)
    sources = {name: data_format.columns.get(name, name) for name in (*(c.name for c in columns), *extra_columns)}
    # A column that the operator mapped or asked for must be there, even if the task can do without it.
    optional = {c.name for c in columns if not c.required} - set(extra_columns) - set(data_format.columns)
    table = load(_located(path, inside), TableSpec(path, sources, frozenset(optional), data_format))
    _refuse_few(path, len(table.lines), min_rows)
    values = {c.name: _values(c, table, labels) for c in columns if c.name in table.cells}
    return Shard(values, {name: _extra(name, table) for name in extra_columns}, _notes(values))


def _read_images(
    path: Path,
    columns: Sequence[Column],
    data_format: DataFormat,
    labels: Sequence[str],
    extra_columns: Sequence[str],
    min_rows: int,
    inside: Path | None,
) -> Shard:
    kinds = {column.kind: column.name for column in columns}
    if data_format.columns or extra_columns:
        raise DataError(
            f"the images in {path} have no columns to map or to split by",
            "images and their classes",
            "remove data.columns, and split by iid or dirichlet",
            code="shard-columns",
        )
    known, expected = class_numbers(labels)
    root = inside or path.parent
    pictures, classes = images.read(path, lambda one: _located(one, root, folders=True), known, expected)
    _refuse_few(path, len(classes), min_rows)
    values = {kinds["image"]: pictures, kinds["label"]: classes}
    return Shard(values, {}, _notes(values))


def _refuse_few(path: Path, rows: int, min_rows: int) -> None:
    least = max(min_rows, 1)
    if rows < least:
        code: Code = "shard-too-small" if rows else "shard-empty"
        raise DataError(f"only {rows} rows are in {path}", f"at least {least}", "add rows", code=code)


def _located(path: Path, inside: Path | None, folders: bool = False) -> Path:
    """Return the resolved path. The error for a path that leads outside does not reveal whether anything is there."""
    try:
        target = path.resolve()
        folder = (inside or path.parent).resolve()
        there = target.is_file() or (folders and target.is_dir())
    except (OSError, RuntimeError, ValueError) as error:  # no right to look, a loop of symlinks, a NUL in the name
        raise DataError(
            f"the path {path} cannot be followed", "a file", "correct the path", code="shard-missing"
        ) from error
    if not target.is_relative_to(folder):
        raise DataError(
            f"the path {path} leads out of {folder}",
            "a file in that folder",
            "copy the file there",
            code="shard-outside",
        )
    if not there:
        raise DataError(
            f"the file {path} does not exist, or is not a file", "a file", "correct the path", code="shard-missing"
        )
    return target


def _values(column: Column, table: Table, labels: Sequence[str]) -> list[Any]:
    if column.kind == "text":
        return _texts(column, table)
    return _classes(column.name, table, labels) if column.kind == "label" else _scores(column.name, table)


def _texts(column: Column, table: Table) -> list[str]:
    name = column.name
    most = f"at most {MAX_LINE_BYTES} characters"
    cells = [cell or "" for cell in table.cells[name]] if column.blank else table.cells[name]
    table.refuse(name, [not isinstance(c, str | None) for c in cells], "another type", "text", "shard-format")
    if not column.blank:
        table.refuse(name, [not (c and c.strip()) for c in cells], "no text", "text in every row", "shard-empty-text")
    table.refuse(name, [has_surrogates(c) for c in cells], "unpaired surrogates", "Unicode text", "shard-encoding")
    table.refuse(name, [len(c) > MAX_LINE_BYTES for c in cells], "too long a text", most, "shard-line-too-long")
    return cells


def has_surrogates(text: str) -> bool:
    """Return whether a text contains an unpaired surrogate, which JSON can spell but no tokenizer reads."""
    with suppress(UnicodeEncodeError):
        text.encode()
        return False
    return True


def _classes(name: str, table: Table, labels: Sequence[str]) -> list[int]:
    known, expected = class_numbers(labels)
    found = [known.get(str(cell).strip()) for cell in table.cells[name]]
    hint = "correct these rows, or list the classes under [task] labels"
    table.refuse(name, [index is None for index in found], "an unknown label", expected, "shard-label-range", hint)
    return [index for index in found if index is not None]


def _scores(name: str, table: Table) -> list[float]:
    found = [_score(cell) for cell in table.cells[name]]
    table.refuse(name, [math.isnan(score) for score in found], "no finite number", "a finite number", "shard-score")
    return found


def _score(cell: Any) -> float:
    """Return the cell as a float; NaN if it is not a finite number."""
    with suppress(TypeError, ValueError, OverflowError):
        score = math.nan if isinstance(cell, bool) else float(cell)
        return score if math.isfinite(score) else math.nan
    return math.nan


def _extra(name: str, table: Table) -> list[str]:
    texts = ["" if cell is None else str(cell) for cell in table.cells[name]]
    table.refuse(
        name, [has_surrogates(text) for text in texts], "unpaired surrogates", "Unicode text", "shard-encoding"
    )
    return texts


def _notes(columns: dict[str, Any]) -> tuple[str, ...]:
    """Return notes on labels (the only ints) that are all equal, and on images of mixed shapes."""
    single = any(len(cells) and isinstance(cells[0], int) and len(set(cells)) == 1 for cells in columns.values())
    pictures = [cells for cells in columns.values() if len(cells) and isinstance(cells[0], np.ndarray)]
    mixed = sum(map(images.odd, pictures))
    return ("shard-one-class",) * single + ((f"shard-images-mixed:{mixed}",) if mixed else ())
