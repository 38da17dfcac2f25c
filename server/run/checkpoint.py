"""Checkpoints: everything that the next round depends on, in one file for each round, which is either whole or refused.

`checkpoint/` has the files of the last two rounds, and of the best round. Each is a safetensors file
`round-RRRRRR-HASH.safetensors`: its header has the state and the hash of each tensor, and its name has the hash of the
header, so no bit of it can change unnoticed. A round is done when its file is renamed into place.

Evaluation comes after that. It changes no tensor, so it writes no checkpoint: the round's line in metrics.jsonl has
its result, and a resumed run reads it there (`loop.evaluated`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import StorageError
from tsugiki.common.files import make_folder, to_json, unwritable, write_atomically
from tsugiki.common.wire.spec import Vector
from tsugiki.server.run.kept import let_go

FORMAT_VERSION = 6
_KEY = "checkpoint"
_PLAIN = (
    "round",
    "best_metric",
    "best_round",
    "best_at_sites",
    "evaluations_since_best",
    "record",
    "plan",
    "norms",
    "class_shares",
    "measured_by",
)
_HASH_DIGITS = 32
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
_TYPES = {"<f4": "F32", "<f8": "F64", "<i4": "I32", "<i8": "I64"}
"""The names of NumPy's types in safetensors, for everything that a strategy may remember."""


@dataclass(frozen=True)
class State:
    """A run between two rounds.

    Args:
        vector: the adapter, shape (size,).
        round: rounds done.
        evaluated_round: the last round whose evaluation is included in what follows.
        best_metric: the metric of the best adapter so far; None until something was evaluated.
        best_at_sites: its metric at each site that evaluated it, if sites decide which adapter is best.
        best_round: its round; until something was evaluated, the round from which on it is looked for. Its checkpoint
            is kept, see `read_best`.
        evaluations_since_best: counts towards early stopping.
        strategy: the strategy's moments.
        record: the round's line for metrics.jsonl, without its evaluation; empty once the line is written.
        plan: the privacy plan that the run is bound to; None for a run without privacy.
        anchors: of the run's logs at the time of the checkpoint; see `server/run/anchors.py`.
        norms: of recent updates of an open run, which say what is typical (`influence.py`).
        class_shares: of the federation, which sites adjust their losses to; empty: they do not.
        measured_by: the metric and the file of rows by which the best adapter is chosen.
    """

    vector: Vector
    round: int = 0
    evaluated_round: int = -1
    best_metric: float | None = None
    best_round: int = 0
    evaluations_since_best: int = 0
    strategy: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    anchors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norms: Sequence[float] = ()
    class_shares: Sequence[float] = ()
    measured_by: str = ""
    best_at_sites: Mapping[str, float] = field(default_factory=dict)


def save(folder: Path, state: State, settings: Mapping[str, Any], spec_sha256: str, adapter_sha256: str = "") -> None:
    """Write a round's checkpoint, before its evaluation, and remove those that are no longer needed.

    Args:
        folder: the run's `checkpoint/`.
        state: after the round.
        settings: of the run, those that shape the result (`RunConfig.fixed`).
        spec_sha256: hash of its adapter spec.
        adapter_sha256: hash of `state.vector`, if it is known already; computed otherwise.

    Raises:
        StorageError: it cannot be written. The previous checkpoint is whole.
    """
    make_folder(folder)
    tensors = {"vector": _portable(state.vector)}
    tensors |= {f"strategy.{name}": _portable(value) for name, value in state.strategy.items()}
    hashes = {"vector": adapter_sha256 or _sha256(tensors["vector"].data)}
    for name, value in state.strategy.items():
        hashes[f"strategy.{name}"] = _sha256(tensors[f"strategy.{name}"].data)
        let_go([value])  # it is read once more when it is written
    body = {
        "format": FORMAT_VERSION,
        "settings": settings,
        "spec_sha256": spec_sha256,
        "tensors_sha256": hashes,
        **{name: getattr(state, name) for name in _PLAIN},
        "anchors": state.anchors,
    }
    header = _header(tensors, to_json(body))
    path = folder / f"round-{state.round:06d}-{_sha256(header)[:_HASH_DIGITS]}.safetensors"
    # Two flushes to the disk, and both are needed: of the file before it is renamed, or a power cut could leave the
    # name without the content; of the folder after that, or the next round would begin while this one may still be
    # lost. State and tensors share one file, because a second file would need a third flush.
    write_atomically(path, header, *(tensor.data for tensor in tensors.values()))
    _remove_unneeded(folder, path, state)


