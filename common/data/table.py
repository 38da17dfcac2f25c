"""Read the cells of a data file without interpreting them: CSV, TSV, JSONL, Parquet or plain text.

An error contains counts, line numbers and column names, never the content of a cell, because errors are logged. No
error is chained to a decoder's exception, which would contain the bytes that could not be decoded.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from tsugiki.common.errors import Code, DataError
from tsugiki.common.settings import DataFormat

MAX_LINE_BYTES = 2**20
"""The longest line, including its end. A line is in memory before anything about it is known."""

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


@dataclass(frozen=True)
class TableSpec:
    """A file and the columns to take from it: `sources` maps the task's name to the file's name or position."""

    path: Path
    sources: dict[str, str | int]
    optional: frozenset[str]
    data_format: DataFormat

    @property
    def ending(self) -> str:
        """The path's ending in lower case; it decides how the file is read."""
        return self.path.suffix.lower()


@dataclass(frozen=True)
class Table:
    """The wanted cells as the file has them, and the line (Parquet: the row) where each row begins, from 1."""

    request: TableSpec
    lines: Sequence[int] = field(repr=False)
    cells: dict[str, list[Any]] = field(repr=False)

    def refuse(self, name: str, bad: Sequence[bool], problem: str, expected: str, code: Code, hint: str = "") -> None:
        """Raise a DataError if any row is bad, with the number of bad rows and the place of the first."""
        if True in bad:
            where = f"{'row' if self.request.ending == '.parquet' else 'line'} {self.lines[bad.index(True)]}"
            counts = f"{sum(bad)} of {len(bad)} rows have {problem} in column {name!r}, the first in {where}"
            raise DataError(
                f"{self.request.path}: {counts}", expected, hint or "correct or remove these rows", code=code
            )


def load(target: Path, request: TableSpec) -> Table:
    """Read the file at `target`, the resolved `request.path`.

    Raises:
        DataError: with the code `shard-missing`, `shard-format`, `shard-columns`, `shard-encoding` or
            `shard-line-too-long`.
    """
    reader = _READERS.get(request.ending)
    if reader is None:
        raise DataError(f"the ending of {request.path} is not known", " or ".join(_READERS), code="shard-format")
    try:
        with target.open("rb") as file:
            return reader(file, request)
    except OSError as error:
        raise DataError(
            f"cannot read {request.path}: {error.strerror}", "a readable file", code="shard-missing"
        ) from error


def listed(names: Sequence[str]) -> str:
    """Return the first 20 names for a message, and the number of the others."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def class_numbers(labels: Sequence[str]) -> tuple[dict[str, int], str]:
    """Return the class number for each accepted label, and the accepted labels in words."""
    known = {label: index for index, label in enumerate(labels)}
    expected = f"one of the classes {listed(labels)}"
    if not any(label.removeprefix("-").isdecimal() for label in labels):  # else "1" might mean two classes
        known |= {str(index): index for index in range(len(labels))}
        expected += f", or a number from 0 to {len(labels) - 1}"
    return known, expected


def _positions(names: Sequence[str], request: TableSpec) -> dict[str, int]:
    """Return the position of each wanted column among the file's columns."""
    positions = {}
    missing = []
    for name, source in request.sources.items():
        found = [index for index, known in enumerate(names) if source in (index, known)]
        if len(found) > 1:
            raise DataError(
                f"{len(found)} columns of {request.path} are called {source!r}",
                "one such column",
                "rename one",
                code="shard-columns",
            )
        if found:
            positions[name] = found[0]
        elif name not in request.optional:
            missing.append(name)
    if missing:
        raise _missing_columns(names, missing, request)
    return positions


def _missing_columns(names: Sequence[str], missing: list[str], request: TableSpec) -> DataError:
    """Return an error that lists the file's columns, or counts them if their names may be a row of data."""
    sources = [f"{request.sources[name]!r} (for {name!r})" for name in missing]
    plain = all(_PLAIN_NAME.fullmatch(name) for name in names)
    if plain or list(names) == _numbers(len(names)):
        has = f"the columns {listed(names) or '(none)'}"
    else:
        has = f"{len(names)} columns, whose names are not repeated here because they may be data"
    return DataError(
        f"{request.path} has no column {' and no column '.join(sources)}; it has {has}",
        "the task's own names, or a mapping",
        f'map each under [data.columns], as in {missing[0]} = "NAME IN THE FILE"; for a CSV or TSV file without a '
        f"header set [data] header = false and give positions, as in {missing[0]} = 0",
        code="shard-columns",
    )


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the lines with their ends. Only a line feed ends a line: a text may contain any other separator."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}: line {number} is too long", f"at most {MAX_LINE_BYTES} bytes", code="shard-line-too-long"
            )
        text = None
        with suppress(UnicodeDecodeError):
            text = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode()
        if text is None:
            raise DataError(
                f"{path}: line {number} is not UTF-8", "UTF-8", "save the file as UTF-8", code="shard-encoding"
            )
        yield text


