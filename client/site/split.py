"""Write the simulated sites of a run as folders of real sites: the way from a simulation to a deployment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from tsugiki.client.site.simulated import simulated_sites
from tsugiki.common.config.files import with_absolute_paths
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data import images
from tsugiki.common.data.shard import Shard
from tsugiki.common.data.table import class_numbers
from tsugiki.common.errors import UsageError
from tsugiki.common.files import unwritable
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Task


def split(config: RunConfig, folder: Path) -> list[Path]:
    """Write rows and a site.toml of each simulated site into `folder`/NAME; return the paths of the site.toml files.

    A deployment of these sites trains as the simulation does: the rows are the same, in the same order.

    Args:
        config: a run with [simulation] data.
        folder: created if it does not exist.

    Raises:
        ConfigError, DataError: the file cannot be split as asked.
        UsageError: a site's folder exists already.
        StorageError: a folder cannot be written.
    """
    config = with_absolute_paths(config)  # as a server sends it
    task = TASKS.get(config.task.name)(config.task)
    names = [config.model.name, *config.task.models, *config.adapter.models]
    sites = simulated_sites(config)
    # Checked before the first folder is made, so that a refusal writes nothing.
    taken = [site.name for site in sites if (folder / site.name).exists()]
    if taken:
        raise UsageError(
            f"the file {folder / taken[0]} is there already", "a new folder for each site", "choose another one"
        )
    written = []
    for site in sites:
        place = folder / site.name
        data = {"train": site.train_shard(task)}
        if kept := site.evaluation_shard(task):
            data["evaluation"] = kept
        try:
            place.mkdir(parents=True)
            about: dict[str, Any] = {"name": site.name}
            if site.max_rank:
                about["max_rank"] = site.max_rank
            body: dict[str, Any] = {
                "site": about,
                "data": {name: _write(place, name, task, shard) for name, shard in data.items()},
                "models": {name: name for name in names if name},
            }
            (place / "site.toml").write_text(tomli_w.dumps(body), "utf-8")
        except OSError as error:
            raise unwritable(place, error) from error
        written.append(place / "site.toml")
    return written


def _write(place: Path, name: str, task: Task, shard: Shard) -> str:
    """Write a shard into a site's folder; return the file's name."""
    if any(column.kind == "image" for column in task.columns):
        return _write_images(place, name, task, shard)
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in _rows(task, shard))
    (place / f"{name}.jsonl").write_text(lines, "utf-8")
    return f"{name}.jsonl"


def _write_images(place: Path, name: str, task: Task, shard: Shard) -> str:
    """Write idx files, which keep the order of rows. They have the numbers of classes, not their names."""
    pictures = shard.columns["image"]
    classes = shard.columns["label"]
    # An idx file has one byte for each label.
    known, _ = class_numbers(task.labels)
    numbers = {known[str(number)]: number for number in range(256) if str(number) in known}
    if not isinstance(pictures, np.ndarray) or not numbers.keys() >= set(classes):
        raise UsageError(
            f"the images of {place.name} do not fit into an idx file",
            "images of one size, all grey or all coloured, of classes that have numbers up to 255",
            "bring them to one size, or copy each site's files by hand",
        )
    return images.write_idx(place, name, pictures, [numbers[index] for index in classes])


def _rows(task: Task, shard: Shard) -> Sequence[dict[str, Any]]:
    """Return a shard's rows as a file has them, with the names of classes."""
    columns = dict(shard.columns)
    for column in task.columns:
        if column.kind == "label" and column.name in columns:
            columns[column.name] = [task.labels[index] for index in columns[column.name]]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
