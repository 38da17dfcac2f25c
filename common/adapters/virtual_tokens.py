"""Virtual tokens before a text: prompt tuning, P-tuning, prefix tuning.

The trained module is peft's; its connection to the base is ours. peft's own wrapper leaves the virtual tokens in a
language model's logits and in the states that sentence embeddings pool, reads a decoder's score at the padding, and
cannot be switched off on classifiers. Here all outputs of the base model are without the virtual tokens, so that every
task finds the positions that it expects.

Virtual tokens are looked up for each row of a batch, so that Opacus finds gradients row by row.
"""

from __future__ import annotations

import inspect
import types
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field

from tsugiki.common.adapters.base import ADAPTERS, Rates, RateTable
from tsugiki.common.adapters.own_base import OwnMethod
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import AdapterSettings

_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "electra"})
_DECODERS = frozenset({"llama", "mistral", "qwen2", "gpt2"})
_WITHOUT_CACHE = frozenset({"distilbert", "mpnet"})
_IMAGES = dict.fromkeys(("vit", "tsugiki-cnn"), "it reads images, which have no words to put virtual ones before")

_PREFIX_STD = 0.02
"""BERT's own initial standard deviation. Equal rows, such as zeros, would stay equal for ever."""


class VirtualTokensSettings(AdapterSettings):
    """What all methods with virtual tokens have."""

    num_virtual_tokens: int = Field(
        default=20,
        ge=1,
        le=512,
        description="Number of trained tokens before every text. Raise it if the adapter learns too little; texts "
        "are cut that many tokens earlier.",
    )


class PromptSettings(VirtualTokensSettings):
    """Prompt tuning: the virtual tokens' embeddings, at those of words drawn from the vocabulary in the beginning."""

    method: Literal["prompt"] = Field(default="prompt", description="The adapter method.")


class PTuningSettings(VirtualTokensSettings):
    """P-tuning: a small network makes the virtual tokens' embeddings, so that they are not trained apart."""

    method: Literal["p-tuning"] = Field(default="p-tuning", description="The adapter method.")
    encoder_hidden_size: int = Field(
        default=128,
        ge=1,
        le=8192,
        description="Width of the two inner layers of the network that makes the embeddings. Lower it to send fewer "
        "bytes.",
    )


class PrefixSettings(VirtualTokensSettings):
    """Prefix tuning: keys and values of the virtual tokens in every block."""

    method: Literal["prefix"] = Field(default="prefix", description="The adapter method.")


class VirtualTokens(OwnMethod):
    """The base class of methods with virtual tokens."""

    unfit = _IMAGES
    starts_at_base = False

    @property
    def positions(self) -> int:
        """Return the number of the base's positions that the virtual tokens take."""
        return int(self.settings.num_virtual_tokens)

    @abstractmethod
    def encoder(self, base_model: Any, common: dict[str, Any]) -> Any:
        """Return peft's module, which maps the numbers of virtual tokens, shape (rows, tokens), to their vectors.

        Args:
            base_model: the transformer without head.
            common: the arguments that all of peft's configurations take.
        """

    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Add the module to the base model, and replace its `forward` by ours.

        Raises:
            ModelError: `adapter-unsupported`, the architecture is not supported.
        """
        if reason := self.why_not(transformer.config.model_type):
            raise ModelError(
                f"adapter.method = {self.name!r} does not fit {type(transformer).__name__}: {reason}",
                f"one of {', '.join(sorted(self.model_types or ()))}",
                'set adapter.method = "lora"',
                code="adapter-unsupported",
            )
        base_model = transformer.base_model
        config = transformer.config
        embeddings = base_model.get_input_embeddings().weight
        common = {
            "num_virtual_tokens": self.positions,
            "token_dim": embeddings.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
        }
        base_model.virtual_tokens = self.encoder(base_model, common).to(embeddings.device)
        base_model.virtual_tokens.count = self.positions
        base_model.adapter_on = True
        # No hooks: sentence-transformers calls `forward` itself. A method, unlike a closure, is copied with its model.
        base_model.forward = types.MethodType(_forward, base_model)


@ADAPTERS.register("prompt")
class Prompt(VirtualTokens):
    """Prompt tuning. Source: Lester et al. 2021, arXiv:2104.08691, section 2."""

    name = "prompt"
    Settings = PromptSettings
    rates = RateTable(
        adamw=Rates(encoder=3e-2, decoder=3e-2, vision=3e-2),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=1.0),
    )
    """Not tried here. Lester et al. take 0.3 with another optimizer; peft's examples 3e-2."""
    model_types = _ENCODERS | _DECODERS | _WITHOUT_CACHE

    def encoder(self, base_model: Any, common: dict[str, Any]) -> Any:
        """Return an embedding."""
        from peft import PromptEmbedding, PromptTuningConfig

        config = PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
        return PromptEmbedding(config, base_model.get_input_embeddings())


@ADAPTERS.register("p-tuning")
class PTuning(VirtualTokens):
    """P-tuning, with a perceptron. Source: Liu et al. 2021, arXiv:2103.10385, section 3."""

    name = "p-tuning"
    Settings = PTuningSettings
    rates = RateTable(
        adamw=Rates(encoder=2e-3, decoder=5e-3, vision=2e-3),
        sgd=Rates(encoder=0.3, decoder=0.3, vision=0.3),
    )
    """Not tried here. A small network is trained, as with LoRA."""
    model_types = _ENCODERS | _DECODERS | _WITHOUT_CACHE

    def encoder(self, base_model: Any, common: dict[str, Any]) -> Any:
        """Return an embedding with a perceptron on it."""
        from peft import PromptEncoder, PromptEncoderConfig

        width = self.settings.encoder_hidden_size
        return PromptEncoder(PromptEncoderConfig(**common, encoder_hidden_size=width))


