"""Open a finished run again: its settings, its model, and its best or last adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tsugiki.common.config import files as config_file
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ExportError, StorageError
from tsugiki.common.files import read_json
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.spec import Vector, pack, sha256
from tsugiki.server.run import checkpoint
from tsugiki.server.run.so_far import best_so_far

Which = Literal["best", "last"]


@dataclass(frozen=True)
class Chosen:
    """An adapter of a run: its vector, shape (spec.size,), and the round that left it."""

    vector: Vector
    round: int


def read_config(folder: Path) -> RunConfig:
    """Return the settings of the run in a folder.

    Raises:
        StorageError: `run-missing`, the folder has no config.toml.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise StorageError(f"there is no run in {folder}", "a folder with config.toml", code="run-missing")
    return config_file.read(path)


def open_graft(folder: Path, config: RunConfig) -> Graft:
    """Return the run's graft on the CPU, unquantised, after checking that its spec is the run's.

    The reward model of an `rlhf` run is not loaded: it may be gone, and the policy does not need it.

    Raises:
        ExportError: `spec-mismatch`, the libraries or the base are not those of the run.
        StorageError: `run-unfinished`, `run-corrupt`.
    """
    plain = {"model.quantization": "none", "model.gradient_checkpointing": False}
    on_cpu = changed(config, {"train.device": "cpu", **plain})
    spec = _read(folder / "spec.json")
    recorded = spec["sha256"]
    # With the hashes that the run agreed on, the task's other models need not be loaded.
    agreed = spec["constants"] if config.task.models else None
    graft = load_graft(on_cpu, config.model.name, config.run.seed, agreed=agreed)
    if graft.spec.sha256 != recorded:
        raise ExportError(
            f"the adapter loaded here has the spec {graft.spec.sha256[:12]}",
            f"{str(recorded)[:12]}, the spec of the run",
            "export with the base model and the settings that the run was made with",
            code="spec-mismatch",
        )
    return graft


def choose(folder: Path, config: RunConfig, graft: Graft, which: Which) -> Chosen:
    """Return the best adapter of a run, so far if it has not ended, or the adapter of its last checkpoint.

    Raises:
        StorageError: the file is missing or damaged; `run-unfinished`, no round is done.
    """
    if which == "last":
        return _last(folder, config, graft)
    if (folder / "summary.json").is_file():
        return _best(folder, graft)
    state = best_so_far(folder, config, graft.spec.sha256)
    if not state.round:
        raise StorageError(
            f"no round of the run in {folder} is done",
            "a trained adapter",
            "go on with --resume",
            code="run-unfinished",
        )
    return Chosen(checkpoint.read_best(folder / "checkpoint", state), state.best_round)


def _best(folder: Path, graft: Graft) -> Chosen:
    """Return the best adapter of a finished run, after comparing it with the hash in its summary."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "best" / "adapter.safetensors"
    summary = _read(folder / "summary.json")
    try:
        vector = pack(load_file(path), graft.spec)
    except (OSError, SafetensorError) as error:
        raise _corrupt(path) from error
    if sha256(vector) != summary["best_sha256"]:
        raise _corrupt(path)
    return Chosen(vector, summary["best_round"])


def _last(folder: Path, config: RunConfig, graft: Graft) -> Chosen:
    """Return the adapter of a run's last checkpoint; the run need not be finished."""
    state = checkpoint.load(folder / "checkpoint", config.fixed, graft.spec.sha256)
    return Chosen(state.vector, state.round)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that the run has written.

    Raises:
        StorageError: `run-unfinished`, the file is missing; `run-corrupt`, it is not JSON.
    """
    if not path.is_file():
        raise StorageError(
            f"there is no {path}",
            "a run that has begun",
            "start it, or go on with --resume",
            code="run-unfinished",
        )
    return read_json(path)


def _corrupt(path: Path) -> StorageError:
    return StorageError(
        f"{path} is missing or damaged",
        "the file as the run wrote it",
        "export the last checkpoint",
        code="run-corrupt",
    )
