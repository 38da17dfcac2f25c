"""Draw answers from the policy, and score them with the reward model and the bare base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsugiki.common.errors import ModelError
from tsugiki.common.rng import generator
from tsugiki.common.tasks.base import Base, at_rest
from tsugiki.common.tasks.decoding.generate import draw
from tsugiki.common.tasks.decoding.reward import scores
from tsugiki.common.tasks.preference import answer_logps, sequences
from tsugiki.common.tasks.rows import Tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Judged:
    """Answers with their scores; tensors have the shape (rows,).

    Args:
        answers: the tokens of each answer, including the end token if it was drawn.
        rewards: the reward model's scores.
        drifts: log p(answer) - log q(answer), in nats; p is the policy, q the bare base. Their mean estimates the KL.
        entropies: of the policy's distribution, summed over the tokens of an answer, in nats.
        lengths: tokens of the answers.
        ended: 1 if the end token was drawn, else 0.
    """

    answers: list[Tokens]
    rewards: torch.Tensor
    drifts: torch.Tensor
    entropies: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor


def judge(base: Base, prompts: list[Tokens], uniforms: torch.Tensor, temperature: float) -> Judged:
    """Draw an answer to each prompt and score it, in eval mode and without gradients.

    Args:
        base: with a reward model.
        prompts: token ids; prompts may repeat.
        uniforms: random numbers that determine the answers, see `generate.draw`.
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
        # The reward was trained on answers without the end token.
        bodies = [answer[:-1] if done else answer for answer, done in zip(drawn.answers, ended, strict=True)]
        rewards = scores(base.reward_model, [prompt + body for prompt, body in zip(prompts, bodies, strict=True)])
    lengths = torch.tensor([float(len(answer)) for answer in drawn.answers], device=device)
    drifts = drawn.logps - reference
    ends = torch.tensor(ended, device=device).float()
    return Judged(drawn.answers, rewards, drifts, drawn.entropies, lengths, ends)


def fixed_numbers(prompts: Sequence[Tokens], many: int, steps: int) -> torch.Tensor:
    """Return an evaluation's draws, shape (rows, answers, steps). They depend on the prompt, not on its place."""
    import torch

    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        # Seeded by the prompt and by how often it came before, so that equal prompts get different draws.
        text = json.dumps(prompt)
        found.append(torch.from_numpy(generator(0, "evaluation-answers", text, seen[text]).random((many, steps))))
        seen[text] += 1
    return torch.stack(found)
