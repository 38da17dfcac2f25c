"""The values of an exported adapter, for a run that starts from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsugiki.common.adapters import AdapterMethod
from tsugiki.common.adapters.tensors import fill, tensors_sha256
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ModelError
from tsugiki.common.model.exported import Exported, check_heads, exported_tensors, find_export, read_exported
from tsugiki.common.model.fingerprint import check_base
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.spec import make_spec
from tsugiki.common.wire.arrays import decode, encode, packed
from tsugiki.common.wire.spec import Vector, is_finite, sha256

_TRAINING_ONLY = ("dropout", "init")
"""Settings of adapters that change how values are drawn or trained, but not what an adapter computes."""


def started(config: RunConfig, graft: Graft) -> tuple[RunConfig, Vector]:
    """Return a run's settings with the hash of the values that it starts from, and these values.

    Args:
        config: of the run. Without `adapter.start_from` it starts from the graft's initial values.
        graft: of the run.

    Raises:
        ModelError: as `start_values`; `adapter-differs`, the hash is not `adapter.start_sha256`.
    """
    if not config.adapter.start_from:
        return config, graft.initial
    values = start_values(graft, config.adapter.start_from)
    found = sha256(values)
    wanted = config.adapter.start_sha256
    if wanted not in ("", found):
        raise ModelError(
            f"the values of the adapter in adapter.start_from = {config.adapter.start_from!r} have the hash {found}",
            f"adapter.start_sha256 = {wanted}",
            "name the export that the run was made for, or remove adapter.start_sha256",
            code="adapter-differs",
        )
    return changed(config, {"adapter.start_sha256": found}), values


def about_start(config: RunConfig) -> dict[str, str]:
    """Return the name and the hash of the adapter that a run starts from, for its records; empty if there is none.

    Args:
        config: of the run, from `started`.
    """
    if not config.adapter.start_from:
        return {}
    # the end of its path: the rest belongs to this machine
    name = "/".join(Path(config.adapter.start_from).parts[-2:])
    return {"start_from": name, "start_sha256": config.adapter.start_sha256}


def start_values(graft: Graft, name: str) -> Vector:
    """Return the values of an exported adapter and its head, in the order of a run's spec.

    Frozen numbers do not travel: both sides draw them from `run.seed`. So an export with others is refused. A head that
    only the loss reads is in no export, and keeps its initial values.

    Args:
        graft: of the run. It has its initial values afterwards.
        name: of the export's folder, as in `adapter.start_from`.

    Returns:
        Shape (spec.size,), rounded to the type that travels: exactly what each site receives.

    Raises:
        ModelError: `adapter-missing`, there is no such folder; `adapter-invalid`, the export cannot be read, or is not
            what its run has made; `adapter-other-base`; `adapter-differs`, it does not fit the run's settings.
    """
    folder = find_export(name, "adapter.start_from")
    exported = read_exported(folder)
    check_base(graft.spec.base_fingerprint, exported.base_fingerprint, name)
    method = exported.make_method(folder)
    found = exported_tensors(folder, exported)
    wanted = _saved(graft, exported)
    for setting, theirs, ours in _settings(exported, method, graft):
        # layers that one of the two names, and the other takes by default
        same_layers = setting == "adapter.target_modules" and wanted.keys() == found.keys()
        if theirs != ours and not same_layers:
            raise _differs(setting, theirs, ours)
    check_heads(exported, graft.base)
    with _initial_afterwards(graft) as drawn:
        fill(wanted, found)
        constants = graft.method.constants(graft.base.transformer)
        _check_spec(exported, method, graft, constants, folder)
        if tensors_sha256(constants) != drawn:
            raise _differs("run.seed", "frozen numbers of another seed", "those of this run's seed")
        values = graft.read()
    if not is_finite(values):
        raise ModelError(
            f"the adapter in {name!r} has numbers that are not finite",
            "finite numbers",
            "start from another one",
            code="adapter-invalid",
        )
    return packed(decode(encode(values, graft.spec), graft.spec))


def _saved(graft: Graft, exported: Exported) -> dict[str, Any]:
    """Return the graft's own tensors that an export sets, by their names in the export."""
    saved = graft.method.saved(graft.base.transformer)
    if exported.heads:
        return saved
    return {one: value for one, value in saved.items() if not _in_heads(one, graft.base.heads)}


def _in_heads(name: str, heads: tuple[str, ...]) -> bool:
    return any(f".{head}." in f".{name}" for head in heads)


def _settings(exported: Exported, method: AdapterMethod, graft: Graft) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting that decides what an adapter computes, with its value in an export and in a run."""
    task = exported.make_task()
    yield "task.name", task.settings.name, graft.task.settings.name
    yield "task.labels", task.labels, graft.task.labels
    for key, value in exported.constants.items():
        if key in exported.task:  # what "auto" took; the others are hashes of adapters that only training needs
            yield f"task.{key}", value, graft.base.constants.get(key)
    yield "adapter.method", method.name, graft.method.name
    theirs = _of_values(method)
    ours = _of_values(graft.method)
    for key in {**theirs, **ours}:
        yield f"adapter.{key}", theirs.get(key), ours.get(key)


def _of_values(method: AdapterMethod) -> dict[str, Any]:
    """Return the settings of a method that decide what its values compute."""
    settings = {key: value for key, value in method.spec_settings().items() if key not in _TRAINING_ONLY}
    if settings.get("freeze_a") == "auto":  # as in an open run
        settings["freeze_a"] = "no"
    return settings


@contextmanager
def _initial_afterwards(graft: Graft) -> Iterator[str]:
    """Yield the hash of a graft's frozen numbers; afterwards they are the same again, and the others are the initial.

    Sites that are simulated in this process train the same graft.
    """
    frozen = graft.method.constants(graft.base.transformer)
    kept = {name: value.detach().clone() for name, value in frozen.items()}
    try:
        yield tensors_sha256(kept)
    finally:
        for name, value in frozen.items():
            value.data.copy_(kept[name])
        graft.write(graft.initial)


def _check_spec(
    exported: Exported, method: AdapterMethod, graft: Graft, constants: Mapping[str, Any], folder: Path
) -> None:
    """Check that an export, as it was put on the run's graft, has the spec that its own run has made."""
    tensors = [tensor for tensor in graft.spec.tensors if exported.heads or tensor.part != "head"]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    agreed = dict(exported.constants)
    if constants:
        agreed["constants_sha256"] = tensors_sha256(constants)
    spec = make_spec(exported.make_task(), method, agreed, exported.base_fingerprint, shapes, exported.heads)
    exported.check_spec(spec, folder)


def _differs(setting: str, theirs: Any, ours: Any) -> ModelError:
    return ModelError(
        f"adapter.start_from does not fit this run: {setting} is {_shown(theirs)} in the export",
        f"{_shown(ours)}, as in this run",
        f"set {setting} as the export has it, or start from another one",
        code="adapter-differs",
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)[:80]
