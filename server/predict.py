"""What a run's model makes of texts, or of a file's rows: labels, scores, continuations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.data import images
from common.data.shard import Shard, has_surrogates, read
from common.errors import UsageError
from common.model import Graft
from common.tasks.generation import Generation
from server.finished import Which, choose, open_graft, read_config


def predict(
    folder: Path,
    texts: Sequence[str],
    file: Path | None,
    how: Generation,
    *,
    which: Which = "best",
    adapter: bool = True,
) -> list[dict[str, Any]]:
    """Return what a run's model makes of each row, by name.

    Args:
        folder: the run's.
        texts: rows, for a task that asks for one text; for images, files of pictures.
        file: or a file of rows, in the run's own data format.
        how: texts are continued.
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
    rows = _rows(graft, config, texts, file) if graft.task.asked else Shard({})  # a task that asks for none refuses
    graft.write(choose(folder, config, graft, which).vector)
    with nullcontext() if adapter else graft.untouched():
        return graft.task.predict(graft.base, rows, how)


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


def _rows(graft: Graft, config: RunConfig, texts: Sequence[str], file: Path | None) -> Shard:
    columns = graft.task.asked
    names = ", ".join(column.name for column in columns)
    if bool(texts) == (file is not None):
        raise UsageError("texts and a file" if texts else "neither texts nor a file", "one of both", "give --file FILE")
    if file is not None:
        picture = columns[0].kind == "image"  # pictures lie in files and folders that have their classes
        kinds = graft.task.columns if picture else columns
        return read(file, kinds, config.data, labels=graft.task.labels, inside=Path(file.absolute().anchor))
    if columns[0].kind == "image":
        return Shard({columns[0].name: images.decode(Path("."), [Path(text) for text in texts])})
    wanted = [column for column in columns if column.required]
    if len(wanted) > 1:
        raise UsageError(f"a text alone, where {graft.task.name} reads {names}", "a file of them", "give --file FILE")
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if empty:
        raise UsageError(f"text {empty[0]} is empty", "some text")
    broken = [number for number, text in enumerate(texts, 1) if has_surrogates(text)]
    if broken:
        raise UsageError(f"text {broken[0]} has bytes that are not UTF-8, or unpaired surrogates", "Unicode text")
    return Shard({wanted[0].name: list(texts)})
