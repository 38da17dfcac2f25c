"""Classification of one text, or of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tsugiki.common.data.columns import Column
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import HeadedSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Task, TinyCase
from tsugiki.common.tasks.classes import class_metrics, named_classes
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.tasks.text import CUT, TokenSlice, by_length, encode_slices, pad, padding_id, tokenise

if TYPE_CHECKING:
    import torch

    from tsugiki.common.data.shard import Shard
    from tsugiki.common.tasks.base import Generation

_SEGMENTS = "token_type_ids"


class SequenceClassificationSettings(HeadedSettings):
    """Any number of classes; accuracy, macro-F1 and loss."""

    name: Literal["sequence-classification"] = Field(default="sequence-classification", description="The task.")
    pair: bool = Field(
        default=False,
        description="Classify pairs of texts, from the columns text and text_pair. Set it for tasks such as "
        "entailment.",
    )
    train_pooler: bool = Field(
        default=False,
        description="Also train and exchange the base's pooler (BERT's: a dense layer on the first token, h * (h + "
        "1) numbers). Set it if pre-training did not use the pooler; in private runs try without it "
        "first.",
    )


@TASKS.register("sequence-classification")
class SequenceClassification(Task):
    """`AutoModelForSequenceClassification` with cross-entropy."""

    name = "sequence-classification"
    Settings = SequenceClassificationSettings
    row_losses = True

    @property
    def monitor(self) -> str:
        """Accuracy."""
        return "accuracy"

    @property
    def columns(self) -> tuple[Column, ...]:
        """One or two texts, and the class."""
        second = (Column("text_pair", "text"),) if self.settings.pair else ()
        return (Column("text", "text"), *second, Column("label", "label"))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes by name, in order."""
        return self.settings.labels or tuple(str(label) for label in range(self.settings.num_labels))

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for this task."""
        return "text-classification"

    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load the base; its head is new unless the checkpoint has one of the same shape.

        Raises:
            ModelError: `head-missing`, `train_pooler` is set, and the base has no pooler.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: index for index, label in enumerate(self.labels)},
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,  # if it is not set, transformers asks at the terminal
            **how,
        )
        if network.config.pad_token_id is None:
            network.config.pad_token_id = padding_id(tokenizer)
        heads = _pooler(network) if self.settings.train_pooler else ()
        return Base(network, network, tokenizer, (*heads, *_after_the_backbone(network)))

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise the texts; a pair becomes one sequence with its segments marked.

        The notes contain `shard-texts-cut:COUNT`.
        """
        texts, notes = encode_slices(shard, lambda part: self._tokenise(part, base))
        segments = texts.pop(_SEGMENTS, None)
        # Of single texts, all segments are 0: `batch` makes them. Those of pairs are 0 or 1, which a byte holds.
        if segments is not None and segments.values.any():
            texts[_SEGMENTS] = TokenRows(segments.values.astype(np.int8), texts["input_ids"].offsets)
        labels = shard.columns.get("label")
        targets = None if labels is None else np.asarray(labels, np.int64)
        return Encoded(texts, targets, notes=notes)

    def _tokenise(self, part: Shard, base: Base) -> TokenSlice:
        """Return the tokens of some rows, and their segments if the tokenizer numbers them."""
        names = ("text", "text_pair") if self.settings.pair else ("text",)
        limit = min(self.settings.max_length, base.tokenizer.model_max_length)
        tokens, cut = tokenise(base.tokenizer, limit, *[part.columns[name] for name in names])
        return TokenSlice({name: tokens[name] for name in ("input_ids", _SEGMENTS) if name in tokens}, {CUT: cut})

    def lengths(self, encoded: Encoded) -> npt.NDArray[np.int64]:
        """Return the tokens of each row; the segments of a pair number the same tokens."""
        return encoded.texts["input_ids"].lengths()

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return `input_ids`, `attention_mask` (and `token_type_ids`) of shape (rows, tokens), `labels` of (rows,)."""
        import torch

        pad_id = base.transformer.config.pad_token_id  # decoders find a text's last token by it
        ids, mask = pad([encoded.texts["input_ids"][row] for row in rows], pad_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if _SEGMENTS in encoded.texts:
            batch[_SEGMENTS] = pad([encoded.texts[_SEGMENTS][row] for row in rows], 0)[0]
        elif _SEGMENTS in base.tokenizer.model_input_names:
            batch[_SEGMENTS] = torch.zeros_like(ids)
        if encoded.targets is not None:
            batch["labels"] = torch.from_numpy(encoded.targets[list(rows)])
        return batch

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy, computed in float32."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(self.logits(network, batch), batch["labels"])

    def logits(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the logits of a batch, shape (rows, classes), float32."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = network(**inputs).logits.float()
        return logits

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return accuracy, macro_f1 (over the classes that occur or are predicted) and loss."""
        return class_metrics(self._logits(base, encoded, batch_size), encoded.targets)

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The texts."""
        return self.columns[:-1]

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return each row's `label`, and its `probability`."""
        return named_classes(self._logits(base, self.encode(shard, base), 64), self.labels)

    def _logits(self, base: Base, encoded: Encoded, batch_size: int) -> torch.Tensor:
        """Return the logits of all rows, shape (rows, classes)."""
        import torch

        device = next(base.network.parameters()).device
        logits = torch.empty(len(encoded), len(self.labels))
        for rows in by_length(self.lengths(encoded), batch_size):
            batch = self.batch(encoded, rows, base)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.no_grad():
                logits[rows] = self.logits(base.network, inputs).cpu()
        return logits

    @classmethod
    def test_case(cls) -> TinyCase:
        """Two classes that differ in one word."""
        texts = [f"the {word} clause number {n}" for n in range(12) for word in ("good", "bad")]
        return TinyCase({"num_labels": 2, "max_length": 16}, {"text": texts, "label": [1, 0] * 12})

    @classmethod
    def extra_cases(cls) -> dict[str, TinyCase]:
        """Pairs of texts that agree or do not; texts whose pooler is trained."""
        first = [f"the {word} clause" for word in ("good", "bad") * 12]
        second = ["a good one"] * 24
        settings = {"num_labels": 2, "max_length": 24, "pair": True}
        pooled = {"num_labels": 2, "max_length": 16, "train_pooler": True}
        return {
            "pair": TinyCase(settings, {"text": first, "text_pair": second, "label": [1, 0] * 12}),
            "pooler": TinyCase(pooled, cls.test_case().rows),
        }


def _after_the_backbone(network: Any) -> tuple[str, ...]:
    """Return the modules of a classifier outside its backbone; most are new, and one is DeBERTa's own pooler."""
    backbone = network.base_model_prefix
    return tuple(name for name, part in network.named_children() if name != backbone and list(part.parameters()))


def _pooler(network: Any) -> tuple[str, ...]:
    """Return the name of the backbone's pooler.

    Raises:
        ModelError: `head-missing`, there is no pooler with parameters.
    """
    pooler = getattr(network.base_model, "pooler", None)
    if pooler is None or not list(pooler.parameters()):
        raise ModelError(
            f"task.train_pooler is set, and {type(network).__name__} has no pooler in its base that could be trained",
            "a base with a pooler, such as BERT; the heads of others are trained whole without it",
            "set task.train_pooler = false",
            code="head-missing",
        )
    return (f"{network.base_model_prefix}.pooler",)