def exists(folder: Path) -> bool:
    """Return whether there is any checkpoint, whole or not, of this or another version."""
    return any(folder.glob("round-[0-9]*-*.safetensors")) or any(folder.glob("*.json"))


def load(folder: Path, settings: Mapping[str, Any], spec_sha256: str) -> State:
    """Return the state in the newest checkpoint, before the evaluation of its round.

    Args:
        folder: the run's `checkpoint/`.
        settings: of the run that resumes, those that shape the result.
        spec_sha256: hash of its adapter spec.

    Raises:
        StorageError: `checkpoint-missing`, `checkpoint-corrupt`, `checkpoint-foreign`, `checkpoint-newer` or
            `checkpoint-older`, with the file and the field.
    """
    path = _newest(folder)
    body, tensors = _read(path)
    _check_settings(path, body["settings"], settings)
    if body["spec_sha256"] != spec_sha256:
        raise StorageError(
            f"{path}: spec_sha256 is {body['spec_sha256'][:12]}",
            f"{spec_sha256[:12]}, of the adapter as it is loaded here",
            "resume with the base model and the libraries that the run was started with",
            code="checkpoint-foreign",
        )
    strategy = {name.removeprefix("strategy."): tensors[name] for name in tensors if name.startswith("strategy.")}
    body = {"anchors": {}, "best_at_sites": {}} | body  # checkpoints of earlier versions have none of these
    plain = {name: body[name] for name in (*_PLAIN, "anchors")}
    plain["norms"] = tuple(plain["norms"])
    plain["class_shares"] = tuple(plain["class_shares"])
    return State(tensors["vector"], evaluated_round=body["round"] - 1, strategy=strategy, **plain)


def _check_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run goes on with the settings that shaped its result so far.

    Raises:
        StorageError: `checkpoint-foreign`, with each setting that differs.
    """
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise StorageError(
            f"{path} is of a run with other settings: "
            + ", ".join(f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}" for key in changed),
            "the settings that have shaped the result so far",
            "resume without them, or start a new run; docs/operations.md lists what may change",
            code="checkpoint-foreign",
        )


def _shown(value: Any) -> str:
    """Return a setting as in a run file; a long one is cut."""
    return "not set" if value is None else json.dumps(value)[:80]


def read_anchors(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return what the newest checkpoint remembers of the run's logs; empty in one of an older version.

    Raises:
        StorageError: as `load`.
    """
    anchors: Mapping[str, Mapping[str, Any]] = _read_body(_newest(folder)).get("anchors", {})
    return anchors


def read_best(folder: Path, state: State) -> Vector:
    """Return the best adapter so far, shape (size,): from its round's checkpoint, unless it is that of `state`.

    Raises:
        StorageError: `checkpoint-corrupt`, its checkpoint is damaged or missing.
    """
    if state.best_round == state.round:
        return state.vector
    try:
        path = next(path for path in reversed(_files(folder)) if _round_of(path) == state.best_round)
        vector: Vector = _read(path)[1]["vector"]
    except (StopIteration, StorageError) as error:
        raise StorageError(
            f"the checkpoint of round {state.best_round} in {folder}, with the best adapter, is damaged or missing",
            "the files of the run as they were written",
            "`tsugiki export RUN --which last`, or start a new run",
            code="checkpoint-corrupt",
        ) from error
    return vector


