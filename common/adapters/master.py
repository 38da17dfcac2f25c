"""Master weights: whatever is trained is float32, also on a base of 16 bits.

A 16-bit number has no room for small steps: bfloat16 drops a change below 0.4 %, and AdamW's squares of gradients
vanish in float16. So a trained tensor is kept in float32, and its module computes with a copy in the base's type. That
is the function that an export computes, whose loader rounds the tensor to the base's type once. Source: Micikevicius et
al. 2018, arXiv:1710.03740, section 3.1.

LoRA and its kin need none of this: peft keeps their tensors in float32 and computes with them as they are.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keep_masters(model: Any) -> None:
    """Turn trained 16-bit parameters into float32, and let their modules compute in the type that they had.

    Args:
        model: a module; its parameters are changed in place and stay the same objects.
    """
    import torch

    for module in model.modules():
        own = module.named_parameters(recurse=False)
        narrow = [value for _, value in own if value.requires_grad and value.dtype in (torch.float16, torch.bfloat16)]
        if not narrow:
            continue
        module.computes_in = narrow[0].dtype
        # A method, unlike a closure, is copied with its module.
        module.forward = types.MethodType(_forward, module)
        for value in narrow:
            value.data = value.data.float()


def has_masters(model: Any) -> bool:
    """Return whether a trained tensor of a module is float32 while its module computes in 16 bits."""
    return any(hasattr(module, "computes_in") for module in model.modules())


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a module's own forward in the type that it computes in."""
    dtype = module.computes_in
    inputs = [_cast(value, dtype) for value in args]
    named = {name: _cast(value, dtype) for name, value in kwargs.items()}
    with _narrowed(module, dtype):
        return type(module).forward(module, *inputs, **named)


@contextmanager
def _narrowed(module: Any, dtype: torch.dtype) -> Iterator[None]:
    """Put copies of a module's parameters in this type before the parameters inside a `with` block.

    A module finds its parameters only where it has no attribute of their name. The gradient flows through the copies.
    """
    copies = {name: _cast(value, dtype) for name, value in module.named_parameters(recurse=False)}
    try:
        module.__dict__.update(copies)
        yield
    finally:
        for name in copies:
            module.__dict__.pop(name, None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in this type, and anything else as it is."""
    import torch

    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
