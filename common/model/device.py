"""Device selection, 4-bit loading and gradient checkpointing."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import ModelError

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
    from tsugiki.common.tasks.base import Base

BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a linear layer's weight in `nf4`: 64 weights share an 8-bit constant, and 256 of these a 32-bit one.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, "Double Quantization".
"""

_QUANTISED_ON = ("cuda",)
_WHOLE = [
    r"(.*\.)?(pre_classifier|classifier|score|head|classification_head|logits_proj|sequence_summary|pooler|lm_head)",
    "^dense",
]
"""Patterns for modules that stay unquantised: the output layer, and those that tasks may train in full.

4-bit weights take no gradient. A pattern matches whole parts from the start of a module's name. `dense` is a head only
at the top level (EuroBERT's): blocks have layers of that name.
"""


def choose_device(wanted: str) -> str:
    """Return "cuda", "mps" or "cpu"; "auto" takes the first that is available.

    Raises:
        ModelError: `device`, this machine does not have the wanted device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, available in there.items() if available)
    if not there[wanted]:
        raise ModelError(
            f"train.device = {wanted!r} is not available here", 'a device of this machine, or "auto"', code="device"
        )
    return wanted


def device_notes(config: RunConfig, device: str) -> tuple[str, ...]:
    """Return notes on settings that this type of device ignores: `no-bf16`, because autocast needs CUDA."""
    return ("no-bf16",) if config.train.bf16 and device != "cuda" else ()


def loading(config: RunConfig) -> dict[str, Any]:
    """Return further arguments for a base's `from_pretrained`, beside the dtype: how to load weights in 4 bits.

    The linear layers become 4-bit NormalFloats with double quantisation; they compute in `model.dtype`. Embeddings,
    norms, heads and the output layer stay as they are. Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.

    Raises:
        ModelError: `quantization`, this machine cannot do that.
    """
    if config.model.quantization == "none":
        return {}
    device = choose_device(config.train.device)
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if device not in _QUANTISED_ON or not installed:
        where = f"on the device {device!r}" if installed else "without bitsandbytes"
        raise ModelError(
            f"model.quantization = {config.model.quantization!r} {where}",
            "an NVIDIA GPU, and bitsandbytes installed",
            "pip install 'tsugiki[quantized]' on a machine with CUDA, or model.quantization = \"none\"",
            code="quantization",
        )
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.model.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.model.dtype),
            llm_int8_skip_modules=_WHOLE,
        )
    }


def recompute_activations(base: Base) -> None:
    """Turn on gradient checkpointing: keep only the inputs of blocks, and recompute the rest for the gradient.

    Source: Chen et al. 2016, arXiv:1604.06174, section 4.

    Raises:
        ModelError: `gradient-checkpointing`, the model does not support it.
    """
    try:
        base.transformer.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{type(base.transformer).__name__} does not support model.gradient_checkpointing",
            "a base whose blocks can be computed twice, such as BERT or Llama",
            "set model.gradient_checkpointing = false, and lower train.per_device_train_batch_size",
            code="gradient-checkpointing",
        ) from error


def weight_bytes(base: Base, quantization: str) -> int:
    """Return the bytes that the weights of an unquantised base would take in this quantization."""
    from torch import nn

    sizes = {id(value): value.numel() * value.element_size() for value in base.transformer.parameters()}
    if quantization != "none":
        for name, module in base.transformer.named_modules():
            if isinstance(module, nn.Linear) and not any(re.match(rf"{part}(\.|$)", name) for part in _WHOLE):
                sizes[id(module.weight)] = round(module.weight.numel() * BITS_PER_WEIGHT / 8)
    return sum(sizes.values())
