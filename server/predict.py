"""What a run's model, or exported adapters, make of texts or of a file's rows: labels, scores, continuations."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tsugiki.common.data import images
from tsugiki.common.data.shard import Shard, has_surrogates, read
from tsugiki.common.errors import DataError, UsageError
from tsugiki.common.model.exported import open_exported, read_exported
from tsugiki.common.model.find import find_in_hub
from tsugiki.common.model.graft import Graft
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks.base import Generation
from tsugiki.server.export.finished import Which, choose, open_graft, read_config


def predict(
    folder: Path,
    texts: Sequence[str],
    file: Path | None,
    generation: Generation,
    *,
    which: Which = "best",
    adapter: bool = True,
) -> list[dict[str, Any]]:
    """Return what a run's model makes of each row, by name.

    Args:
        folder: the run's.
        texts: rows, for a task that asks for one text; for images, files of pictures.
        file: or a file of rows, in the run's own data format.
        generation: texts are continued.
        which: the best adapter, or that of the last checkpoint.
        adapter: False for the bare base, to compare with.

    Raises:
        UsageError: neither texts nor a file, or both, or a text alone for a task that asks for more.
        StorageError: the run cannot be used.
        ExportError: `spec-mismatch`, its model cannot be loaded as it was.
        DataError: the file cannot be used.
        ModelError: the base model cannot be loaded.
    """
    config = read_config(folder)
    graft = open_graft(folder, config)
    rows = _rows(graft, config.data, texts, file)
    graft.write(choose(folder, config, graft, which).vector)
    with nullcontext() if adapter else graft.adapter_disabled():
        return graft.task.predict(graft.base, rows, generation)


def open_adapters(folders: Sequence[Path], source: str = "") -> list[Graft]:
    """Return a graft for each export, all on one base: memory holds its tensors once.

    Their tasks, methods and heads may differ; each has modules of its own around the frozen tensors that all share.

    Args:
        folders: of exports; all were trained on the same base.
        source: hub id, folder or `package:...` behind the base; by default the first export's name for it, in the
            hub and its cache.

    Raises:
        ModelError: as `tsugiki.common.model.exported.open_exported`; `adapter-other-base`, they were trained on
        different bases.
    """
    source = source or str(find_in_hub(read_exported(folders[0]).base_name))
    first = open_exported(folders[0], source)
    return [first, *(open_exported(folder, source, beside=first.base.transformer) for folder in folders[1:])]


def predict_each(
    folders: Sequence[Path],
    source: str,
    texts: Sequence[str],
    file: Path | None,
    generation: Generation,
    columns: str = "",
) -> list[dict[str, Any]]:
    """Return what each of several exported adapters makes of each row: `adapter`, its folder, and then the answer.

    Args:
        folders: as `open_adapters`.
        source: as `open_adapters`.
        texts: rows, for tasks that ask for one text.
        file: or a file of rows; its columns have the tasks' own names, or are mapped.
        generation: texts are continued.
        columns: maps the file's columns, as "text=sentence, text_pair=2"; numbers count from 0.

    Returns:
        The answers of all adapters to the first row, in the order of `folders`, then to the second, and so on.

    Raises:
        UsageError: as `predict`, for one of the adapters; `columns` is no mapping, or there is no file.
        DataError: the file cannot be used.
        ModelError: as `open_adapters`.
    """
    if columns and file is None:
        raise UsageError("--columns is given without --file", "a file whose columns they are", "give --file FILE")
    grafts = open_adapters(folders, source)
    known = [column.name for graft in grafts for column in graft.task.prediction_columns]
    form = _mapped(columns, known)
    try:
        rows = [_rows(graft, form, texts, file) for graft in grafts]
    except DataError as error:
        if error.code != "shard-columns":
            raise
        hint = f'say how the file calls them: --columns "{known[0]}=NAME IN THE FILE"'
        raise DataError(error.problem, error.expected, hint, code=error.code) from error
    answers = [graft.task.predict(graft.base, asked, generation) for graft, asked in zip(grafts, rows, strict=True)]
    return [
        {"adapter": str(folder), **answer}
        for row in zip(*answers, strict=True)
        for folder, answer in zip(folders, row, strict=True)
    ]


def ask(
    words: Sequence[str],
    adapters: Sequence[Path],
    source: str,
    file: Path | None,
    generation: Generation,
    *,
    which: Which,
    adapter: bool,
    columns: str = "",
) -> list[dict[str, Any]]:
    """Do what the command's words and options say: ask a run, which is the first word, or exported adapters.

    Raises:
        UsageError: they do not go together; and what `predict` and `predict_each` raise.
    """
    if not adapters:
        if source or columns:
            what = "--model" if source else "--columns"
            raise UsageError(
                f"{what} is given without --adapter", "a run, which knows its base and its data", "leave it out"
            )
        if not words:
            raise UsageError(
                "neither a run nor an adapter is given", "one of the two", "name the run's folder, or --adapter FOLDER"
            )
        return predict(Path(words[0]), words[1:], file, generation, which=which, adapter=adapter)
    if words and (Path(words[0]) / "config.toml").is_file():
        raise UsageError(
            f"both the run {words[0]} and --adapter are given", "one of the two", "export the run, and name its export"
        )
    if which != "best" or not adapter:
        raise UsageError("--which or --without-adapter is given with --adapter", "a run for these", "leave them out")
    return predict_each(adapters, source, words, file, generation, columns)


def show(found: Sequence[dict[str, Any]], as_json: bool) -> str:
    """Return predictions as lines: JSON, or the bare values."""
    if as_json:
        return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
    return "".join("\t".join(map(_plain, one.values())) + "\n" for one in found)


def _plain(value: Any) -> str:
    """Return a value on one line; what a terminal would obey is shown as an escape."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(value))


