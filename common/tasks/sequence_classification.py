"""Classification of one text, or of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from tsugiki.common.data.columns import Column
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import HeadedSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Task, TinyCase
from tsugiki.common.tasks.classes import class_loss, class_metrics, named_classes, network_inputs
from tsugiki.common.tasks.pooling import (
    HEAD,
    Pooling,
    class_logits,
    embedder_modes,
    load_pooled,
    pooling_of,
    put_in_place,
)
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.tasks.text import CUT, TokenSlice, by_length, encode_slices, pad, padding_id, tokenise

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tsugiki.common.data.shard import Shard
    from tsugiki.common.tasks.base import Generation

_SEGMENTS = "token_type_ids"


def _switch(value: Any) -> Any:
    """Turn "true" and "false" into booleans: what both sides agree on is text."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


class SequenceClassificationSettings(HeadedSettings):
    """Any number of classes; accuracy, macro-F1 and loss."""

    name: Literal["sequence-classification"] = Field(default="sequence-classification", description="The task.")
    pair: bool = Field(
        default=False,
        description="Classify pairs of texts, from the columns text and text_pair. Set it for tasks such as "
        "entailment.",
    )
    pooling: Literal["auto", Pooling] = Field(
        default="auto",
        description='What the head reads. "mean": the mean of the last hidden states over a text\'s tokens. "first": '
        'the last hidden state of its first token. "model": what the base\'s own classifier in transformers reads '
        '(BERT: the first token through the pooler; decoders: the last token). "auto" takes mean or first from a '
        "sentence embedder that pools so, and model on other bases and where train_pooler is true. Set model if other "
        "programs have to load the result with AutoModelForSequenceClassification.",
    )
    train_pooler: Annotated[Literal["auto"] | bool, BeforeValidator(_switch)] = Field(
        default="auto",
        description="With pooling \"model\": also train and exchange the base's pooler (BERT's: a dense layer on the "
        'first token, h * (h + 1) numbers). "auto" trains it if pre-training left it aside: the checkpoint has no '
        "values for it, or the base is a sentence embedder that pools without it. In private runs more numbers need "
        "more noise: compare with false there.",
    )

    @model_validator(mode="after")
    def _a_pooler_is_read(self) -> SequenceClassificationSettings:
        if self.train_pooler is True and self.pooling in ("mean", "first"):
            raise ValueError(
                'given pooling = "model" if train_pooler is true, because no other pooling reads the pooler'
            )
        return self


@TASKS.register("sequence-classification")
class SequenceClassification(Task):
    """Cross-entropy on `AutoModelForSequenceClassification`, or on a linear layer above pooled hidden states."""

    name = "sequence-classification"
    Settings = SequenceClassificationSettings
    row_losses = True
    adjusts_logits = True

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
        """Load the base with a head. What "auto" took is in `Base.constants`.

        Raises:
            ModelError: `head-missing`, `train_pooler` is set, and the base has no pooler.
        """
        modes = embedder_modes(folder)
        pooling: Pooling = "model"
        if self.settings.pooling != "auto":
            pooling = self.settings.pooling
        elif self.settings.train_pooler is not True:
            pooling = pooling_of(modes)
        if pooling == "model":
            return self._load_classifier(folder, dtype, left_aside=bool(modes), **how)
        network = load_pooled(folder, pooling, self.labels, self.settings.max_length, dtype=dtype, **how)
        transformer = network[0].model
        if transformer.config.pad_token_id is None:
            transformer.config.pad_token_id = padding_id(network.tokenizer)
        return Base(network, transformer, network.tokenizer, (HEAD,), constants={"pooling": pooling})

    def _load_classifier(self, folder: Path, dtype: torch.dtype, *, left_aside: bool, **how: Any) -> Base:
        """Load transformers' own classifier; its head is new unless the checkpoint has one of the same shape.

        Args:
            folder: of the checkpoint.
            dtype: of the frozen weights.
            left_aside: whether the base is an embedder that pools without the pooler.
            how: further arguments of `from_pretrained`.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: index for index, label in enumerate(self.labels)},
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,  # if it is not set, transformers asks at the terminal
            output_loading_info=True,
            **how,
        )
        if network.config.pad_token_id is None:
            network.config.pad_token_id = padding_id(tokenizer)
        pooler = _pooler(network)
        train_pooler = self.settings.train_pooler
        if train_pooler == "auto":
            random = any(name.startswith(f"{pooler}.") for name in found["missing_keys"])
            train_pooler = bool(pooler) and (left_aside or random)
        elif train_pooler and not pooler:
            raise _no_pooler(network)
        heads = (pooler,) if train_pooler else ()
        agreed = {"pooling": "model", "train_pooler": str(train_pooler).lower()}
        return Base(network, network, tokenizer, (*heads, *_after_the_backbone(network)), constants=agreed)

    def put_in_place(self, base: Base, transformer: nn.Module) -> None:
        """Replace the bare transformer by the one with the adapter, in a pooled classifier together with its head."""
        if base.network is base.transformer:
            super().put_in_place(base, transformer)
            return
        put_in_place(base.network, transformer)
        base.transformer = transformer

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
        return class_loss(self.logits(network, batch), batch)

    def logits(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the logits of a batch, shape (rows, classes), float32."""
        return class_logits(network, network_inputs(batch)).float()

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
        settings = {"num_labels": 2, "max_length": 16, "pooling": "model", "train_pooler": False}
        return TinyCase(settings, {"text": texts, "label": [1, 0] * 12})

    @classmethod
    def extra_cases(cls) -> dict[str, TinyCase]:
        """Pairs of texts that agree or do not; texts whose pooler is trained, or whose hidden states are pooled."""
        first = [f"the {word} clause" for word in ("good", "bad") * 12]
        second = ["a good one"] * 24
        pair = {"num_labels": 2, "max_length": 24, "pair": True}
        cases = {"pair": TinyCase(pair, {"text": first, "text_pair": second, "label": [1, 0] * 12})}
        forms: dict[str, dict[str, Any]] = {
            "pooler": {"train_pooler": True},
            "mean": {"pooling": "mean"},
            "first": {"pooling": "first"},
        }
        for name, form in forms.items():
            cases[name] = TinyCase({"num_labels": 2, "max_length": 16, **form}, cls.test_case().rows)
        return cases


def _after_the_backbone(network: Any) -> tuple[str, ...]:
    """Return the modules of a classifier outside its backbone; most are new, and one is DeBERTa's own pooler."""
    backbone = network.base_model_prefix
    return tuple(name for name, part in network.named_children() if name != backbone and list(part.parameters()))


def _pooler(network: Any) -> str:
    """Return the name of the backbone's pooler; empty if there is none with parameters."""
    pooler = getattr(network.base_model, "pooler", None)
    if pooler is None or not list(pooler.parameters()):
        return ""
    return f"{network.base_model_prefix}.pooler"


def _no_pooler(network: Any) -> ModelError:
    return ModelError(
        f"task.train_pooler is set, and {type(network).__name__} has no pooler in its base that could be trained",
        "a base with a pooler, such as BERT; the heads of others are trained whole without it",
        'set task.train_pooler = "auto"',
        code="head-missing",
    )
