"""Load a frozen base model and put an adapter on it, once per process."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsugiki.common.adapters import ADAPTERS, AdapterMethod
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ModelError, TsugikiError
from tsugiki.common.model.device import choose_device, loading, recompute_activations
from tsugiki.common.model.find import find
from tsugiki.common.model.fingerprint import check_base, fingerprint
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.spec import describe
from tsugiki.common.rng import derive_seed, seed_everything
from tsugiki.common.settings import STARTS
from tsugiki.common.tasks import TASKS, Task
from tsugiki.common.tasks.base import Base

_SHORTEST_TEXT = 8
"""Fewest tokens of a text that an adapter must leave room for: the minimum of `task.max_length`."""


class GraftCache:
    """The graft that this process loaded last. There is room for one: a second base would double the memory.

    Args:
        graft: the graft, or None before the first one and after `clear`.
        key: the settings that `graft` was loaded with.
    """

    def __init__(self) -> None:
        self.graft: Graft | None = None
        self.key = ""

    def get(self, key: str, load: Callable[[], Graft]) -> Graft:
        """Return the graft with this key; call `load` unless it is the one that is kept."""
        if self.graft is None or self.key != key:
            self.clear()  # before loading: the old base's memory is free for the new one
            self.graft = load()
            self.key = key
        return self.graft

    def clear(self) -> None:
        """Forget the graft, so that the next `get` loads."""
        self.graft = None
        self.key = ""


grafts = GraftCache()
"""This process's cache."""


def load_graft(config: RunConfig, source: str, seed: int, *, agreed: Mapping[str, str] | None = None) -> Graft:
    """Load the base and attach the adapter, once per process for the same settings.

    Args:
        config: the sections model, task and adapter, and train.device, are used.
        source: hub id, folder or `package:...` behind the run's model name.
        seed: for the initial values of adapter and head.
        agreed: `Base.constants` of a finished run. If given, the adapters that its task names are not loaded.

    Raises:
        ModelError: the base cannot be found or is not trusted, or the adapter does not fit it; `adapter-missing`, the
            task needs an exported adapter, and the run names none.
    """
    sections = config.model_dump(mode="json", include={"model", "task", "adapter"}, exclude={"adapter": set(STARTS)})
    # The key covers all that the graft depends on, so that a changed setting or export loads anew.
    stamps = [_stamps(name) for name in (*config.task.models, *config.adapter.models)]
    key = json.dumps([sections, stamps, config.train.device, source, seed, agreed], sort_keys=True)
    return grafts.get(key, lambda: _load(config, source, seed, agreed))


def _stamps(name: str) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of a folder's files: an export may be replaced under its name."""
    if not name or not os.path.isdir(folder := os.path.expanduser(name)):
        return []
    found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder))
    return [(file, about.st_size, about.st_mtime_ns) for file, about in found]


def _load(config: RunConfig, source: str, seed: int, agreed: Mapping[str, str] | None) -> Graft:
    if agreed is None and "" in config.task.models:
        raise ModelError(
            f"the task {config.task.name} needs an exported adapter, and the run names none",
            "the folder of an adapter that `tsugiki export` wrote",
            "name it in [task]",
            code="adapter-missing",
        )
    settings = config.task
    if agreed is not None:
        settings = config.task.resolved(lambda name: "")  # its adapters are not loaded: only their hashes count
    task = TASKS.get(config.task.name)(settings)
    method = ADAPTERS.get(config.adapter.method)(config.adapter)
    folder = find(source)
    seed_everything(derive_seed(seed, "initial-values"))
    how = loading(config)
    recompute = config.model.gradient_checkpointing

    def attach(base: Base, identity: str) -> Any:
        base.constants = agreed or base.constants
        return method.attach(base.transformer, base.heads)

    return assemble(task, method, folder, config.model.dtype, config.train.device, attach, how=how, recompute=recompute)


