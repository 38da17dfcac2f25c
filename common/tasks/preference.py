"""Learn from pairs of answers with a preferred one: train a reward model, or use direct preference optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tsugiki.common.data.columns import Column
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import TaskSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Generation, Task, TinyCase, at_rest
from tsugiki.common.tasks.causal_lm import joined, limit_length, load_decoder
from tsugiki.common.tasks.decoding.generate import complete
from tsugiki.common.tasks.decoding.templates import (
    TEMPLATE_HELP,
    Template,
    encode_answers,
    encode_prompts,
    fit,
    prefix_length,
)
from tsugiki.common.tasks.decoding.token_losses import NOTHING, token_losses
from tsugiki.common.tasks.rows import AnyTokens, Tokens
from tsugiki.common.tasks.text import CUT, TokenSlice, by_length, encode_slices, pad, padding_id

if TYPE_CHECKING:
    import torch

SIDES = ("chosen", "rejected")


class PreferenceSettings(TaskSettings):
    """Accuracy (the preferred answer ranks higher), margin and loss; pairs of equal answers are left out of them."""

    name: Literal["preference"] = Field(default="preference", description="The task.")
    objective: Literal["reward", "dpo"] = Field(
        default="reward",
        description='"reward" trains a head that scores answers; "dpo" trains the model itself to prefer the chosen '
        'answers. Use "reward" if an rlhf run is to follow.',
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description='Objective "dpo": weight of the drift from the bare base. Raise it if the model drifts too far '
        "from the base.",
    )
    template: Template = Field(default="auto", description=TEMPLATE_HELP)


@TASKS.register("preference")
class Preference(Task):
    """The pairwise logistic loss of Bradley and Terry, -log sigmoid(margin), over the two answers to a prompt.

    reward: margin = r(chosen) - r(rejected), with a linear head on the last token's hidden state
    (`AutoModelForSequenceClassification`). Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5, equation 1.

    dpo: margin = beta * (log p(chosen) - log p(rejected) - log q(chosen) + log q(rejected)) of whole answers. p is the
    model with the adapter, q without, so memory holds one base. Source: Rafailov et al. 2023, arXiv:2305.18290,
    equation 7.

    A pair is two sequences of a batch, so DP-SGD cannot take the gradient of one row: `row_losses` stays False.
    """

    name = "preference"
    Settings = PreferenceSettings
    base_kind = "decoder"
    rate_factor = 0.5  # a pair pushes one way only; at the rate of instructions, training in one place went astray

    @property
    def monitor(self) -> str:
        """Accuracy."""
        return "accuracy"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The prompt, its optional input, and both answers."""
        prompt = (Column("prompt", "text"), Column("input", "text", required=False, blank=True))
        return (*prompt, Column("chosen", "text"), Column("rejected", "text"))

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for what is trained; None for a reward model."""
        return "text-generation" if self.settings.objective == "dpo" else None

    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load a decoder; for the objective "reward" it gets a new head, `score`.

        Raises:
            ModelError: `model-not-causal`, the base is no decoder.
        """
        if self.settings.objective == "dpo":
            return load_decoder(folder, dtype, **how)
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, num_labels=1, use_safetensors=True, trust_remote_code=False, **how
        )
        if not hasattr(network, "score"):
            raise ModelError(
                f"{type(network).__name__} has no module 'score': the model in {folder.name!r} is no decoder",
                "a decoder such as Llama, whose last token has read the whole answer",
                "choose another base",
                code="model-not-causal",
            )
        if network.config.pad_token_id is None:
            network.config.pad_token_id = padding_id(tokenizer)
        limit_length(tokenizer, network)
        return Base(network, network, tokenizer, ("score",))

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise prompts and answers. A prompt that is too long is cut alike for both answers of a pair.

        A reward is read at the last token of an answer before its end token. `transformers` finds that place by the
        padding token, which can be the end token too. The notes contain `shard-texts-cut:COUNT` and
        `shard-pairs-equal:COUNT`.
        """
        texts, notes = encode_slices(shard, lambda part: self._tokenise(part, base))
        reference = np.full((len(shard), 2), np.nan, np.float32) if self.settings.objective == "dpo" else None
        return Encoded(texts, reference=reference, notes=notes)

    def _tokenise(self, part: Shard, base: Base) -> TokenSlice:
        """Return the tokens of some rows' prompts and answers."""
        limit = min(self.settings.max_length, base.tokenizer.model_max_length)
        prompts = encode_prompts(part, base.tokenizer, self.settings.template)
        pairs = [encode_answers(part.columns[side], base.tokenizer) for side in SIDES]
        if self.settings.objective == "reward":
            pairs = [[answer[:-1] for answer in answers] for answers in pairs]
        texts: dict[str, list[Tokens]] = {"prompt": [], "chosen": [], "rejected": []}
        cut = 0
        head = prefix_length(base.tokenizer, self.settings.template)
        for prompt, chosen, rejected in zip(prompts, *pairs, strict=True):
            # The prompt is cut for the longer answer, so that both answers follow the same prompt.
            longest = max(chosen, rejected, key=len)
            kept, _ = fit(prompt, longest, limit, head)
            cut += len(prompt) + len(longest) > limit
            texts["prompt"].append(kept)
            texts["chosen"].append(chosen[: limit - len(kept)])
            texts["rejected"].append(rejected[: limit - len(kept)])
        equal = sum(map(_equal, texts["chosen"], texts["rejected"]))
        return TokenSlice(texts, {CUT: cut, "shard-pairs-equal": equal})

    def lengths(self, encoded: Encoded) -> npt.NDArray[np.int64]:
        """Return the tokens of each prompt with its longer answer: both answers are padded alike."""
        answers = [encoded.texts[side].lengths() for side in SIDES]
        longest: npt.NDArray[np.int64] = encoded.texts["prompt"].lengths() + np.maximum(*answers)
        return longest

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return `SIDE.input_ids` and `SIDE.attention_mask` of shape (rows, tokens) for chosen and rejected.

        For dpo also `SIDE.labels` (the answer's next token, or `NOTHING`) and `reference`, the log-probability of both
        answers under the bare base, shape (rows, 2). It is computed when a row is first used, and kept.
        """
        import torch

        prompts = [encoded.texts["prompt"][row] for row in rows] * len(SIDES)
        answers = [encoded.texts[side][row] for side in SIDES for row in rows]
        pad_id = base.transformer.config.pad_token_id or 0  # decoders find an answer's end by it
        both = sequences(prompts, answers, pad_id)
        if encoded.reference is None:
            del both["labels"]  # a reward is read at the end
        batch = {
            f"{side}.{name}": half
            for name, tensor in both.items()
            for side, half in zip(SIDES, tensor.chunk(2), strict=True)
        }
        if encoded.reference is not None:
            if np.isnan(encoded.reference[list(rows)]).any():
                encoded.reference[list(rows)] = _without_adapter(base, both)
            batch["reference"] = torch.from_numpy(encoded.reference[list(rows)])
        return batch

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the mean of -log sigmoid(margin) over the pairs, computed in float32."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(self.margins(network, batch)).mean()

    def margins(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the margin of each pair's chosen answer over the rejected one, shape (rows,), float32."""
        if self.settings.objective == "reward":
            scores: torch.Tensor = network(**_both(batch), use_cache=False).logits[:, 0].float()
        else:
            scores = self.settings.beta * (answer_logps(network, _both(batch)) - batch["reference"].T.flatten())
        chosen, rejected = scores.chunk(2)
        return chosen - rejected

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return accuracy (a margin of 0 counts as wrong), mean margin and loss over the pairs whose answers differ."""
        import torch
        from torch.nn.functional import logsigmoid

        device = next(base.network.parameters()).device
        texts = encoded.texts
        # Pairs of equal answers have a margin of 0 by construction, and say nothing about the model.
        differ = [row for row in range(len(encoded)) if not _equal(texts["chosen"][row], texts["rejected"][row])]
        lengths = self.lengths(encoded)[differ]
        found = [torch.zeros(0)]
        for chosen in by_length(lengths, batch_size):
            batch = self.batch(encoded, [differ[index] for index in chosen], base)
            found.append(self.margins(base.network, {name: tensor.to(device) for name, tensor in batch.items()}).cpu())
        margins = torch.cat(found)
        if not len(margins):
            return {"accuracy": 0.0, "margin": 0.0, "loss": float(np.log(2))}
        return {
            "accuracy": float((margins > 0).float().mean()),
            "margin": float(margins.mean()),
            "loss": float(-logsigmoid(margins).mean()),
        }

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The prompt; for a reward also the answer, as `chosen`."""
        return self.columns[: 3 if self.settings.objective == "reward" else 2]

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return the `reward` of each row's answer; for dpo the model's `completion`."""
        import torch

        if self.settings.objective == "dpo":
            return complete(base, shard, self.settings.template, generation)
        # `encode` wants pairs, so each answer is paired with itself.
        rows = Shard({**shard.columns, "rejected": shard.columns["chosen"]})
        encoded = self.encode(rows, base)
        device = next(base.network.parameters()).device
        rewards = []
        for row in range(len(encoded)):
            tokens = [*encoded.texts["prompt"][row].tolist(), *encoded.texts["chosen"][row].tolist()]
            with torch.no_grad():
                rewards.append(float(base.network(input_ids=torch.tensor([tokens], device=device)).logits[0, 0]))
        return [{"reward": reward} for reward in rewards]

    @classmethod
    def test_case(cls) -> TinyCase:
        """Pairs of which the good one is preferred."""
        words = [("party", "clause"), ("clause", "party"), ("alpha", "beta"), ("number", "shall")] * 6
        rows = {
            "prompt": [f"name the {one} of a {other}" for one, other in words],
            "chosen": [f"good {other} {one}" for one, other in words],
            "rejected": [f"bad {other} {one}" for one, other in words],
        }
        return TinyCase({"max_length": 32, "template": "plain"}, rows, "llama")

    @classmethod
    def extra_cases(cls) -> dict[str, TinyCase]:
        """The same pairs for the other objective."""
        case = cls.test_case()
        return {"dpo": TinyCase({**case.settings, "objective": "dpo"}, case.rows, case.model_type)}


def _equal(chosen: AnyTokens, rejected: AnyTokens) -> bool:
    return np.array_equal(chosen, rejected)


def _both(batch: Batch) -> Batch:
    """Return the chosen and then the rejected sequences as one batch, shape (2 * rows, tokens)."""
    import torch

    names = [name.partition(".")[2] for name in batch if name.startswith("chosen.")]
    return {name: torch.cat([batch[f"{side}.{name}"] for side in SIDES]) for name in names}


def sequences(prompts: Sequence[AnyTokens], answers: Sequence[AnyTokens], pad_id: int) -> Batch:
    """Return prompts with their answers, padded on the right, as `input_ids`, `attention_mask` and `labels`.

    All have the shape (rows, tokens). Labels are the answer's next token, and `NOTHING` elsewhere.

    Args:
        prompts: token ids.
        answers: token ids, one answer per prompt.
        pad_id: the padding token.
    """
    rows = [joined(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = pad([tokens for tokens, _ in rows], pad_id)
    return {"input_ids": ids, "attention_mask": mask, "labels": pad([labels for _, labels in rows], NOTHING)[0]}


def answer_logps(network: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probability of each sequence's answer (the tokens in `labels`), shape (rows,), float32."""
    import torch

    predicted = batch["labels"] != NOTHING
    losses = token_losses(network, batch, temperature)
    # All predicted tokens are in one list; their log-probabilities are summed by row.
    return torch.zeros(len(predicted), device=losses.device).index_add(0, predicted.nonzero()[:, 0], -losses)


def _without_adapter(base: Base, both: Batch) -> npt.NDArray[np.float32]:
    """Return the bare base's log-probabilities of the chosen and the rejected answers, shape (rows, 2)."""
    import torch

    device = next(base.network.parameters()).device
    with torch.no_grad(), at_rest(base.network), base.adapter_disabled():
        logps = answer_logps(base.network, {name: tensor.to(device) for name, tensor in both.items()})
    found: npt.NDArray[np.float32] = torch.stack(logps.chunk(2), dim=1).cpu().numpy()
    return found
