"""Put numbers in the place of the learning rates that a run leaves to the program ("auto")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.base import HEAD_RATES, BaseKind, scaled_rate
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ModelError
from tsugiki.common.model.find import find, find_offline
from tsugiki.common.tasks import TASKS

_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "dim")
"""Names of the hidden size in the files of different architectures."""

_DECODERS = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of architectures that continue texts."""


@dataclass(frozen=True)
class BaseShape:
    """What a default rate depends on.

    Args:
        kind: of the base.
        width: its hidden size; 0 if its config.json does not name it.
    """

    kind: BaseKind
    width: int


def with_rates(config: RunConfig, source: str) -> RunConfig:
    """Return the run with a number for each learning rate that is "auto"; the same object if none is.

    The numbers follow from the settings and the base's config.json alone, so that a resumed run finds the same.

    Args:
        config: of the run.
        source: hub id, folder or `package:...` behind the run's model name.

    Raises:
        ModelError: `model-not-found` or `model-format`, the base is not there; `model-load`, its config.json cannot
            be read.
    """
    if not _is_open(config):
        return config
    folder = find_offline(source) or find(source)  # a hub model that is loaded is in the cache
    return _resolved(config, shape_of(config, folder))


def with_known_rates(config: RunConfig) -> RunConfig:
    """Return the run as `with_rates`, or unchanged if its base is not on this machine. Nothing is fetched."""
    folder = find_offline(config.model.name)
    if folder is None or not _is_open(config):
        return config
    return _resolved(config, shape_of(config, folder))


def describe_rates(config: RunConfig, given: RunConfig) -> str:
    """Return a line about what "auto" took; empty if a number was set for the adapter's rate.

    Args:
        config: the run with numbers, from `with_rates`.
        given: the run before.
    """
    if given.train.learning_rate != "auto":
        return ""
    train = config.train
    why = f"{config.adapter.method}, {train.optimizer}, {config.task.name}"
    return f'train.learning_rate = {train.rate:g}, for the head {train.head_rate:g}: taken by "auto" for {why}'


def shape_of(config: RunConfig, folder: Path) -> BaseShape:
    """Return the kind and the width of a base, from its config.json and the task."""
    about = _read_config(folder)
    width = next((about[key] for key in _WIDTH_KEYS if isinstance(about.get(key), int)), 0)
    architectures = about.get("architectures") or []
    kind = TASKS.get(config.task.name).base_kind
    if kind is None:
        decodes = any(str(name).endswith(_DECODERS) for name in architectures)
        kind = "decoder" if decodes else "encoder"
    return BaseShape(kind, width)


def _is_open(config: RunConfig) -> bool:
    return "auto" in (config.train.learning_rate, config.train.head_learning_rate)


def _resolved(config: RunConfig, shape: BaseShape) -> RunConfig:
    train = config.train
    factor = TASKS.get(config.task.name).rate_factor
    rate = train.learning_rate
    head = train.head_learning_rate
    if head == "auto":
        # A rate that somebody chose was tried with the same rate for the head.
        head = rate
        if rate == "auto":
            head = scaled_rate(HEAD_RATES, train.optimizer, shape.kind, shape.width, factor)
    if rate == "auto":
        method = ADAPTERS.get(config.adapter.method)
        rate = method.default_rate(train.optimizer, shape.kind, shape.width, factor)
    return changed(config, {"train.learning_rate": rate, "train.head_learning_rate": head})


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Return the transformer's config.json, which sentence-transformers may keep in a folder of its own."""
    files = [folder / "config.json", *sorted(folder.glob("*/config.json"))]
    for file in files:
        if file.is_file():
            try:
                about = json.loads(file.read_text("utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ModelError(
                    f"the {file.name} of the model in {folder.name!r} cannot be read ({type(error).__name__})",
                    "JSON in UTF-8",
                    "fetch the model again, or choose another",
                    code="model-load",
                ) from error
            if isinstance(about, dict) and "model_type" in about:
                return about
    return {}