def assemble(
    task: Task,
    method: AdapterMethod,
    folder: Path,
    dtype: str,
    device: str,
    put: Callable[[Base, str], Any],
    *,
    how: Mapping[str, Any] | None = None,
    recompute: bool = False,
) -> Graft:
    """Load a base from its folder and put an adapter on it.

    Args:
        task: loads the base.
        method: the adapter method.
        folder: of the base.
        dtype: of the frozen weights.
        device: as in `choose_device`.
        put: called with the bare base and its fingerprint; returns the module that replaces the transformer.
        how: further arguments of `from_pretrained` (`tsugiki.common.model.device.loading`).
        recompute: whether to use gradient checkpointing.

    Raises:
        ModelError: the base is not trusted, or the adapter does not fit it.
    """
    import torch

    with quiet_libraries():
        base = load_base(task, folder, getattr(torch, dtype), **(how or {}))
        if recompute:
            recompute_activations(base)
        # Whether base and method fit each other is checked before the adapter changes anything.
        _check_architecture(method, base)
        identity = fingerprint(folder, base)
        for name, wanted in method.bases().items():
            check_base(identity, wanted, name)
        _make_room(method, base)
        task.put_in_place(base, put(base, identity))
        base.adapter_disabled = lambda: method.disabled(base.transformer)
    spec = describe(task, method, base, identity)
    place = torch.device(choose_device(device))
    base.network.to(place)
    if base.reward_model is not None:
        base.reward_model.to(place)  # its tensors of the base are there already
    base.network.eval()
    return Graft(task, method, base, spec, place)


def load_base(task: Task, folder: Path, dtype: Any, **how: Any) -> Base:
    """Load the base.

    Raises:
        ModelError: `model-load`, the libraries cannot load the checkpoint, or it asks for code of the hub; or the
            task's own error.
    """
    _refuse_code_of_the_hub(folder)
    try:
        return task.load(folder, dtype, **how)
    except (TsugikiError, MemoryError):
        raise
    except Exception as error:  # a checkpoint's files steer the libraries, which fail with errors of any class
        if type(error).__name__ == "OutOfMemoryError":  # the device's
            raise
        raise ModelError(
            f"the model in {folder.name!r} cannot be loaded ({type(error).__name__})",
            "a whole checkpoint of an architecture that transformers itself knows",
            "fetch the model again, or choose another",
            code="model-load",
        ) from error


def _refuse_code_of_the_hub(folder: Path) -> None:
    """Check that no config.json of a base names a hub kernel: transformers would fetch its code and run it.

    Raises:
        ModelError: `model-load`.
    """
    for file in (folder / "config.json", *folder.glob("*/config.json")):
        try:
            about = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # the libraries say what is wrong with it, or never read it
        if _names_a_kernel(about):
            raise ModelError(
                f"the {file.name} of the model in {folder.name!r} names a kernel of the hub, which is code",
                "an implementation that is part of transformers",
                "remove the key that ends in _implementation from the file, or choose another base",
                code="model-load",
            )


def _names_a_kernel(about: Any) -> bool:
    """Return whether a key such as `attn_implementation` in a configuration, or in a part of it, names a hub's id."""
    if not isinstance(about, dict):
        return False
    for key, value in about.items():
        chosen = value.values() if isinstance(value, dict) else [value]
        if key.endswith("_implementation") and any("/" in str(name) for name in chosen):
            return True
    return any(_names_a_kernel(value) for value in about.values())


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' expected messages: on a new head, and on names that they changed themselves."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(shown)
        logging.enable_progress_bar()


def _check_architecture(method: AdapterMethod, base: Base) -> None:
    model_type = base.transformer.config.model_type
    if reason := method.why_not(model_type):
        raise ModelError(
            f"adapter.method = {method.name!r} does not fit the architecture {model_type!r}: {reason}",
            "a base and a method that fit each other",
            'choose another base, or adapter.method = "lora"',
            code="adapter-unsupported",
        )


def _make_room(method: AdapterMethod, base: Base) -> None:
    """Limit the length of texts to the positions that the adapter leaves free.

    Raises:
        ModelError: `adapter-positions`, fewer than `_SHORTEST_TEXT` positions are left.
    """
    if not method.positions:
        return
    positions = int(base.transformer.config.max_position_embeddings)
    room = positions - method.positions
    if room < _SHORTEST_TEXT:
        raise ModelError(
            f"adapter.num_virtual_tokens = {method.positions} is too large",
            f"at most {positions - _SHORTEST_TEXT}, since the base has {positions} positions for them and a text",
            "lower it",
            code="adapter-positions",
        )
    base.tokenizer.model_max_length = min(base.tokenizer.model_max_length, room)
    # A `SentenceTransformer` has a limit of its own.
    if base.network is not base.transformer:
        base.network.max_seq_length = min(base.network.max_seq_length or room, room)
