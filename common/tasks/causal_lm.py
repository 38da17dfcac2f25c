"""Predict each next token: of plain texts, or of the answers to instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tsugiki.common.data.columns import Column
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import TaskSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Generation, Task, TinyCase
from tsugiki.common.tasks.decoding.generate import complete, generate
from tsugiki.common.tasks.decoding.templates import (
    TEMPLATE_HELP,
    Template,
    encode_answers,
    encode_prompts,
    encode_texts,
    fit_all,
    prefix_length,
)
from tsugiki.common.tasks.decoding.token_losses import NOTHING, token_hits, token_losses
from tsugiki.common.tasks.rows import AnyTokens
from tsugiki.common.tasks.text import CUT, TokenSlice, by_length, encode_slices, pad

if TYPE_CHECKING:
    import torch

    from tsugiki.common.data.shard import Shard

_EXP_LIMIT = 700.0
"""The exponential of a larger number overflows a float."""


class CausalLmSettings(TaskSettings):
    """Loss, perplexity and accuracy, over all predicted tokens of all rows."""

    name: Literal["causal-lm"] = Field(default="causal-lm", description="The task.")
    format: Literal["text", "instruction"] = Field(
        default="text",
        description='"text" predicts every token of a column text; "instruction" reads the columns prompt, '
        'completion and, if there is one, input, and predicts the completion. Use "instruction" for a '
        "model that is to answer.",
    )
    template: Template = Field(default="auto", description=f'{TEMPLATE_HELP} Only for format = "instruction".')
    packing: bool = Field(
        default=False,
        description='Format "text": lay the texts of a batch end to end in blocks of max_length tokens, instead of '
        "padding each. Set it if most texts are much shorter than max_length: it saves time.",
    )

    @model_validator(mode="after")
    def _packs_texts(self) -> CausalLmSettings:
        if self.packing and self.format != "text":
            raise ValueError('given packing = false unless format is "text"')
        return self


@TASKS.register("causal-lm")
class CausalLm(Task):
    """`AutoModelForCausalLM` with cross-entropy; its output layer is a part of the base and stays frozen.

    A row is either one text or a prompt and its completion. A text goes from the tokenizer's first token (if it has
    one) to its end token, so that the model also learns where texts end. Of a prompt and its completion, only the
    completion is predicted. Packing saves padding: a batch has as many blocks as its texts fill, and a text sees the
    texts before it in its block. A block contains rows of one batch only, because a row belongs to one client of a
    site. Evaluation looks at each row alone.

    The loss is a mean over tokens, in which a long text weighs more than a short one. It is not a mean of row losses,
    so `row_losses` stays False.
    """

    name = "causal-lm"
    base_kind = "decoder"
    Settings = CausalLmSettings
    lower_is_better = frozenset({"loss", "perplexity"})

    @property
    def monitor(self) -> str:
        """The loss."""
        return "loss"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The text; or prompt, input and completion."""
        if self.settings.format == "text":
            return (Column("text", "text"),)
        prompt = "prompt"
        extra = "input"
        completion = "completion"
        return (Column(prompt, "text"), Column(extra, "text", required=False, blank=True), Column(completion, "text"))

    @property
    def pads_rows(self) -> bool:
        """Whether rows are padded; packed ones lie end to end."""
        return not self.settings.packing

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for this task."""
        return "text-generation"

    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load the base, without any new module.

        Raises:
            ModelError: `model-not-causal`, see `load_decoder`.
        """
        return load_decoder(folder, dtype, **how)

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise the texts. A text that is too long loses its end, and with it the end token.

        For prompts and completions see `templates.fit`. Text that looks like a special token is ordinary text. The
        notes contain `shard-texts-cut:COUNT`.
        """
        encode = self._encode_texts if self.settings.format == "text" else self._encode_instructions
        texts, notes = encode_slices(shard, lambda part: encode(part, base.tokenizer))
        return Encoded(texts, notes=notes)

    def _encode_instructions(self, part: Shard, tokenizer: Any) -> TokenSlice:
        """Return the tokens of some rows' prompts and completions."""
        limit = min(self.settings.max_length, tokenizer.model_max_length)
        prompts = encode_prompts(part, tokenizer, self.settings.template)
        answers = encode_answers(part.columns["completion"], tokenizer)
        prompts, answers, cut = fit_all(prompts, answers, limit, prefix_length(tokenizer, self.settings.template))
        return TokenSlice({"prompt": prompts, "completion": answers}, {CUT: cut})

    def _encode_texts(self, part: Shard, tokenizer: Any) -> TokenSlice:
        """Return the tokens of some rows' texts, from the first token to the end token."""
        limit = min(self.settings.max_length, tokenizer.model_max_length)
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        found = tokenizer(
            part.columns["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=True,
            max_length=limit,  # leaves no room for the end token: such a text counts as cut
        )
        whole = [[*first, *tokens, tokenizer.eos_token_id] for tokens in found["input_ids"]]
        cut = sum(len(tokens) > limit for tokens in whole)
        return TokenSlice({"text": [tokens[:limit] for tokens in whole]}, {CUT: cut})

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return `input_ids`, `attention_mask` and `labels` (the next token, or `NOTHING`), all (rows, tokens).

        With packing they have one row per block.
        """
        if self.settings.packing and self.settings.format == "text":
            block = min(self.settings.max_length, base.tokenizer.model_max_length)
            return _padded(_packed([_row(encoded, row) for row in rows], block), base)
        return _padded([_row(encoded, row) for row in rows], base)

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the predicted tokens of the batch, computed in float32."""
        losses = token_losses(network, batch)
        return losses.sum() / max(1, len(losses))

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return loss (in nats per predicted token), perplexity (its exponential) and accuracy."""
        device = next(base.network.parameters()).device
        loss = 0.0
        right = 0
        tokens = 0
        for chosen in by_length(self.lengths(encoded), batch_size):
            batch = _padded([_row(encoded, row) for row in chosen], base)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            losses, hits = token_hits(base.network, batch)
            loss += float(losses.sum())
            right += int(hits.sum())
            tokens += len(hits)
        mean = loss / max(tokens, 1)
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, _EXP_LIMIT)),
            "accuracy": right / max(tokens, 1),
        }

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The text to continue, or the prompt to answer."""
        return self.columns[:1] if self.settings.format == "text" else self.columns[:2]

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return each row's `continuation`, or `completion`."""
        if self.settings.format == "instruction":
            return complete(base, shard, self.settings.template, generation)
        prompts = encode_texts(shard.columns["text"], base.tokenizer)
        return [
            {"continuation": text}
            for text in generate(base, prompts, generation, prefix_length(base.tokenizer, "plain"))
        ]

    @classmethod
    def test_case(cls) -> TinyCase:
        """Texts of one form."""
        texts = [f"the {word} clause number {n}" for n in range(12) for word in ("good", "bad")]
        return TinyCase({"max_length": 16}, {"text": texts}, "llama")

    @classmethod
    def extra_cases(cls) -> dict[str, TinyCase]:
        """Prompts and completions."""
        words = ("party", "clause", "alpha", "beta") * 6
        rows = {"prompt": [f"name the {word}" for word in words], "completion": [f"good {word}" for word in words]}
        return {"instruction": TinyCase({"max_length": 24, "format": "instruction"}, rows, "llama")}


def load_decoder(folder: Path, dtype: torch.dtype, **how: Any) -> Base:
    """Load a model that predicts next tokens, with its output layer and without any new module.

    Raises:
        ModelError: `model-not-causal`, the checkpoint lacks the output layer or another tensor, the model reads ahead,
            or its tokenizer has no token for the end of a text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    network, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **how
    )
    problems = {
        "its checkpoint has no output layer, or lacks other tensors": bool(report["missing_keys"]),
        "its tokenizer has no token for the end of a text": tokenizer.eos_token_id is None,
        "a token changes what the model predicts before it": _reads_ahead(network),
    }
    for problem in [problem for problem, there in problems.items() if there]:
        raise ModelError(
            f"the model in {folder.name!r} cannot predict next tokens: {problem}",
            "a decoder such as Llama, with its output layer",
            "choose another base",
            code="model-not-causal",
        )
    limit_length(tokenizer, network)
    return Base(network, network, tokenizer)


def limit_length(tokenizer: Any, network: Any) -> None:
    """Limit a tokenizer to the number of positions that its model has."""
    positions = getattr(network.config, "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def _row(encoded: Encoded, row: int) -> tuple[AnyTokens, AnyTokens]:
    """Return a row's tokens and their labels: the next token, or `NOTHING` if it is not predicted."""
    if "text" in encoded.texts:
        tokens = encoded.texts["text"][row]
        return tokens, np.append(tokens[1:], NOTHING)
    prompt = encoded.texts["prompt"][row]
    answer = encoded.texts["completion"][row]
    return joined(prompt, answer)


def joined(prompt: AnyTokens, answer: AnyTokens) -> tuple[AnyTokens, AnyTokens]:
    """Return the tokens of a prompt with its answer, and their labels: the answer's next token, or `NOTHING`."""
    tokens = np.concatenate([prompt, answer]).astype(np.int64)
    labels = np.full(len(tokens), NOTHING)
    labels[len(prompt) - 1 : -1] = answer
    return tokens, labels


def _packed(rows: Sequence[tuple[AnyTokens, AnyTokens]], block: int) -> list[tuple[AnyTokens, AnyTokens]]:
    """Return rows joined end to end and cut into blocks; a block's last label is the first token of the next."""
    tokens = np.concatenate([tokens for tokens, _ in rows])
    labels = np.concatenate([labels for _, labels in rows])
    return [(tokens[at : at + block], labels[at : at + block]) for at in range(0, len(tokens), block)]


def _padded(rows: Sequence[tuple[AnyTokens, AnyTokens]], base: Base) -> Batch:
    """Return a batch of rows. Only the mask marks the padding, because the padding token can be the end token."""
    ids, mask = pad([tokens for tokens, _ in rows], base.tokenizer.pad_token_id or 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": pad([labels for _, labels in rows], NOTHING)[0]}


def _reads_ahead(network: Any) -> bool:
    """Return whether a token changes the model's output at earlier positions, as in an encoder."""
    import torch

    with torch.no_grad():
        logits = network(input_ids=torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]), use_cache=False).logits[:, :3]
    rounding = 16 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return float((logits[0] - logits[1]).abs().max()) > rounding