def promote_previous(folder: Path) -> None:
    """Remove the newest checkpoint, which is damaged, so that the one before it is the newest.

    Raises:
        StorageError: the one before it is damaged too, or does not exist.
    """
    newest = _newest(folder)
    older = [path for path in _files(folder) if _round_of(path) < _round_of(newest)]
    if not older:
        raise StorageError(
            f"there is no checkpoint in {folder} before {newest.name}",
            "the checkpoint of the round before",
            "start a new run",
            code="checkpoint-missing",
        )
    _read(older[-1])  # a damaged one must not become the newest
    try:
        newest.unlink()
    except OSError as error:
        raise unwritable(newest, error) from error


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last.

    Round 0 may have two for a moment: without and with the head that is computed before round 1.
    """
    paths = folder.glob("round-[0-9]*-*.safetensors")
    return sorted(paths, key=lambda path: (_round_of(path), path.stat().st_mtime_ns))


def _round_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _newest(folder: Path) -> Path:
    if (folder / "current.json").exists():  # versions before 3 had a manifest beside the tensors
        raise _other_version(folder / "current.json", 2)
    files = _files(folder)
    if not files:
        raise StorageError(f"there is no checkpoint in {folder}", "a run with a checkpoint", code="checkpoint-missing")
    return files[-1]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the header's state and the tensors of a checkpoint, after checking the hashes of both."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    content = path.read_bytes()
    body = _body(path, content[: _header_size(content)])
    try:
        tensors = from_bytes(content)
    except SafetensorError as error:
        raise _corrupt(path, "its tensors") from error
    for name, wanted in body["tensors_sha256"].items():
        if name not in tensors or _sha256(tensors[name].data) != wanted:
            raise _corrupt(path, f"the hash of {name}")
    return body, tensors


def _read_body(path: Path) -> dict[str, Any]:
    """Return the header's state of a checkpoint, without reading its tensors."""
    with path.open("rb") as file:
        size = _header_size(file.read(_LENGTH_BYTES))
        if size > path.stat().st_size:
            raise _corrupt(path, "its header")
        file.seek(0)
        return _body(path, file.read(size))


def _header_size(content: bytes) -> int:
    return _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")


def _body(path: Path, header: bytes) -> dict[str, Any]:
    """Return the state in a header, after checking its version and its hash."""
    try:
        body: dict[str, Any] = json.loads(json.loads(header[_LENGTH_BYTES:])["__metadata__"][_KEY])
        version = body["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _corrupt(path, "its header") from error
    if not isinstance(version, int):
        raise _corrupt(path, "format")
    # before the hash: another version may compute it differently
    if version != FORMAT_VERSION:
        raise _other_version(path, version)
    if path.stem.split("-")[-1] != _sha256(header)[:_HASH_DIGITS]:
        raise _corrupt(path, "the hash of its header, which its name has")
    return body


def _header(tensors: Mapping[str, npt.NDArray[Any]], body: str) -> bytes:
    """Return the header of a safetensors file with these tensors, in this order, and its length before it.

    The library's own writer would copy all tensors first.
    """
    entries: dict[str, Any] = {"__metadata__": {_KEY: body}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype.str], "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of their numbers' size
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _portable(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a tensor as safetensors holds it: contiguous, with little-endian numbers. No copy if it is so already."""
    tensor = np.asarray(tensor)
    return np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _other_version(path: Path, version: int) -> StorageError:
    newer = version > FORMAT_VERSION
    return StorageError(
        f"{path} has the format {version}",
        f"the format {FORMAT_VERSION}",
        "update Tsugiki" if newer else "resume with the version of Tsugiki that started the run",
        code="checkpoint-newer" if newer else "checkpoint-older",
    )


def _corrupt(path: Path, part: str) -> StorageError:
    return StorageError(
        f"{path} is damaged: {part}",
        "the checkpoint as it was written",
        "`--resume RUN --previous`, which goes on from the round before it",
        code="checkpoint-corrupt",
    )


def _remove_unneeded(folder: Path, newest: Path, state: State) -> None:
    """Delete checkpoints that nothing refers to, and the temporary files of interrupted writes.

    The newest and the one before it stay, each with the checkpoint of the best round that it refers to.
    """
    older = [path for path in _files(folder) if _round_of(path) < state.round]
    kept = {newest, *older[-1:]}
    best = {state.best_round}
    try:
        best |= {_read_body(path)["best_round"] for path in older[-1:]}
    except StorageError:  # a damaged one may refer to any of them
        return
    kept |= set({_round_of(path): path for path in older if _round_of(path) in best}.values())  # the newest of each
    for path in [*_files(folder), *folder.glob(".*.tmp")]:
        if path not in kept:
            path.unlink()
