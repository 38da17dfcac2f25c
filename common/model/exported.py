"""Read and write `tsugiki.json`, which describes an export, and put an exported adapter on its base again.

Every export but a merged one has that file. A method is built and attached as in a run; then its tensors are set by
name, all of them and no others. So what is loaded is what was trained, for every method. The loaders of peft and
transformers skip silently what they do not find, such as the head of another model class, or DoRA's lengths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from tsugiki.common.adapters import ADAPTERS, AdapterMethod
from tsugiki.common.adapters.base import require_heads
from tsugiki.common.adapters.tensors import fill, read_manifest, read_tensors
from tsugiki.common.errors import ModelError, RegistryError
from tsugiki.common.model.find import find, find_in_hub
from tsugiki.common.model.fingerprint import check_base
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import assemble, quiet_libraries
from tsugiki.common.model.spec import make_spec
from tsugiki.common.settings import Section
from tsugiki.common.tasks import TASKS, Task
from tsugiki.common.tasks.base import Base
from tsugiki.common.tasks.pooling import HEAD, HEAD_FILE
from tsugiki.common.wire.spec import AdapterSpec

EXPORTED_FILE = "tsugiki.json"

_PEFT_PREFIX = "base_model.model."
"""What peft puts before the transformer's own names in its file."""

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, such as "org/model", by the hub's own rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _hub_id(name: str) -> str:
    if not is_hub_id(name):
        raise ValueError("no hub id")
    return name