def _records(file: BinaryIO, request: TableSpec) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV or TSV file, each with the line where it begins; blank ones are skipped."""
    # The csv module's own limit, one for the whole process, is shorter than a line may be.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(
        _lines(file, request.path),
        delimiter="\t" if request.ending == ".tsv" else ",",
        quoting=csv.QUOTE_NONE if request.data_format.quoting == "none" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:  # its messages name separators, never text
        raise DataError(
            f"{request.path}: the record that begins in line {line} is broken: {error}",
            "quotation marks in pairs",
            'set [data] quoting = "none" if quotation marks are ordinary characters in this file',
            code="shard-format",
        ) from error


def _read_delimited(file: BinaryIO, request: TableSpec) -> Table:
    records = _records(file, request)
    first = next(records, None)
    if first is None:
        return Table(request, [], {})
    header = request.data_format.header
    names = [name.strip() for name in first[1]] if header else _numbers(len(first[1]))
    positions = _positions(names, request)
    lines: list[int] = []
    cells: dict[str, list[Any]] = {name: [] for name in positions}
    for line, record in records if header else chain([first], records):
        if len(record) != len(names):
            raise DataError(
                f"{request.path}: line {line} has {len(record)} fields",
                f"{len(names)}, as in line {first[0]}",
                "put a text that holds the separator into quotation marks",
                code="shard-format",
            )
        lines.append(line)
        for name, position in positions.items():
            cells[name].append(record[position])
    return Table(request, lines, cells)


def _read_jsonl(file: BinaryIO, request: TableSpec) -> Table:
    keys = {name: str(source) for name, source in request.sources.items()}
    names: dict[str, None] = {}
    lines: list[int] = []
    cells: dict[str, list[Any]] = {name: [] for name in keys}
    for line, text in enumerate(_lines(file, request.path), 1):
        if not text.strip():
            continue
        row: Any = None
        with suppress(ValueError, RecursionError):
            row = json.loads(text)
        if not isinstance(row, dict):
            raise DataError(
                f"{request.path}: line {line} is not a JSON object", "one JSON object a line", code="shard-format"
            )
        names.update(dict.fromkeys(row))
        lines.append(line)
        for name, key in keys.items():
            cells[name].append(row.get(key))
    if not lines:
        return Table(request, [], {})
    # Keys may differ between lines, so only now is it known which columns the file has.
    present = _positions(list(names), replace(request, sources=dict(keys)))
    return Table(request, lines, {name: cells[name] for name in present})


def _read_text(file: BinaryIO, request: TableSpec) -> Table:
    """Return one text per line, without blank lines, in the single column `text`."""
    positions = _positions(["text"], request)
    texts = {line: text.rstrip("\r\n") for line, text in enumerate(_lines(file, request.path), 1) if text.strip()}
    return Table(request, list(texts), {name: list(texts.values()) for name in positions})


def _read_parquet(file: BinaryIO, request: TableSpec) -> Table:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"pyarrow, which reads {request.path}, is not installed",
            "an installed pyarrow",
            "pip install pyarrow",
            code="shard-format",
        ) from error
    table = None
    with suppress(pyarrow.ArrowException, OSError):
        source = ParquetFile(file)
        names = source.schema_arrow.names
        positions = _positions(names, request)
        table = source.read(columns=[names[position] for position in positions.values()])
    if table is None:
        raise DataError(f"{request.path} is not a Parquet file, or damaged", "Parquet", code="shard-format")
    cells = {name: _arrow_cells(table.column(names[at]), name, request.path) for name, at in positions.items()}
    return Table(request, range(1, table.num_rows + 1), cells)


def _arrow_cells(column: Iterable[Any], name: str, path: Path) -> list[Any]:
    cells: list[Any] = []
    with suppress(ValueError):
        for scalar in column:  # one by one, so that the row that fails is known
            cells.append(scalar.as_py())
        return cells
    raise DataError(f"{path}: row {len(cells) + 1} of {name!r} does not decode", "UTF-8", code="shard-encoding")


_READERS: dict[str, Callable[[BinaryIO, TableSpec], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
