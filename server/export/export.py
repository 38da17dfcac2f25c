"""Export a run's adapter for other libraries, and prove that they load it before it gets its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.pixels import PREPROCESSING
from tsugiki.common.errors import ExportError, StorageError
from tsugiki.common.files import read_lines, unwritable
from tsugiki.common.model.exported import is_hub_id, write_exported
from tsugiki.common.model.find import find
from tsugiki.common.model.graft import Graft
from tsugiki.common.tasks.pooling import head_apart
from tsugiki.server.export.card import (
    CLASSIFIER_MODULES,
    Export,
    Kind,
    card,
    is_sentence_transformer,
    loading_code,
    loads_itself,
    pools_for_classes,
)
from tsugiki.server.export.check import expect, prove
from tsugiki.server.export.finished import Which, choose, open_graft, read_config


def export(folder: Path, target: Path | None = None, *, which: Which = "best", merged: bool = False) -> Path:
    """Write a run's adapter in a form that other programs load, and return its folder.

    A fresh process first loads the export by its base's public name and compares its outputs with the run's own model.
    Only an export that passes gets its place.

    Args:
        folder: the run's folder.
        target: a new or empty folder; by default `adapter/`, or `merged/`, in the run's folder.
        which: the best adapter, or the adapter of the last checkpoint.
        merged: add the adapter to the base's weights and write a whole model.

    Raises:
        ExportError: `no-public-name`, `export-unsupported`, `merge-unsupported`, `spec-mismatch`, or a failed proof as
            in `tsugiki.server.export.check.prove`. Nothing is left behind.
        StorageError: the run's files or the target cannot be used.
        ModelError: the base model cannot be loaded.
    """
    config = read_config(folder)
    base_name = _public_name(config, merged)
    target = _empty(target or folder / ("merged" if merged else "adapter"))
    graft = open_graft(folder, config)
    chosen = choose(folder, config, graft, which)
    graft.write(chosen.vector)
    # The outputs to find again are computed first: merging changes the model.
    kind: Kind = "merged" if merged else graft.method.export_format
    base_folder = find(config.model.name)
    expected = expect(graft)
    code = loading_code(graft, config, kind, base_folder)
    lines = read_lines(folder / "metrics.jsonl")
    ended = (folder / "summary.json").is_file()
    made = Export(kind, code, base_name, base_folder, chosen.round, lines, expected.effect > 0, ended)
    with _built(target) as building:
        _write(graft, building, made, config.model.dtype)
        (building / "README.md").write_text(card(graft, config, made), "utf-8")
        _share(building)
        prove(building, made, graft, expected)
    return target


def _public_name(config: RunConfig, merged: bool) -> str:
    """Return the hub id that the export names as its base, or "" for a whole model without one.

    A folder of this machine is never named, because others do not have it.

    Raises:
        ExportError: `no-public-name`, an adapter has no hub id for its base.
    """
    name = config.model.exported_name
    public = is_hub_id(name) and (bool(config.model.public_name) or not Path(name).is_dir())
    if not public and not merged:
        raise ExportError(
            f"the run has no public name for its base: model.name = {config.model.name!r}, "
            f"model.public_name = {config.model.public_name!r}",
            'a hub id under which others find the base, as "org/model"',
            "set model.public_name in the run's config.toml, or use --merged, if the method can be merged",
            code="no-public-name",
        )
    return name if public else ""


def _empty(target: Path) -> Path:
    """Return the target as an absolute path, after checking that it is new or an empty folder.

    Raises:
        StorageError: `export-exists`, something is there.
    """
    target = target.absolute()
    empty_folder = target.is_dir() and not any(target.iterdir())
    if target.is_symlink() or (target.exists() and not empty_folder):
        raise StorageError(
            f"the folder {target} is there already",
            "a new or empty folder",
            "remove it, or export to another",
            code="export-exists",
        )
    return target


@contextmanager
def _built(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target. It becomes the target if the `with` block succeeds, and is removed if not."""
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as workshop:
            building = Path(workshop) / "export"
            building.mkdir()
            yield building
            building.rename(target)
    except OSError as error:
        raise unwritable(target, error) from error
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise StorageError(
            f"cannot write {target}: {error}", "a writable folder with free space", "free some space", code="disk-full"
        ) from error


def _write(graft: Graft, folder: Path, export: Export, dtype: str) -> None:
    """Write everything except the card. A head that only the loss uses is left out."""
    kind = export.kind
    transformer = graft.base.transformer
    # PEFT's file takes no head that sentence-transformers keeps in a module of its own.
    apart = kind == "peft" and pools_for_classes(graft)
    headless = graft.base.loss_heads and bool(graft.base.heads)
    written = graft.method.without_heads(transformer) if headless or apart else transformer
    if graft.base.tokenizer is not None and not is_sentence_transformer(graft):
        graft.base.tokenizer.save_pretrained(folder)
    if kind == "merged":
        _write_merged(graft, folder, graft.method.merge(written), export)
        return
    if kind == "peft" and is_sentence_transformer(graft):
        _write_modules(graft, folder, whole=loads_itself(graft, kind))
    graft.method.save(written, folder, export.base_name)
    write_exported(folder, graft, dtype, export.base_name, headless=headless, head_apart=apart)
    if kind == "peft":
        _sort(folder / "adapter_config.json")


def _write_merged(graft: Graft, folder: Path, merged: Any, export: Export) -> None:
    """Write a whole model around a merged transformer."""
    if not is_sentence_transformer(graft):
        merged.save_pretrained(folder)
        preprocessing = export.base_folder / PREPROCESSING
        if preprocessing.is_file():  # a model of images needs it, and does not save it
            (folder / PREPROCESSING).write_bytes(preprocessing.read_bytes())
        return
    # The library saves its whole network: put the merged transformer into it for as long as that takes.
    transformer = graft.base.transformer
    graft.task.put_in_place(graft.base, merged)
    try:
        with head_apart(graft.base.network):
            graft.base.network.save(str(folder), create_model_card=False)
    finally:
        graft.task.put_in_place(graft.base, transformer)


def _write_modules(graft: Graft, folder: Path, *, whole: bool) -> None:
    """Write what sentence-transformers has beside the transformer; the method itself writes the adapter.

    Args:
        graft: of the run.
        folder: of the export.
        whole: whether sentence-transformers will load the export by itself. If not, only a classifier's pooling and
            head are written, for the card's code.
    """
    network = graft.base.network
    transformer = graft.base.transformer
    with head_apart(network):
        if whole:
            transformer.save_pretrained = _nothing  # the method names the public base, not the one of this machine
            try:
                network.save(str(folder), create_model_card=False)
            finally:
                del transformer.save_pretrained
        elif pools_for_classes(graft):
            for place in CLASSIFIER_MODULES:
                number = int(place.partition("_")[0])
                (folder / place).mkdir()
                network[number].save(str(folder / place))


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _sort(path: Path) -> None:
    """Sort a PEFT configuration so that equal exports have equal bytes; peft writes sets in any order."""
    body = json.loads(path.read_bytes())
    body |= {key: sorted(body[key]) for key in ("target_modules", "feedforward_modules") if body.get(key)}
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", "utf-8")


def _share(folder: Path) -> None:
    """Give tensor files the card's permissions, because safetensors makes them readable by their owner only."""
    mode = (folder / "README.md").stat().st_mode
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)
