"""Learn from a reward model: draw answers, score them, and make the better ones likelier."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from tsugiki.common.data.columns import Column
from tsugiki.common.settings import TaskSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Generation, Task, TinyCase, at_rest
from tsugiki.common.tasks.causal_lm import load_decoder
from tsugiki.common.tasks.decoding.generate import complete
from tsugiki.common.tasks.decoding.reward import add_reward_model
from tsugiki.common.tasks.decoding.rollout import Judged, fixed_numbers, judge
from tsugiki.common.tasks.decoding.templates import TEMPLATE_HELP, Template, encode_prompts, prefix_length, shorten
from tsugiki.common.tasks.preference import answer_logps, sequences
from tsugiki.common.tasks.text import CUT, TokenSlice, by_length, encode_slices

if TYPE_CHECKING:
    import torch

    from tsugiki.common.data.shard import Shard

log = logging.getLogger("tsugiki.client")


class RlhfSettings(TaskSettings):
    """Reward (with a 95 % interval over prompts), KL to the bare base in nats an answer, entropy in nats a token."""

    name: Literal["rlhf"] = Field(default="rlhf", description="The task.")
    reward_adapter: str = Field(
        default="",
        description='The reward model: the folder of an exported preference run with objective = "reward" on the '
        "same base. A deployed site loads it only if its own [models] has this name.",
    )
    samples_per_prompt: int = Field(
        default=4,
        ge=2,
        le=64,
        description="Number of answers that are drawn for each prompt and compared. Raise it for steadier training; "
        "time grows with it.",
    )
    max_new_tokens: int = Field(
        default=48,
        ge=1,
        le=4096,
        description="Most tokens of an answer. Raise it if good answers are cut; time grows with it.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="Temperature at which answers are drawn; policy and reference are both taken at it. Raise it if "
        "the answers to a prompt are all alike, lower it if they make no sense.",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="Reward that an answer loses for each nat of drift from the bare base. Raise it if the model "
        "earns rewards with odd answers.",
    )
    max_kl: float = Field(
        default=20.0,
        gt=0,
        description="Nats per answer: while the mean drift of a batch from the bare base is larger, its rewards do "
        "not count, and training only reduces the drift. Lower it if training runs away from the base.",
    )
    missing_end_penalty: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Reward that an answer loses if it does not end within max_new_tokens. Raise it if answers do "
        "not come to an end.",
    )
    template: Template = Field(default="auto", description=TEMPLATE_HELP)

    @property
    def models(self) -> tuple[str, ...]:
        """The reward."""
        return (self.reward_adapter,)

    def resolved(self, source: Callable[[str], str]) -> Self:
        """Return these settings with the source behind the reward's name."""
        return self.model_copy(update={"reward_adapter": source(self.reward_adapter)})