class Exported(Section):
    """The content of `tsugiki.json`."""

    format: Literal[1] = 1
    task: dict[str, Any] = Field(description="the task's settings, its name among them")
    adapter: dict[str, Any] = Field(description="the adapter's settings, its method among them")
    heads: tuple[str, ...] = Field(description="modules of the transformer that were trained in full")
    base_name: Annotated[str, AfterValidator(_hub_id)] = Field(description="the name under which others find the base")
    base_fingerprint: _Sha256 = Field(description="of the base, by `common/model/fingerprint.py`")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="the type of the frozen weights")
    spec_sha256: _Sha256 = Field(description="of the `AdapterSpec` of what is exported")
    constants: dict[str, str] = Field(default={}, description="what the spec has from the task's `Base.constants`")
    head_file: Literal["", "3_Dense/model.safetensors"] = Field(
        default="", description="the head, where it is in a file of its own, as sentence-transformers saves it"
    )

    def make_task(self) -> Task:
        """Return the task that the adapter was trained for."""
        kind = TASKS.get(str(self.task.get("name")))
        return kind(kind.Settings.model_validate(self.task))

    def make_method(self, folder: Path) -> AdapterMethod:
        """Return the method that the adapter in a folder was made with."""
        kind = ADAPTERS.get(str(self.adapter.get("method")))
        return kind(kind.Settings.model_validate(self.adapter)).exported_in(folder)

    def spec_of(self, method: AdapterMethod, shapes: Mapping[str, tuple[int, ...]]) -> AdapterSpec:
        """Return the spec of an adapter without loading its base.

        Args:
            method: saves trained tensors under their own names, and draws no constants.
            shapes: of the saved tensors, by name.
        """
        return make_spec(self.make_task(), method, self.constants, self.base_fingerprint, shapes, self.heads)

    def check_spec(self, spec: AdapterSpec, folder: Path) -> None:
        """Check that a loaded adapter has the spec that was exported.

        Args:
            spec: from `tsugiki.common.model.spec.describe`, or `spec_of`.
            folder: of the export.

        Raises:
            ModelError: `adapter-invalid`, the specs differ.
        """
        if spec.sha256 != self.spec_sha256:
            raise ModelError(
                f"the adapter in {str(folder)!r}, as it was loaded, has the spec {spec.sha256[:12]}",
                f"{self.spec_sha256[:12]}, the spec of its run",
                "export it again with this version",
                code="adapter-invalid",
            )

    def write(self, folder: Path) -> None:
        """Write `tsugiki.json`."""
        (folder / EXPORTED_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def write_exported(
    folder: Path, graft: Graft, dtype: str, base_name: str, *, headless: bool = False, head_apart: bool = False
) -> None:
    """Write `tsugiki.json` for a graft whose adapter is saved in a folder; it contains nothing of this machine.

    Args:
        folder: of the export.
        graft: has the adapter on it.
        dtype: of the frozen weights.
        base_name: under which others find the base.
        headless: whether the head is left out, which changes the spec.
        head_apart: whether the head is in a file of its own.
    """
    spec = graft.spec
    settings = graft.task.settings.resolved(lambda name: "").model_dump(mode="json")
    # What "auto" took on this base is fixed: the base may look different at another place.
    settings |= {name: value for name, value in graft.base.constants.items() if name in settings}
    if headless:
        spec = replace(spec, tensors=tuple(tensor for tensor in spec.tensors if tensor.part != "head"))
    exported = Exported.model_validate(
        {
            "task": settings,
            "adapter": graft.method.exported_settings(),
            "heads": () if headless else graft.base.heads,
            "base_name": base_name,
            "base_fingerprint": graft.spec.base_fingerprint,
            "dtype": dtype,
            "spec_sha256": spec.sha256,
            "constants": graft.base.constants,
            "head_file": HEAD_FILE if head_apart else "",
        }
    )
    exported.write(folder)


def find_export(name: str, setting: str) -> Path:
    """Return the folder of an export that a run names; only this machine is searched.

    Args:
        name: of the folder.
        setting: the setting with this name, for the error.

    Raises:
        ModelError: `adapter-missing`, there is no such folder; `adapter-invalid`, the folder is no export.
    """
    expanded = os.path.expanduser(name)
    if os.path.isfile(os.path.join(expanded, EXPORTED_FILE)):
        return Path(expanded).resolve()
    there = os.path.isdir(expanded)  # Path.is_dir raises on too long a name
    problem = f"has no {EXPORTED_FILE}" if there else "is no folder here"
    raise ModelError(
        f"{setting} names {name!r}, which {problem}",
        "the folder that `tsugiki export` wrote without --merged, such as RUN/adapter",
        "export the run, and name the export's folder",
        code="adapter-invalid" if there else "adapter-missing",
    )


def read_exported(folder: Path) -> Exported:
    """Return the content of an export's `tsugiki.json`.

    Raises:
        ModelError: `adapter-invalid`, the file cannot be read, or names a task or method that is not known here.
    """
    try:
        exported = Exported.model_validate_json(read_manifest(folder / EXPORTED_FILE))
        exported.make_task(), exported.make_method(folder)
    except (OSError, ValidationError, RegistryError) as error:
        raise ModelError(
            f"no export can be read from {str(folder)!r} ({_reason(error)})",
            f"a folder that `tsugiki export` wrote without --merged, with a {EXPORTED_FILE} of format 1",
            "export the adapter again with this version",
            code="adapter-invalid",
        ) from error
    return exported


def _reason(error: Exception) -> str:
    """Return what is wrong with a file, without repeating its content."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or EXPORTED_FILE}: {first['msg']}"
    if isinstance(error, RegistryError):
        return error.problem
    return f"{EXPORTED_FILE}: {getattr(error, 'strerror', '')}"


def load_exported(folder: Path, transformer: Any, exported: Exported | None = None, *, fingerprint: str) -> Any:
    """Put an exported adapter and its heads on a freshly loaded transformer.

    Args:
        folder: of the export.
        transformer: a `PreTrainedModel` of the class that was trained.
        exported: the content of its `tsugiki.json`, if that was read already.
        fingerprint: of the base that the transformer was loaded from, by `common/model/fingerprint.py`.

    Returns:
        The module that replaces the transformer, in eval mode, with the adapter on.

    Raises:
        ModelError: `adapter-other-base`; `head-missing`, this class of model has no such module; `adapter-invalid`, a
            tensor is missing, extra or of another shape, or the files cannot be read; and what `attach` raises. After
            an error about a tensor the transformer cannot be used any more; load it anew.
    """
    exported = exported or read_exported(folder)
    check_base(fingerprint, exported.base_fingerprint, str(folder))
    require_heads(transformer, exported.heads)
    method = exported.make_method(folder)
    tensors = exported_tensors(folder, exported)
    with quiet_libraries():
        attached: Any = method.attach(transformer, exported.heads)
    for value in attached.parameters():
        if value.requires_grad:
            value.data = value.data.clone()  # other models may read the same memory (`share_frozen`)
    fill(method.saved(attached), tensors)
    return attached.eval()


def exported_tensors(folder: Path, exported: Exported) -> dict[str, Any]:
    """Return the tensors of an export, heads included, by the names under which its method saves them.

    Raises:
        ModelError: `adapter-invalid`, a file cannot be read.
    """
    tensors = read_tensors(folder / exported.make_method(folder).tensors_file)
    if exported.head_file:
        head = read_tensors(folder / exported.head_file)
        tensors |= {f"{_PEFT_PREFIX}{HEAD}.{name.removeprefix('linear.')}": value for name, value in head.items()}
    return tensors


def open_exported(folder: Path, source: str = "", *, beside: Any = None, device: str = "cpu") -> Graft:
    """Load an exported adapter with its base, as a graft for predictions or as a reference.

    Args:
        folder: of the export.
        source: hub id, folder or `package:...` behind its base. By default the name in the export, searched for in the
            hub and its cache alone, so that an export from elsewhere opens no folder of this machine.
        beside: a transformer on the same base. Its frozen tensors are used, so that memory holds one base.
        device: as in `tsugiki.common.model.load.choose_device`.

    Raises:
        ModelError: the base cannot be found, or as in `load_exported`; `adapter-invalid` also if frozen values or
            settings differ from those of the training.
    """
    exported = read_exported(folder)

    def attach(base: Base, fingerprint: str) -> Any:
        check_heads(exported, base)
        base.constants = exported.constants  # hashes of adapters that only its training needed
        if beside is not None:
            share_frozen(base.transformer, beside)
        return load_exported(folder, base.transformer, exported, fingerprint=fingerprint)

    base_folder = find(source) if source else find_in_hub(exported.base_name)
    graft = assemble(exported.make_task(), exported.make_method(folder), base_folder, exported.dtype, device, attach)
    exported.check_spec(graft.spec, folder)
    return graft


def check_heads(exported: Exported, base: Base) -> None:
    """Refuse an export that would replace other modules of the base than the heads of its task.

    Raises:
        ModelError: `adapter-invalid`.
    """
    left_out = base.loss_heads and not exported.heads
    if exported.heads != base.heads and not left_out:
        raise ModelError(
            f"the export brings the modules {', '.join(exported.heads) or 'none'} in full",
            f"the heads of its task on this base: {', '.join(base.heads) or 'none'}",
            "export the adapter again with this version",
            code="adapter-invalid",
        )


def share_frozen(transformer: Any, other: Any) -> None:
    """Let a bare transformer share the frozen tensors of another one on the same base, where their values are equal.

    Each keeps its own parameters over the same memory, so that each decides whether they are trained.

    Args:
        transformer: freshly loaded; changed in place.
        other: may have an adapter on it, and another head.
    """
    import torch
    from torch import nn

    frozen = {name: value for name, value in _base_parameters(other) if not value.requires_grad}
    shared: dict[int, Any] = {}
    for name, value in _base_parameters(transformer):
        there = frozen.get(name)
        if there is not None and there.dtype == value.dtype and torch.equal(there, value.to(there.device)):
            shared[id(value)] = nn.Parameter(there.data, requires_grad=value.requires_grad)
    # By identity, not by name: tied weights stay tied.
    for module in transformer.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) in shared:
                setattr(module, name, shared[id(value)])


def _base_parameters(transformer: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters under the names that they have in the base without adapter and head."""
    plain = transformer.get_base_model() if hasattr(transformer, "get_base_model") else transformer
    prefix = f"{plain.base_model_prefix}."
    for name, value in plain.named_parameters(remove_duplicate=False):
        parts = (part for part in name.removeprefix(prefix).split(".") if part not in ("base_layer", "original_module"))
        yield ".".join(parts), value