@ADAPTERS.register("prefix")
class Prefix(VirtualTokens):
    """Prefix tuning. Source: Li and Liang 2021, arXiv:2101.00190, section 4.2; without the perceptron.

    On encoders: Liu et al. 2022, arXiv:2110.07602, section 3.2.
    """

    name = "prefix"
    Settings = PrefixSettings
    rates = RateTable(
        adamw=Rates(encoder=1e-2, decoder=3e-2, vision=1e-2),
        sgd=Rates(encoder=1.0, decoder=1.0, vision=1.0),
    )
    """Not tried here. peft's examples take 1e-2."""
    model_types = _ENCODERS | _DECODERS
    unfit = _IMAGES | dict.fromkeys(_WITHOUT_CACHE, "its blocks take no keys and values from outside")

    def encoder(self, base_model: Any, common: dict[str, Any]) -> Any:
        """Return an embedding whose rows hold keys and values of all blocks."""
        from peft import PrefixEncoder, PrefixTuningConfig
        from torch import nn

        config = base_model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        encoder = PrefixEncoder(PrefixTuningConfig(**common | {"token_dim": heads * width}))
        nn.init.normal_(encoder.embedding.weight, std=_PREFIX_STD)
        encoder.shape = (config.num_hidden_layers * 2, heads, width)
        return encoder


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the base model with virtual tokens before the text; its outputs are without them."""
    plain = type(module).forward
    if not module.adapter_on:
        return plain(module, *args, **kwargs)
    names = list(inspect.signature(plain).parameters)[1:]
    inputs = dict(zip(names, args, strict=False)) | kwargs
    past = inputs.get("past_key_values")
    first = past is None or past.get_seq_length() == 0  # else the cache has the virtual tokens already
    prefix = hasattr(module.virtual_tokens, "shape")
    count = module.virtual_tokens.count
    text = inputs.get("input_ids")
    if text is None:
        text = inputs["inputs_embeds"]
    numbers = _numbers(count, text)
    if first and prefix:
        inputs["past_key_values"] = _prefix(module, numbers, past)
    elif first:
        words = inputs.get("inputs_embeds")
        if words is None:
            words = module.get_input_embeddings()(text)
        inputs["inputs_embeds"] = _join(module.virtual_tokens(numbers).to(words.dtype), words)
        inputs["input_ids"] = None
    _adjust(module, inputs, numbers, inside=first and not prefix)
    # A prefix is in the cache only, so the hidden states have no virtual tokens to remove.
    if prefix or not first:
        return plain(module, **inputs)
    with _without_pooler(module) as pooler:
        output = plain(module, **inputs)
    return _cut(pooler, output, count)


def _numbers(count: int, text: Any) -> Any:
    """Return the numbers of the virtual tokens for every row of a text, shape (rows, count)."""
    import torch

    return torch.arange(count, device=text.device).expand(len(text), count)


def _join(front: Any, back: Any) -> Any:
    import torch

    return torch.cat([front, back.to(front.dtype)], dim=1)


def _prefix(module: Any, numbers: Any, past: Any) -> Any:
    """Return a cache with keys and values of the virtual tokens, each of shape (rows, heads, tokens, width)."""
    from transformers import DynamicCache

    if past is None:
        past = DynamicCache()
    vectors = module.virtual_tokens(numbers).to(module.dtype)
    parts = vectors.view(*numbers.shape, *module.virtual_tokens.shape).permute(2, 0, 3, 1, 4)
    # Each block has two parts: keys, then values.
    for block in range(len(parts) // 2):
        past.update(parts[2 * block], parts[2 * block + 1], block)
    return past


def _adjust(module: Any, inputs: dict[str, Any], numbers: Any, *, inside: bool) -> None:
    """Extend masks and token types by the virtual tokens, and shift the positions of the text.

    Args:
        module: the base model.
        inputs: of its forward; changed in place.
        numbers: of the virtual tokens.
        inside: whether the virtual tokens are in the text itself, not in the cache.
    """
    import torch

    if inputs.get("position_ids") is not None:
        places = (inputs["position_ids"] + numbers.shape[1]).expand(len(numbers), -1)
        inputs["position_ids"] = _join(numbers, places) if inside else places
    if inside and inputs.get("token_type_ids") is not None:
        inputs["token_type_ids"] = _join(torch.zeros_like(numbers), inputs["token_type_ids"])
    if inputs.get("attention_mask") is not None:
        mask = _join(torch.ones_like(numbers), inputs["attention_mask"])
        if module.config.model_type in _ENCODERS and not inside:
            # An encoder's own mask has no room for keys from the cache, so it gets a finished one.
            mask = (1 - mask[:, None, None].to(module.dtype)) * torch.finfo(module.dtype).min
        inputs["attention_mask"] = mask


@contextmanager
def _without_pooler(module: Any) -> Iterator[Any]:
    """Take a base model's pooler off inside a `with` block, and yield it: there, the first token is a virtual one.

    An identity replaces it, so that the output keeps its form.
    """
    from torch import nn

    pooler = getattr(module, "pooler", None)
    try:
        if pooler is not None:
            module.pooler = nn.Identity()
        yield pooler
    finally:
        if pooler is not None:
            module.pooler = pooler


def _cut(pooler: Any, output: Any, count: int) -> Any:
    """Remove the virtual tokens from the hidden states, and pool from the first word."""
    output.last_hidden_state = output.last_hidden_state[:, count:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(states[:, count:] for states in output.hidden_states)
    if pooler is not None:
        output.pooler_output = pooler(output.last_hidden_state)
    return output