@TASKS.register("rlhf")
class Rlhf(Task):
    """REINFORCE with a leave-one-out baseline (RLOO), against a reward adapter on the same frozen base.

    For each prompt, k answers y_1, ..., y_k are drawn from the policy p, which is the model with the adapter. An
    answer's return is R(y) = r(y) - beta * (log p(y) - log q(y)), with the reward r and the bare base q. The loss has
    the gradient of -mean of (R(y_i) - mean of R(y_j), j != i) * log p(y_i), through log p alone. Source: Ahmadian et
    al. 2024, arXiv:2402.14740, sections 2 and 3, where an answer is one action; the baseline: Kool et al. 2019, "Buy 4
    REINFORCE samples, get a baseline for free!". Each batch is drawn anew and used for one gradient, so no ratio of an
    old policy to a new one is needed.

    The value of the loss is minus the mean return, which its gradient reduces; it may be negative.

    The reward is read at an answer's last token before its end token, as in its training. An answer that does not end
    within `max_new_tokens` is read where it breaks off, and loses `missing_end_penalty`. An answer that is only the
    end token is read at the prompt's last token.

    An answer's loss depends on the other answers to its prompt, so `row_losses` stays False.
    """

    name = "rlhf"
    Settings = RlhfSettings
    lower_is_better = frozenset({"loss", "kl", "kl_above"})
    signed_loss = True
    shares_base = True
    gradient_in_eval_mode = True
    base_kind = "decoder"
    rate_factor = 0.3  # what is drawn is noisy, and the policy must stay near the base

    @property
    def monitor(self) -> str:
        """The mean reward of answers to held-out prompts."""
        return "reward"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The prompt, and its optional input."""
        return (Column("prompt", "text"), Column("input", "text", required=False, blank=True))

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for this task."""
        return "text-generation"

    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load a decoder, and a reward model on the same base tensors if the settings name one; predicting needs none.

        Raises:
            ModelError: `model-not-causal`, see `load_decoder`; and as in `add_reward_model`.
        """
        base = load_decoder(folder, dtype, **how)
        if self.settings.reward_adapter:
            add_reward_model(base, folder, self.settings.reward_adapter, self.settings.template)
        return base

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise prompts. A prompt that leaves no room for an answer loses its middle, not its head or its end.

        The notes contain `shard-texts-cut:COUNT`.
        """
        texts, notes = encode_slices(shard, lambda part: self._tokenise(part, base))
        return Encoded(texts, notes=notes)

    def _tokenise(self, part: Shard, base: Base) -> TokenSlice:
        """Return the tokens of some rows' prompts."""
        prompts = encode_prompts(part, base.tokenizer, self.settings.template)
        head = prefix_length(base.tokenizer, self.settings.template)
        room = self._limit(base) - self._steps(base)
        cut = sum(len(prompt) > room for prompt in prompts)
        return TokenSlice({"prompt": [shorten(prompt, room, head) for prompt in prompts]}, {CUT: cut})

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Draw answers with torch's global generator, and return them with their returns.

        Returns:
            For each of the k answers, with I from 0: `I.input_ids`, `I.attention_mask` and `I.labels` (the answer's
            next token, or `NOTHING`), of shape (rows, tokens); and `returns` and `advantages`, of shape (rows, k).
        """
        import torch

        many = self.settings.samples_per_prompt
        # All first answers come first, then all second ones: entry i * rows + r is answer i to prompt r.
        prompts = [encoded.texts["prompt"][row].tolist() for row in rows] * many
        numbers = torch.rand(len(prompts), self._steps(base), dtype=torch.float64)
        judged = judge(base, prompts, numbers, self.settings.temperature)
        returns = self.returns(judged).view(many, len(rows)).T
        batch = {
            f"{index}.{name}": part
            for name, tensor in sequences(prompts, judged.answers, base.tokenizer.pad_token_id or 0).items()
            for index, part in enumerate(tensor.chunk(many))
        }
        return batch | {"returns": returns, "advantages": advantages(returns)}

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return minus the mean return, with the gradient in the text of the class; computed in float32."""
        with at_rest(network):  # the policy that drew the answers drops nothing
            logps = answer_logps(network, _joined(batch), self.settings.temperature)
        # The surrogate gives the gradient. Its value is taken off again, so that the loss is minus the mean return.
        surrogate = -(batch["advantages"].T.flatten() * logps).mean()
        return surrogate - surrogate.detach() - batch["returns"].mean()

    def returns(self, judged: Judged) -> torch.Tensor:
        """Return the returns of a batch's answers, shape (rows,); above `max_kl` only the drift counts."""
        drift = float(judged.drifts.mean())
        if drift > self.settings.max_kl:
            log.info("a batch's KL is %.1f nats an answer, above task.max_kl: its rewards do not count", drift)
            return self._cost(judged)
        return self._worth(judged)

    def _cost(self, judged: Judged) -> torch.Tensor:
        cost: torch.Tensor = -self.settings.beta * judged.drifts
        return cost

    def _worth(self, judged: Judged) -> torch.Tensor:
        """Return R as in the text of the class, less the penalty for a missing end."""
        return judged.rewards - (1 - judged.ended) * float(self.settings.missing_end_penalty) + self._cost(judged)

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return metrics of k answers to each prompt, with the same draws each time, whatever else the file contains.

        Returns:
            `reward`, the mean over prompts, with `reward_low` and `reward_high`, its 95 % interval over the choice of
            prompts (Student's t on the means of the prompts; of width 0 for one prompt); `kl` in nats per answer, and
            `kl_above`, the share of prompts where it exceeds `max_kl`; `entropy` in nats per token; `length_tokens` of
            an answer; `ended`, the share of answers with an end; `loss`, minus the mean return.
        """
        import torch

        many = self.settings.samples_per_prompt
        prompts = encoded.texts["prompt"].lists()
        numbers = fixed_numbers(prompts, many, self._steps(base))
        found: dict[str, list[torch.Tensor]] = {}
        for rows in by_length(self.lengths(encoded), max(1, batch_size // many)):
            repeated = [prompts[row] for row in rows for _ in range(many)]
            judged = judge(base, repeated, numbers[rows].flatten(0, 1), self.settings.temperature)
            measured = {"return": self._worth(judged), "reward": judged.rewards, "drift": judged.drifts}
            measured |= {"entropy": judged.entropies, "length": judged.lengths, "ended": judged.ended}
            for name, values in measured.items():
                found.setdefault(name, []).append(values.view(-1, many).mean(dim=1).double().cpu())
        means = {name: torch.cat(parts) for name, parts in found.items()}  # one number per prompt
        low, high = interval(means["reward"].tolist())
        return {
            "reward": float(means["reward"].mean()),
            "reward_low": low,
            "reward_high": high,
            "kl": float(means["drift"].mean()),
            "kl_above": float((means["drift"] > self.settings.max_kl).double().mean()),
            "entropy": float(means["entropy"].sum() / means["length"].sum()),
            "length_tokens": float(means["length"].mean()),
            "ended": float(means["ended"].mean()),
            "loss": -float(means["return"].mean()),
        }

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The prompt to answer."""
        return self.columns

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return the policy's `completion` of each row."""
        return complete(base, shard, self.settings.template, generation)

    def _limit(self, base: Base) -> int:
        """Return the most tokens of a prompt and its answer."""
        limit: int = min(self.settings.max_length, base.tokenizer.model_max_length)
        return limit

    def _steps(self, base: Base) -> int:
        """Return the most tokens of an answer: the prompt gets at least half of the room."""
        limit = self._limit(base)
        steps: int = min(self.settings.max_new_tokens, limit - limit // 2)
        return steps

    @classmethod
    def test_case(cls) -> TinyCase:
        """Prompts whose answers are to end soon, which few do by themselves."""
        words = ("party", "clause", "alpha", "beta") * 4
        rows = {"prompt": [f"name the {word} of the {word}s" for word in words]}
        settings = {
            "max_length": 32,
            "template": "plain",
            "max_new_tokens": 2,
            "missing_end_penalty": 1.0,
            "samples_per_prompt": 4,
            "temperature": 0.2,  # else a random base says anything, and little is learned
            "beta": 0.02,
        }
        reward = {"reward_adapter": {"name": "preference", "max_length": 32, "template": "plain"}}
        return TinyCase(settings, rows, "llama", exports=reward)


def advantages(returns: torch.Tensor) -> torch.Tensor:
    """Return each answer's return minus the mean return of its prompt's other answers; both (rows, answers)."""
    others = (returns.sum(dim=1, keepdim=True) - returns) / (returns.shape[1] - 1)
    return returns - others


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t; twice the value itself if there is only one."""
    import numpy as np
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def _joined(batch: Batch) -> Batch:
    """Return all answers as one batch, shape (answers * rows, tokens)."""
    import torch

    indices = range(batch["returns"].shape[1])
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.cat([batch[f"{index}.{name}"] for index in indices]) for name in names}
