"""The base class of our own adapter methods: attach, switch off, save.

These methods change the transformer in place and keep the names of its tensors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsugiki.common.adapters.base import AdapterMethod, require_heads
from tsugiki.common.adapters.master import keep_masters
from tsugiki.common.errors import ExportError, ModelError

TENSORS_FILE = "tsugiki_adapter.safetensors"


class OwnMethod(AdapterMethod):
    """A method that is implemented here: it adds modules, or trains chosen tensors of the base."""

    export_format = "tsugiki"
    tensors_file = TENSORS_FILE

    def attach(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Put the adapter on the transformer, which is changed in place and returned.

        Raises:
            ModelError: `adapter-attached`, the transformer already has an adapter of ours; `head-missing`, a head is
                not there; and as in `place`. After an error the transformer is unchanged.
        """
        from torch import nn

        modules = require_heads(transformer, heads)
        if hasattr(transformer, "adapter_heads"):
            raise ModelError(
                f"the transformer has an adapter already ({self.name})",
                "a transformer without one",
                "load the base anew",
                code="adapter-attached",
            )
        base = dict(transformer.named_parameters())
        wanted_gradients = [value for value in base.values() if value.requires_grad]
        transformer.requires_grad_(False)
        try:
            self.place(transformer, heads)
        except ModelError:
            # The caller may try another method on the same transformer.
            for value in wanted_gradients:
                value.requires_grad_(True)
            raise
        # The base's values of trained tensors are kept for `disabled`, in a module of their own: Opacus refuses trained
        # modules with buffers.
        kept = nn.Module()
        for name, value in base.items():
            if value.requires_grad:
                kept.register_buffer(name.replace(".", "/"), value.detach().clone(), persistent=False)
        transformer.base_values = kept
        transformer.adapter_heads = heads  # for `without_heads`, which is called with the transformer only
        for head in heads:
            modules[head].requires_grad_(True)
        keep_masters(transformer)
        return transformer

    @abstractmethod
    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Add this method's modules to the frozen transformer, or let tensors of the base require a gradient.

        `attach` keeps the values of such tensors for `disabled`.

        Raises:
            ModelError: this method finds nothing in the transformer to be attached to, and has not changed it.
        """

    def switches(self, transformer: Any) -> list[Any]:
        """Return the modules whose `adapter_on` says whether this method's modules run."""
        return [module for module in transformer.modules() if hasattr(module, "adapter_on")]

    @contextmanager
    def disabled(self, transformer: Any) -> Iterator[None]:
        """Switch this method's modules off inside a `with` block, and give the base its own values back."""
        from torch import nn

        switches = [(module, module.adapter_on) for module in self.switches(transformer)]
        values = []
        for path, base in transformer.base_values.named_buffers():
            parent, _, name = path.replace("/", ".").rpartition(".")
            module = transformer.get_submodule(parent)
            values.append((module, name, getattr(module, name), base))
        try:
            for module, _ in switches:
                module.adapter_on = False
            for module, name, _, base in values:
                # The parameter is replaced, not its values: a graph made before this block can still run backward.
                setattr(module, name, nn.Parameter(base, requires_grad=False))
            yield
        finally:
            for module, was_on in switches:
                module.adapter_on = was_on
            for module, name, trained, _ in values:
                setattr(module, name, trained)

    def without_heads(self, transformer: Any) -> Any:
        """Return a copy without the heads that `attach` was called with."""
        import copy

        bare = copy.deepcopy(transformer)
        for head in bare.adapter_heads:
            parent, _, own_name = head.rpartition(".")
            delattr(bare.get_submodule(parent), own_name)
        bare.adapter_heads = ()
        return bare

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write every trained tensor by name, heads included."""
        self.write(self.saved(transformer), folder)

    def write(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Write tensors by name.

        Args:
            saved: tensors by name, heads included.
            folder: created if it is missing.
        """
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / self.tensors_file, metadata={"format": "pt"})

    def saved(self, transformer: Any) -> dict[str, Any]:
        """Return the trained tensors by name."""
        return trained_tensors(transformer)

    def merge(self, transformer: Any) -> Any:
        """Refuse to merge.

        Raises:
            ExportError: `merge-unsupported`, always: no weights of the base can do the work of this method's modules.
        """
        raise ExportError(
            f"an adapter of the method {self.name!r} cannot be merged into the base's weights",
            "an export that keeps them apart",
            "export without --merged, and load the export with tsugiki.load_adapter",
            code="merge-unsupported",
        )


def trained_tensors(transformer: Any) -> dict[str, Any]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