def _pictures(names: Sequence[str]) -> images.Images:
    """Return the pictures of files.

    Raises:
        DataError: `shard-missing`, a file is not there; and as `images.decode`.
    """
    for number, name in enumerate(names, 1):
        if not os.path.isfile(name):  # Path.is_file raises on too long a name
            raise DataError(
                f"picture {number} is no file here", "a PNG or JPEG", "check its path", code="shard-missing"
            )
    return images.decode("the given files", [Path(name) for name in names])


def _mapped(columns: str, known: Sequence[str]) -> DataFormat:
    """Return the form of a file whose columns are mapped as `[data] columns` of a run would be.

    Raises:
        UsageError: no task reads such a column, or it is no mapping.
    """
    names = ", ".join(sorted(set(known)))
    try:
        form = DataFormat(columns=columns)  # type: ignore[arg-type]  # the type splits text
    except ValidationError as error:
        raise UsageError(
            f"--columns {columns!r} is no mapping", f'a mapping such as "text=sentence", for {names}'
        ) from error
    if wrong := [name for name, column in form.columns.items() if name not in known or column == ""]:
        raise UsageError(f"--columns maps {wrong[0]!r} to nothing, or no task here reads it", f"some of {names}")
    return form


def _rows(graft: Graft, form: DataFormat, texts: Sequence[str], file: Path | None) -> Shard:
    columns = graft.task.prediction_columns
    if not columns:
        return Shard({})  # such a task refuses by itself
    names = ", ".join(column.name for column in columns)
    if bool(texts) == (file is not None):
        if texts:
            raise UsageError("both texts and a file are given", "one of the two", "leave one out")
        raise UsageError("neither texts nor a file is given", "one of the two", "give --file FILE")
    if file is not None:
        picture = columns[0].kind == "image"  # pictures lie in files and folders that have their classes
        kinds = graft.task.columns if picture else columns
        return read(file, kinds, form, labels=graft.task.labels, inside=Path(file.absolute().anchor))
    if columns[0].kind == "image":
        return Shard({columns[0].name: _pictures(texts)})
    wanted = [column for column in columns if column.required]
    if len(wanted) > 1:
        raise UsageError(
            f"a text alone is given, and {graft.task.name} reads {names}", "a file of them", "give --file FILE"
        )
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if empty:
        raise UsageError(f"text {empty[0]} is empty", "some text")
    broken = [number for number, text in enumerate(texts, 1) if has_surrogates(text)]
    if broken:
        raise UsageError(f"text {broken[0]} has bytes that are not UTF-8, or unpaired surrogates", "Unicode text")
    return Shard({wanted[0].name: list(texts)})
