"""Continue texts: what a causal language model says next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.tasks.base import Base, Tokens

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


def generate(base: Base, prompts: Sequence[Tokens], how: Generation) -> list[str]:
    """Return what follows each prompt, up to the token for the end, without special tokens.

    A prompt that leaves no room in the model's window loses its beginning. Prompts are continued one by one: there is
    no padding that could change a token.
    """
    import torch

    network, tokenizer = base.transformer, base.tokenizer
    device = next(network.parameters()).device
    drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    found = []
    torch.manual_seed(how.seed)
    for prompt in prompts:
        kept = prompt[max(0, len(prompt) - max(1, tokenizer.model_max_length - how.max_new_tokens)) :]
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
