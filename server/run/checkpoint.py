"""Checkpoints: everything that the next round depends on, in files that are either whole or refused.

`checkpoint/` holds the tensors of the last two rounds as safetensors, `current.json`, which names the newest and has
its hash, and `previous.json`. The manifest is renamed into place last: that is the moment at which a round is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import StorageError
from tsugiki.common.files import unwritable, write_atomically
from tsugiki.common.wire.spec import Vector

FORMAT_VERSION = 2


@dataclass(frozen=True)
class State:
    """A run between two rounds.

    Args:
        vector: the adapter, shape (size,).
        round: rounds done.
        evaluated_round: the last round whose evaluation is included in what follows.
        best_vector: the best adapter so far; the first one until something was evaluated.
        best_metric: its metric; None until something was evaluated.
        best_round: its round.
        evaluations_since_best: counts towards early stopping.
        strategy: the strategy's moments.
        record: the last round's line for metrics.jsonl, without its evaluation; empty once the line is written.
        plan: the privacy plan that the run is bound to; None for a run without privacy.
    """

    vector: Vector
    best_vector: Vector
    round: int = 0
    evaluated_round: int = -1
    best_metric: float | None = None
    best_round: int = 0
    evaluations_since_best: int = 0
    strategy: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None


def save(folder: Path, state: State, config_sha256: str, spec_sha256: str) -> None:
    """Write a checkpoint. The checkpoint of the round before is kept until the next one.

    Raises:
        StorageError: it cannot be written. The previous checkpoint is whole.
    """
    from safetensors.numpy import save as to_bytes

    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:  # the run's folder is gone, or read-only
        raise unwritable(folder, error) from error
    tensors = {"vector": state.vector, "best_vector": state.best_vector}
    tensors |= {f"strategy.{name}": np.asarray(value) for name, value in state.strategy.items()}
    content = to_bytes(tensors)
    name = f"round-{state.round:06d}-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    write_atomically(folder / name, content)
    body = {
        "format": FORMAT_VERSION,
        "tensors": name,
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
        "config_sha256": config_sha256,
        "spec_sha256": spec_sha256,
        **{name: getattr(state, name) for name in _PLAIN},
    }
    body["sha256"] = _hash(body)
    # a second checkpoint of a round replaces the first; the round before it stays the previous one
    current = folder / "current.json"
    if current.exists() and _read_manifest(current)["round"] != state.round:
        write_atomically(folder / "previous.json", current.read_bytes())
    # last, because the tensors must be there when the manifest names them
    write_atomically(current, json.dumps(body, indent=1).encode())
    _remove_unnamed(folder)


_PLAIN = ("round", "evaluated_round", "best_metric", "best_round", "evaluations_since_best", "record", "plan")


def load(folder: Path, config_sha256: str, spec_sha256: str) -> State:
    """Return the state in the newest checkpoint.

    Args:
        folder: the run's `checkpoint/`.
        config_sha256: hash of the settings of the run that resumes.
        spec_sha256: hash of its adapter spec.

    Raises:
        StorageError: `checkpoint-missing`, `checkpoint-corrupt`, `checkpoint-foreign`, `checkpoint-newer` or
            `checkpoint-older`, with the file and the field.
    """
    manifest = folder / "current.json"
    body = _read_manifest(manifest)
    for name, wanted in (("config_sha256", config_sha256), ("spec_sha256", spec_sha256)):
        if body[name] != wanted:
            raise StorageError(
                f"{manifest}: {name} is {body[name][:12]}",
                f"{wanted[:12]}, of this run",
                "resume with the settings and the base model that the run was started with",
                code="checkpoint-foreign",
            )
    tensors = _read_tensors(folder / body["tensors"], body["tensors_sha256"], manifest)
    strategy = {name.removeprefix("strategy."): tensors[name] for name in tensors if name.startswith("strategy.")}
    plain = {name: body[name] for name in _PLAIN}
    return State(tensors["vector"], tensors["best_vector"], **plain, strategy=strategy)


def promote_previous(folder: Path) -> None:
    """Replace the newest checkpoint, which is damaged, by the one before it.

    Raises:
        StorageError: the one before it is damaged too, or does not exist.
    """
    manifest = folder / "previous.json"
    body = _read_manifest(manifest)
    _read_tensors(folder / body["tensors"], body["tensors_sha256"], manifest)
    write_atomically(folder / "current.json", manifest.read_bytes())


def _read_manifest(manifest: Path) -> dict[str, Any]:
    if not manifest.is_file():
        raise StorageError(f"there is no {manifest}", "a run with a checkpoint", code="checkpoint-missing")
    try:
        body: dict[str, Any] = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _corrupt(manifest, "JSON") from error
    if not isinstance(body, dict) or not isinstance(body.get("format"), int):
        raise _corrupt(manifest, "format")
    if body["format"] != FORMAT_VERSION:
        newer = body["format"] > FORMAT_VERSION
        raise StorageError(
            f"{manifest} has the format {body['format']}",
            f"the format {FORMAT_VERSION}",
            "update Tsugiki" if newer else "resume with the version of Tsugiki that started the run",
            code="checkpoint-newer" if newer else "checkpoint-older",
        )
    if body.get("sha256") != _hash({key: value for key, value in body.items() if key != "sha256"}):
        raise _corrupt(manifest, "sha256")
    return body


def _read_tensors(path: Path, wanted: str, manifest: Path) -> dict[str, npt.NDArray[Any]]:
    from safetensors.numpy import load as from_bytes

    if path.parent.resolve() != manifest.parent.resolve() or not path.is_file():
        raise _corrupt(manifest, "tensors")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != wanted:
        raise _corrupt(path, "its hash, tensors_sha256 of the manifest")
    return from_bytes(content)


def _corrupt(path: Path, part: str) -> StorageError:
    return StorageError(
        f"{path} is damaged: {part}",
        "the checkpoint as it was written",
        "`--resume RUN --previous`, which goes on from the round before it",
        code="checkpoint-corrupt",
    )


def _remove_unnamed(folder: Path) -> None:
    """Delete tensors that no manifest names, and the temporary files of interrupted writes."""
    try:
        named = {_read_manifest(file)["tensors"] for file in folder.glob("*.json")}
    except StorageError:  # a damaged manifest may name any of them
        return
    for path in [*folder.glob("*.safetensors"), *folder.glob(".*.tmp")]:
        if path.name not in named:
            path.unlink()


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
