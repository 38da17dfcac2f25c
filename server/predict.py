"""Predictions of a run's model, or of exported adapters, for texts or a file's rows: labels, scores, continuations."""

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
from tsugiki.common.files import without_non_finite
from tsugiki.common.model.device import computing
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
    """Return the predictions of a run's model: for each row, the task's values by name.

    Args:
        folder: the run's folder.
        texts: rows of one text each; for a task of images, paths of pictures.
        file: in place of texts, a file of rows in the run's own data format.
        generation: settings for continuing texts.
        which: the best adapter, or the adapter of the last checkpoint.
        adapter: whether to use the adapter; False uses the bare base, to compare.

    Raises:
        UsageError: neither texts nor a file are given, or both, or only a text for a task that needs more.
        StorageError: the run cannot be used.
        ExportError: `spec-mismatch`, the run's model cannot be loaded as it was.
        DataError: the file cannot be used.
        ModelError: the base model cannot be loaded.
    """
    config = read_config(folder)
    graft = open_graft(folder, config)
    rows = _rows(graft, config.data, texts, file)
    graft.write(choose(folder, config, graft, which).vector)
    switch = nullcontext() if adapter else graft.adapter_disabled()
    with computing(config.train, graft.device.type), switch:
        return graft.task.predict(graft.base, rows, generation)


def open_adapters(folders: Sequence[Path], source: str = "") -> list[Graft]:
    """Return a graft for each export, all on one base, whose tensors are in memory only once.

    The grafts may have different tasks, methods and heads. Each has its own modules around the shared frozen tensors.

    Args:
        folders: folders of exports that were trained on the same base.
        source: hub id, folder or `package:...` of the base; by default the first export's name for it, in the hub and
            its cache.

    Raises:
        ModelError: as `tsugiki.common.model.exported.open_exported`; `adapter-other-base`, the exports were trained on
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
    """Return the predictions of several exported adapters for each row.

    Args:
        folders: as in `open_adapters`.
        source: as in `open_adapters`.
        texts: rows of one text each.
        file: in place of texts, a file of rows; its columns have the tasks' own names, or `columns` maps them.
        generation: settings for continuing texts.
        columns: mapping of the file's columns, as "text=sentence, text_pair=2"; numbers count from 0.

    Returns:
        One dictionary for each row and adapter: `adapter`, its folder, and the task's values by name. The first row
        comes first, with all adapters in the order of `folders`.

    Raises:
        UsageError: as in `predict`, for one of the adapters; `columns` is not a mapping, or is given without a file.
        DataError: the file cannot be used.
        ModelError: as in `open_adapters`.
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
        # The usual hint names a run's settings, but exports have a command-line option instead.
        hint = f'say how the file calls them: --columns "{known[0]}=NAME IN THE FILE"'
        raise DataError(error.problem, error.expected, hint, code=error.code) from error
    answers = [graft.task.predict(graft.base, shard, generation) for graft, shard in zip(grafts, rows, strict=True)]
    # From one list for each adapter to one group for each row.
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
    """Predict as the command's arguments ask: with a run, named by the first word, or with exported adapters.

    Raises:
        UsageError: the arguments contradict each other.
        TsugikiError: as in `predict` and `predict_each`.
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
    """Return predictions as lines of JSON, or of bare values separated by tabs."""
    if as_json:
        return "".join(
            json.dumps(without_non_finite(answer), ensure_ascii=False, allow_nan=False) + "\n" for answer in found
        )
    return "".join("\t".join(map(_plain, answer.values())) + "\n" for answer in found)


def _plain(value: Any) -> str:
    """Return a value on one line; control characters, which a terminal would obey, are shown as escapes."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(value)
    )


def _pictures(names: Sequence[str]) -> images.Images:
    """Return the pictures in the named files.

    Raises:
        DataError: `shard-missing`, a file does not exist; or as in `images.decode`.
    """
    for number, name in enumerate(names, 1):
        if not os.path.isfile(name):  # Path.is_file would raise on a name that is too long
            raise DataError(
                f"picture {number} is no file here", "a PNG or JPEG", "check its path", code="shard-missing"
            )
    return images.decode("the given files", [Path(name) for name in names])


def _mapped(columns: str, known: Sequence[str]) -> DataFormat:
    """Return the format of a file whose columns are mapped as by a run's `[data] columns`.

    Raises:
        UsageError: `columns` is not a mapping, or maps a column that no task reads.
    """
    names = ", ".join(sorted(set(known)))
    try:
        form = DataFormat(columns=columns)  # type: ignore[arg-type]  # the type splits text
    except ValidationError as error:
        raise UsageError(
            f"--columns {columns!r} is no mapping", f'a mapping such as "text=sentence", for {names}'
        ) from error
    wrong = [name for name, column in form.columns.items() if name not in known or column == ""]
    if wrong:
        raise UsageError(f"--columns maps {wrong[0]!r} to nothing, or no task here reads it", f"some of {names}")
    return form


def _rows(graft: Graft, form: DataFormat, texts: Sequence[str], file: Path | None) -> Shard:
    """Return the rows to predict, from texts or from a file.

    Raises:
        UsageError: neither texts nor a file are given, or both, or the task cannot use the texts.
        DataError: the file or a picture cannot be used.
    """
    columns = graft.task.prediction_columns
    if not columns:
        return Shard({})  # the task cannot predict, and says so itself
    names = ", ".join(column.name for column in columns)
    if bool(texts) == (file is not None):
        if texts:
            raise UsageError("both texts and a file are given", "one of the two", "leave one out")
        raise UsageError("neither texts nor a file is given", "one of the two", "give --file FILE")
    if file is not None:
        kinds = columns
        if columns[0].kind == "image":  # the folders of pictures also name their classes
            kinds = graft.task.columns
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
