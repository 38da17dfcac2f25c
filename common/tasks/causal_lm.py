"""Predict each next token of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from common.errors import ModelError
from common.settings import TaskSettings
from common.tasks.base import TASKS, Base, Batch, Column, Encoded, Task, TinyCase, by_length, pad

if TYPE_CHECKING:
    import torch

    from common.data.shard import Shard

_NOTHING = -100
"""The label of a position after which nothing is predicted; what PyTorch's cross-entropy leaves out."""

_EXP_LIMIT = 700.0
"""The exponential of more is too large for a float."""


class CausalLmSettings(TaskSettings):
    """Loss, perplexity and accuracy, over all predicted tokens of all rows."""

    name: Literal["causal-lm"] = Field(default="causal-lm", description="the task")


@TASKS.register("causal-lm")
class CausalLm(Task):
    """`AutoModelForCausalLM` with cross-entropy; its output layer is a part of the base and stays frozen.

    A row is one text, from the tokenizer's first token (where it has one) to its last, so that the model also learns
    where texts end. Rows are padded, not packed into blocks: a row belongs to one client of a site.

    The loss is a mean over tokens, where a long text weighs more than a short one: it is no mean of losses of rows, so
    `row_losses` stays False.
    """

    name = "causal-lm"
    Settings = CausalLmSettings
    lower_is_better = frozenset({"loss", "perplexity"})

    @property
    def monitor(self) -> str:
        """The loss."""
        return "loss"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The text."""
        return (Column("text", "text"),)

    def load(self, folder: Path, dtype: torch.dtype) -> Base:
        """Load the base; nothing of it is new.

        Raises:
            ModelError: `model-not-causal`, the checkpoint lacks the output layer or another tensor, the model reads
                ahead, or its tokenizer has no token for the end of a text.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
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
        positions = getattr(network.config, "max_position_embeddings", None)
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        return Base(network, network, tokenizer)

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise the texts; the end of one that is too long is lost, and with it the last token of the row.

        What looks like a special token in a text is ordinary text. Noted is `shard-texts-cut:COUNT`.
        """
        tokenizer = base.tokenizer
        limit = min(self.settings.max_length, tokenizer.model_max_length)
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        found = tokenizer(
            shard.columns["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=True,
            max_length=limit + 1,  # one more than there is room for, to see that a text is too long
        )
        whole = [[*first, *tokens, tokenizer.eos_token_id] for tokens in found["input_ids"]]
        cut = sum(len(tokens) > limit for tokens in whole)
        notes = (f"shard-texts-cut:{cut}",) if cut else ()
        return Encoded({"text": [tokens[:limit] for tokens in whole]}, notes=notes)

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return `input_ids` and `attention_mask` of shape (rows, tokens); only the mask says what is padding."""
        ids, mask = pad([encoded.texts["text"][row] for row in rows], base.tokenizer.pad_token_id or 0)
        return {"input_ids": ids, "attention_mask": mask}

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the predicted tokens of the batch, computed in float32."""
        from torch.nn.functional import cross_entropy

        logits, labels = _predict(network, batch), _labels(batch)
        total = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_NOTHING, reduction="sum")
        return total / (labels != _NOTHING).sum().clamp(min=1)

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return loss (in nats for each predicted token), perplexity, its exponential, and accuracy."""
        from torch.nn.functional import cross_entropy

        device = next(base.network.parameters()).device
        loss, right, tokens = 0.0, 0, 0
        for rows in by_length([len(tokens) for tokens in encoded.texts["text"]], batch_size):
            batch = {name: tensor.to(device) for name, tensor in self.batch(encoded, rows, base).items()}
            # Row by row: the logarithms of a whole batch over a large vocabulary would double the memory.
            for logits, labels in zip(_predict(base.network, batch), _labels(batch), strict=True):
                told = int((labels != _NOTHING).sum())  # padding is on the right
                logits, labels = logits[:told].float(), labels[:told]
                loss += float(cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(dim=1) == labels).sum())
                tokens += told
        mean = loss / max(tokens, 1)
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, _EXP_LIMIT)),
            "accuracy": right / max(tokens, 1),
        }

    @classmethod
    def tiny(cls) -> TinyCase:
        """Texts of one form."""
        texts = [f"the {word} clause number {n}" for n in range(12) for word in ("good", "bad")]
        return TinyCase({"max_length": 16}, {"text": texts}, "llama")


def _predict(network: Any, batch: Batch) -> torch.Tensor:
    """Return the logits, shape (rows, tokens, vocabulary)."""
    logits: torch.Tensor = network(**batch, use_cache=False).logits
    return logits


def _labels(batch: Batch) -> torch.Tensor:
    """Return the token that follows each one, or `_NOTHING` where none does; shape (rows, tokens)."""
    import torch

    labels = torch.full_like(batch["input_ids"], _NOTHING)
    labels[:, :-1] = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, _NOTHING)
    return labels


def _reads_ahead(network: Any) -> bool:
    """Return whether a token changes what the model says at the places before it, as in an encoder."""
    import torch

    with torch.no_grad():
        logits = network(input_ids=torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]), use_cache=False).logits[:, :3]
    rounding = 16 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return float((logits[0] - logits[1]).abs().max()) > rounding
