"""Answers that a policy draws, and what is thought of them: by the reward model, and by the bare base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsugiki.common.errors import ModelError
from tsugiki.common.rng import generator
from tsugiki.common.tasks.base import Base, Tokens, at_rest
from tsugiki.common.tasks.decoding.generate import draw
from tsugiki.common.tasks.decoding.reward import scores
from tsugiki.common.tasks.preference import answer_logps, sequences

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Judged:
    """Answers and what is thought of them; tensors have the shape (rows,).

    Args:
        answers: tokens, the one for the end included where it was drawn.
        rewards: the reward model's scores.
        drifts: log p(answer) - log q(answer), in nats; p is the policy, q the bare base. Their mean estimates the KL.
        entropies: of what the tokens were drawn from, summed over an answer, in nats.
        lengths: tokens of the answers.
        ended: 1 where the token for the end was drawn, else 0.
    """

    answers: list[Tokens]
    rewards: torch.Tensor
    drifts: torch.Tensor
    entropies: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor


def judge(base: Base, prompts: list[Tokens], uniforms: torch.Tensor, temperature: float) -> Judged:
    """Draw an answer to each prompt, and judge it, in eval mode and without gradients.

    Args:
        base: with the reward model beside it.
        prompts: may repeat.
        uniforms: from which the answers follow, see `generation.draw`.
        temperature: of policy and bare base.

    Raises:
        ModelError: `adapter-missing`, there is no reward model.
    """
    import torch

    if base.reward_model is None:
        raise ModelError(
            "no reward model was loaded", "a reward model", "set task.reward_adapter", code="adapter-missing"
        )
    with torch.no_grad(), at_rest(base.network):
        drawn = draw(base, prompts, uniforms, temperature)
        device = drawn.logps.device
        whole = sequences(prompts, drawn.answers, base.tokenizer.pad_token_id or 0)
        batch = {name: value.to(device) for name, value in whole.items()}
        with base.adapter_disabled():
            reference = answer_logps(base.network, batch, temperature)
        ended = [answer[-1] == base.tokenizer.eos_token_id for answer in drawn.answers]
        told = [answer[:-1] if done else answer for answer, done in zip(drawn.answers, ended, strict=True)]
        rewards = scores(base.reward_model, [prompt + answer for prompt, answer in zip(prompts, told, strict=True)])
    lengths = torch.tensor([float(len(answer)) for answer in drawn.answers], device=device)
    drifts = drawn.logps - reference
    ends = torch.tensor(ended, device=device).float()
    return Judged(drawn.answers, rewards, drifts, drawn.entropies, lengths, ends)


def fixed_numbers(prompts: Sequence[Tokens], many: int, steps: int) -> torch.Tensor:
    """Return the draws of an evaluation, shape (rows, answers, steps): a prompt's are the same wherever it stands."""
    import torch

    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        text = json.dumps(prompt)
        found.append(torch.from_numpy(generator(0, "evaluation-answers", text, seen[text]).random((many, steps))))
        seen[text] += 1
    return torch.stack(found)
