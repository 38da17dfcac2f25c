"""Continue texts: what a causal language model says next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.tasks.base import Base, Tokens
from common.tasks.prompts import shorten

_DRAWING = ("temperature", "top_p", "top_k")
"""What a checkpoint may set for drawing, and `transformers` warns about where nothing is drawn."""


@dataclass(frozen=True)
class Generation:
    """How a text is continued.

    Args:
        max_new_tokens: at most.
        temperature: 0: the likeliest token at each step; else tokens are drawn, from logits over so much.
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


def generate(base: Base, prompts: Sequence[Tokens], how: Generation, head: int = 0) -> list[str]:
    """Return what follows each prompt, up to the token for the end, without special tokens.

    Prompts are continued one by one: there is no padding that could change a token.

    Args:
        base: with a tokenizer.
        prompts: each may take at least half of the model's window; of a longer one what comes after its head is cut.
        how: they are continued.
        head: how many tokens of a prompt's beginning stay.
    """
    import torch

    network, tokenizer = base.transformer, base.tokenizer
    device = next(network.parameters()).device
    drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    found = []
    torch.manual_seed(how.seed)
    for prompt in prompts:
        window = tokenizer.model_max_length
        kept = shorten(prompt, max(window // 2, window - how.max_new_tokens), head)
        ids = torch.tensor([kept], device=device)
        with torch.no_grad():
            output = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(how.max_new_tokens, tokenizer.model_max_length - len(kept)),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **(drawn if how.temperature else {"do_sample": False} | dict.fromkeys(_DRAWING)),
            )
        found.append(tokenizer.decode(output[0, len(kept) :], skip_special_tokens=True).strip())
    return found
