"""What depends on a site's machine: its device, a base that is held in 4 bits, activations that are computed twice."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import ModelError

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
    from tsugiki.common.tasks.base import Base

BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a linear layer as `nf4`: each block of 64 has a constant of 8 bits, and 256 of these one of 32.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, "Double Quantization".
"""

_QUANTISED_ON = ("cuda",)
_WHOLE = [
    r"(.*\.)?(pre_classifier|classifier|score|head|classification_head|logits_proj|sequence_summary|pooler|lm_head)",
    "^dense",
]
"""Patterns for what tasks train in full, or may, as 4 bits take no gradient, and for the output layer.

They match from the start of a name to the end of one of its parts. A head called `dense`, as EuroBERT's, is one at the
top alone: blocks have layers of that name.
"""


def choose_device(wanted: str) -> str:
    """Return "cuda", "mps" or "cpu"; "auto" takes the first that is there."""
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
    """Return what a run asks of a device of this type and does not get: `no-bf16`, autocast is for CUDA only."""
    return ("no-bf16",) if config.train.bf16 and device != "cuda" else ()


def loading(config: RunConfig) -> dict[str, Any]:
    """Return what a base's `from_pretrained` has to know of the run, beside the type: how to hold weights in 4 bits.

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
        raise ModelError(
            f"model.quantization = {config.model.quantization!r} "
            + (f"on the device {device!r}" if installed else "without bitsandbytes"),
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
    """Let a bare base keep the inputs of its blocks only, and compute the rest once more for the gradient.

    Source: Chen et al. 2016, arXiv:1604.06174, section 4.

    Raises:
        ModelError: `gradient-checkpointing`, the model cannot.
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
    """Return the size of a base's weights in memory, where they are loaded unquantised and are to be held otherwise."""
    from torch import nn

    sizes = {id(value): value.numel() * value.element_size() for value in base.transformer.parameters()}
    if quantization != "none":
        for name, module in base.transformer.named_modules():
            if isinstance(module, nn.Linear) and not any(re.match(rf"{part}(\.|$)", name) for part in _WHOLE):
                sizes[id(module.weight)] = round(module.weight.numel() * BITS_PER_WEIGHT / 8)
    return sum(sizes.values())
