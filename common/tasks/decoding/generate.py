"""Continue texts with a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsugiki.common.tasks.base import Base, Generation
from tsugiki.common.tasks.decoding.templates import Template, encode_prompts, prefix_length, shorten
from tsugiki.common.tasks.rows import Tokens

if TYPE_CHECKING:
    import torch

    from tsugiki.common.data.shard import Shard

_DRAWING = ("temperature", "top_p", "top_k")
"""Settings for drawing that a checkpoint may have; `transformers` warns about them if nothing is drawn."""


def generate(base: Base, prompts: Sequence[Tokens], generation: Generation, head: int = 0) -> list[str]:
    """Return the continuation of each prompt up to the end token, without special tokens.

    Prompts are continued one by one, so that no padding can change a token.

    Args:
        base: with a tokenizer.
        prompts: each may take at least half of the model's window. A longer one is cut after its head.
        generation: how they are continued.
        head: number of tokens at a prompt's beginning that are never cut.
    """
    import torch

    network = base.transformer
    tokenizer = base.tokenizer
    device = next(network.parameters()).device
    sampling: dict[str, Any] = {"do_sample": False} | dict.fromkeys(_DRAWING)
    if generation.temperature:
        sampling = {"do_sample": True, "temperature": generation.temperature, "top_k": 0, "top_p": 1.0}
    found = []
    torch.manual_seed(generation.seed)
    for prompt in prompts:
        window = tokenizer.model_max_length
        kept = shorten(prompt, max(window // 2, window - generation.max_new_tokens), head)
        ids = torch.tensor([kept], device=device)
        with torch.no_grad():
            output = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(generation.max_new_tokens, tokenizer.model_max_length - len(kept)),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **sampling,
            )
        found.append(tokenizer.decode(output[0, len(kept) :], skip_special_tokens=True).strip())
    return found


def complete(base: Base, shard: Shard, template: Template, generation: Generation) -> list[dict[str, str]]:
    """Return the `completion` of each row's prompt in its template; see `generate`."""
    prompts = encode_prompts(shard, base.tokenizer, template)
    head = prefix_length(base.tokenizer, template)
    return [{"completion": text} for text in generate(base, prompts, generation, head)]


@dataclass(frozen=True)
class Drawn:
    """Answers drawn from a model.

    Args:
        answers: the tokens of each answer, including the end token if it was drawn.
        logps: the log-probability of each answer, shape (rows,), float32, in nats.
        entropies: of the distributions that an answer's tokens were drawn from, summed, shape (rows,), in nats.
    """

    answers: list[Tokens]
    logps: torch.Tensor
    entropies: torch.Tensor


def draw(base: Base, prompts: Sequence[Tokens], uniforms: torch.Tensor, temperature: float = 1.0) -> Drawn:
    """Draw an answer to each prompt from the model's own probabilities, all prompts at once.

    A token is the one where its row's number falls in the cumulative distribution over the vocabulary (inverse
    transform sampling). So a row's answer depends on its prompt and its numbers only, not on the other rows.

    Args:
        base: in eval mode.
        prompts: not empty; each leaves room for an answer in the model's window.
        uniforms: in [0, 1), shape (rows, most tokens of an answer), on the CPU.
        temperature: divides the logits; above 0.
    """
    import torch

    network = base.transformer
    end = base.tokenizer.eos_token_id
    device = next(network.parameters()).device
    longest = max(map(len, prompts))
    # Padded on the left, so that all answers begin at the same place.
    padded = [[end] * (longest - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=device)
    mask = torch.tensor(real, device=device)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = None
    answers: list[Tokens] = [[] for _ in prompts]
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    logps, entropies = torch.zeros(2, len(prompts), device=device)
    with torch.no_grad():
        for drawn in uniforms.T:
            output = network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            # `going` is 0 for answers that have ended: they gain no more tokens, log-probability or entropy.
            chances = (output.logits[:, -1].float() / temperature).log_softmax(dim=1)
            tokens = _where(chances, drawn).to(device)
            logps += going * chances.gather(1, tokens[:, None])[:, 0]
            entropies += going * torch.special.entr(chances.exp()).sum(dim=1)
            for row in going.nonzero()[:, 0].tolist():
                answers[row].append(int(tokens[row]))
            going &= tokens != end
            if not going.any():
                break
            # The cache holds everything before, so the next step reads one token per row.
            ids = tokens[:, None]
            places = places[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return Drawn(answers, logps, entropies)


def _where(logps: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the token into whose share of [0, 1) each row's number falls, shape (rows,), on the CPU.

    Args:
        logps: of shape (rows, vocabulary).
        uniforms: of shape (rows,).
    """
    import torch

    cumulative = logps.cpu().double().exp().cumsum(dim=1)
    # The total differs from 1 by rounding, so numbers are scaled to it.
    found = torch.searchsorted(cumulative, uniforms[:, None].double() * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp(max=logps.shape[1] - 1)
