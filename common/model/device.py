"""Device selection, 4-bit loading and gradient checkpointing."""

from __future__ import annotations

import importlib.util
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from tsugiki.common.errors import ModelError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tsugiki.common.config.run import RunConfig, TrainSection
    from tsugiki.common.tasks.base import Base

BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a linear layer's weight in `nf4`: 64 weights share an 8-bit constant, and 256 of these a 32-bit one.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, "Double Quantization".
"""

Precision = Literal["float32", "bf16"]

BF16_WORTH = {
    "cpu": "trains about 1.5 times and evaluates about 1.9 times as fast (measured on AVX512-BF16)",
    "cuda": "uses its tensor cores (not measured)",
}
"""What `train.precision = "bf16"` brings, by the type of device; `scripts/bench/precision.py` measures it."""

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


def has_bf16(device: str) -> bool:
    """Return whether this type of device computes bfloat16 matrix products by itself, without emulation."""
    import torch

    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        # Without these instructions bfloat16 is emulated, and slower than float32.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def actual_precision(train: TrainSection, device: str) -> Precision:
    """Return the precision of matrix products on this type of device: bf16 if it was chosen and is there."""
    return "bf16" if train.precision == "bf16" and has_bf16(device) else "float32"


def computing(train: TrainSection, device: str) -> AbstractContextManager[Any]:
    """Return a context for training, evaluation and prediction in the run's precision on this type of device.

    Under bf16, matrix products take bfloat16 inputs; torch keeps sums that need it, such as losses, in float32.
    """
    if actual_precision(train, device) == "float32":
        return nullcontext()
    import torch

    return torch.autocast(device, torch.bfloat16)


def device_notes(config: RunConfig, device: str) -> tuple[str, ...]:
    """Return notes on settings that this type of device ignores: `no-bf16`, because it has no bfloat16."""
    asked = config.train.precision == "bf16"
    return ("no-bf16",) if asked and not has_bf16(device) else ()


def precision_advice(config: RunConfig, device: str) -> str:
    """Return a line on what bf16 would bring on this type of device; empty if the run has chosen, or it has none."""
    chosen = config.train.precision != "auto" or config.model.dtype != "float32"
    if chosen or config.privacy.examples.enabled or not has_bf16(device):
        return ""
    return f'train.precision = "auto" computes in float32; this device has bfloat16: "bf16" {BF16_WORTH[device]}'


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
