"""Sentence embeddings with `sentence-transformers`: texts of the same meaning get similar vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tsugiki.common.data.columns import Column
from tsugiki.common.settings import ClassesSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Task, TinyCase
from tsugiki.common.tasks.classes import class_metrics
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.tasks.text import CUT, TokenSlice, by_length, encode_slices, pad, tokenise

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tsugiki.common.data.shard import Shard
    from tsugiki.common.tasks.base import Generation


class SentenceEmbeddingSettings(ClassesSettings):
    """Pearson and Spearman on scored pairs, recall@k on positive pairs, accuracy on labelled pairs."""

    name: Literal["sentence-embedding"] = Field(default="sentence-embedding", description="The task.")
    loss: Literal["multiple-negatives", "cosine-similarity", "cosent", "softmax-nli"] = Field(
        default="multiple-negatives",
        description='The loss, by the columns that you have. "multiple-negatives" reads anchor, positive and, if '
        'there is one, negative. "cosine-similarity" and "cosent" read sentence1, sentence2 and score; '
        'use "cosent" if only the order of the scores matters. "softmax-nli" reads sentence1, sentence2 '
        "and label.",
    )
    num_labels: int = Field(
        default=3,
        ge=2,
        le=10_000,
        description='Loss "softmax-nli": number of classes, if the files name them by plain numbers.',
    )
    scale: float = Field(
        default=20.0,
        gt=0,
        description='Losses "multiple-negatives" and "cosent": factor on the cosines. Raise it to put more weight on '
        "the hardest pairs.",
    )
    score_max: float = Field(
        default=1.0,
        gt=0,
        description="Best score in the files, by which scores are divided. Set it to 5 for scores from 0 to 5.",
    )
    recall_at: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="The k of recall@k. Set it to the number of results that your search shows.",
    )


@TASKS.register("sentence-embedding")
class SentenceEmbedding(Task):
    """A `SentenceTransformer` whose transformer carries the adapter; it keeps its own pooling and normalisation."""

    name = "sentence-embedding"
    Settings = SentenceEmbeddingSettings

    @property
    def columns(self) -> tuple[Column, ...]:
        """Triplets, scored pairs or labelled pairs, by the loss."""
        return self.evaluation_columns[0]

    @property
    def evaluation_columns(self) -> tuple[tuple[Column, ...], ...]:
        """The form of the loss first; labelled pairs only if the network has a head for them."""
        if self.settings.loss == "softmax-nli":
            return _LABELLED, _SCORED, _TRIPLET
        return (_TRIPLET, _SCORED) if self.settings.loss == "multiple-negatives" else (_SCORED, _TRIPLET)

    @property
    def compares_rows(self) -> bool:
        """Whether the loss takes negatives from the batch, or compares the scores of its pairs."""
        return self.settings.loss in ("multiple-negatives", "cosent")

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of labelled pairs by name, in order."""
        if self.settings.loss != "softmax-nli":
            return ()
        return self.settings.labels or tuple(str(label) for label in range(self.settings.num_labels))

    @property
    def monitor(self) -> str:
        """Accuracy for labelled pairs, Spearman for scored pairs, else recall."""
        own = {"multiple-negatives": f"recall_at_{self.settings.recall_at}", "softmax-nli": "accuracy"}
        return own.get(self.settings.loss, "spearman")

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for this task."""
        return "sentence-similarity"

    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load the `SentenceTransformer`. For softmax-nli its transformer gets a head.

        The head is a child of the transformer, which does not call it, because trained modules are found there by name.
        """
        from sentence_transformers import SentenceTransformer
        from torch import nn

        settings = {"dtype": dtype, "use_safetensors": True, **how}
        network = SentenceTransformer(str(folder), device="cpu", model_kwargs=settings, local_files_only=True)
        if not self.labels:
            return Base(network, network[0].model, network.tokenizer)
        width = 3 * network.get_embedding_dimension()
        setattr(network[0].model, _HEAD, nn.Linear(width, len(self.labels), bias=False, dtype=dtype))
        return Base(network, network[0].model, network.tokenizer, (_HEAD,), loss_heads=True)

    def put_in_place(self, base: Base, transformer: nn.Module) -> None:
        """Replace the transformer inside the `SentenceTransformer`; its pooling stays."""
        base.network[0].model = transformer
        base.transformer = transformer

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Tokenise each text column. The notes contain `shard-texts-cut:COUNT`, summed over the columns."""
        texts, notes = encode_slices(shard, lambda part: self._tokenise(part, base))
        targets: npt.NDArray[Any] | None = None
        if "label" in shard.columns:
            targets = np.asarray(shard.columns["label"], np.int64)
        elif "score" in shard.columns:
            targets = np.asarray(shard.columns["score"], np.float32) / self.settings.score_max
        return Encoded(texts, targets, notes=notes)

    def _tokenise(self, part: Shard, base: Base) -> TokenSlice:
        """Return the tokens of some rows' texts."""
        limit = min(self.settings.max_length, base.network.max_seq_length or self.settings.max_length)
        names = [name for name in _TEXTS if name in part.columns]
        found = {name: tokenise(base.tokenizer, limit, part.columns[name]) for name in names}
        texts = {name: tokens["input_ids"] for name, (tokens, _) in found.items()}
        return TokenSlice(texts, {CUT: sum(cut for _, cut in found.values())})

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return `NAME.input_ids` and `NAME.attention_mask`, (rows, tokens), for each text; `labels`, (rows,)."""
        import torch

        batch: Batch = {}
        for name, texts in encoded.texts.items():
            batch[f"{name}.input_ids"], batch[f"{name}.attention_mask"] = pad(
                [texts[row] for row in rows], base.tokenizer.pad_token_id or 0
            )
        if encoded.targets is not None:
            batch["labels"] = torch.from_numpy(encoded.targets[list(rows)])
        return batch

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return sentence-transformers' own loss over the batch; for softmax-nli the mean cross-entropy, in float32."""
        import torch
        from sentence_transformers.sentence_transformer import losses
        from torch.nn.functional import cross_entropy

        names = [name for name in _TEXTS if f"{name}.input_ids" in batch]
        columns = [(batch[f"{name}.input_ids"], batch[f"{name}.attention_mask"]) for name in names]
        embedded = _embed_by_length(network, columns)
        if self.settings.loss == "softmax-nli":
            first, second = embedded
            return cross_entropy(nli_logits(network, first, second), batch["labels"])
        criterion: Any
        if self.settings.loss == "cosine-similarity":
            criterion = losses.CosineSimilarityLoss(network)
        elif self.settings.loss == "cosent":  # Su 2022, kexue.fm/archives/8847: log(1 + sum exp(scale (cos_i - cos_j)))
            criterion = losses.CoSENTLoss(network, scale=self.settings.scale)
        else:
            criterion = losses.MultipleNegativesRankingLoss(network, scale=self.settings.scale)
        vectors = [vector.float() for vector in embedded]
        # In float32 also under autocast, which would round cosines to three digits before they are scaled.
        with torch.autocast(vectors[0].device.type, enabled=False):
            result: torch.Tensor = criterion.compute_loss_from_embeddings(vectors, batch.get("labels"))
        return result

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return the metrics for the form of the rows.

        Labelled pairs: accuracy, macro_f1 and loss. Scored pairs: pearson and spearman. Otherwise: recall_at_k of each
        anchor's positive among all positives and negatives of the file.
        """
        import torch

        # Integer targets are labels, float targets are scores.
        if encoded.targets is not None and encoded.targets.dtype == np.int64:
            raw = raw_vectors(base, encoded.texts, batch_size)
            first, second = (raw[name] for name in _PAIR)
            device = next(base.network.parameters()).device
            with torch.no_grad():
                logits = nli_logits(base.network, first.to(device), second.to(device)).cpu()
            return class_metrics(logits, encoded.targets)
        vectors = embed(base, encoded.texts, batch_size)
        if encoded.targets is not None:
            return _correlations(vectors["sentence1"], vectors["sentence2"], encoded.targets)
        candidates = np.concatenate([vectors[name] for name in ("positive", "negative") if name in vectors])
        k = self.settings.recall_at
        return {f"recall_at_{k}": recall_at(k, vectors["anchor"], candidates)}

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The two texts to compare."""
        return _SCORED[:2]

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return the `cosine` of each row's two texts."""
        vectors = embed(base, self.encode(shard, base).texts, 64)
        cosines = (vectors["sentence1"] * vectors["sentence2"]).sum(axis=1)
        return [{"cosine": float(cosine)} for cosine in cosines]

    @classmethod
    def test_case(cls) -> TinyCase:
        """Anchors and positives that share a rare word."""
        words = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"] * 3
        return TinyCase(
            {"max_length": 16},
            {
                "anchor": [f"the {word} clause" for word in words],
                "positive": [f"a clause on {word}" for word in words],
                "negative": [f"no clause on {word}" for word in reversed(words)],
            },
        )

    @classmethod
    def extra_cases(cls) -> dict[str, TinyCase]:
        """Scored pairs, and labelled ones."""
        words = ["alpha", "beta", "gamma", "delta"] * 6
        rows = {
            "sentence1": [f"the {word} clause" for word in words],
            "sentence2": [f"a clause on {second}" for second in ["sigma", "beta", "sigma", "delta"] * 6],
            "score": [float(n % 2) for n in range(24)],
        }
        forms = {"cosine": "cosine-similarity", "cosent": "cosent"}
        cases = {name: TinyCase({"max_length": 16, "loss": loss}, rows) for name, loss in forms.items()}
        seconds = ("a good {} clause", "a bad party", "no {} clause")
        labelled = {
            "sentence1": [f"the {word} clause" for word in words],
            "sentence2": [seconds[n % 3].format(word) for n, word in enumerate(words)],
            "label": [n % 3 for n in range(24)],
        }
        return {**cases, "softmax": TinyCase({"max_length": 16, "loss": "softmax-nli"}, labelled)}


_TRIPLET = (Column("anchor", "text"), Column("positive", "text"), Column("negative", "text", required=False))
_SCORED = (Column("sentence1", "text"), Column("sentence2", "text"), Column("score", "score"))
_LABELLED = (Column("sentence1", "text"), Column("sentence2", "text"), Column("label", "label"))
_PAIR = ("sentence1", "sentence2")
_HEAD = "nli_head"
_ROUNDING = 1e-6  # a float32 matrix product gives even equal columns slightly different sums
_TEXTS = ("anchor", "positive", "negative", "sentence1", "sentence2")


def nli_logits(network: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return W (u, v, |u - v|) of pairs of vectors, shape (pairs, classes), float32.

    Source: Reimers and Gurevych 2019, arXiv:1908.10084, section 3, "Classification Objective Function"; as there,
    without a bias.

    Args:
        network: the `SentenceTransformer` whose transformer has the head.
        first: u, shape (pairs, dimensions).
        second: v, of the same shape.
    """
    import torch

    head = getattr(network[0].model, _HEAD)
    features = torch.cat([first, second, (first - second).abs()], dim=1)
    logits: torch.Tensor = head(features.to(next(head.parameters()).dtype)).float()
    return logits


def _embed_by_length(network: Any, columns: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Return the vectors of each column's texts, shape (rows, dimensions).

    The texts of all columns go through the network in as many groups as there are columns, each of texts of like
    length. That saves padding, and leaves the batches as they are: some losses depend on which rows share one.

    Args:
        network: the `SentenceTransformer`.
        columns: token ids and attention mask of each column, padded on the right, both of shape (rows, tokens).
    """
    import torch

    # The mask is 0 where a column is widened, so it does not matter which token is there.
    ids = _stacked([ids for ids, _ in columns])
    mask = _stacked([mask for _, mask in columns])
    lengths = mask.sum(dim=1).tolist()
    vectors = []
    places: list[int] = []
    for group in by_length(lengths, len(columns[0][0])):
        longest = lengths[group[0]]
        features = {"input_ids": ids[group, :longest], "attention_mask": mask[group, :longest]}
        vectors.append(network(features)["sentence_embedding"])
        places += group
    # From the order of lengths back to the order of rows.
    order = torch.tensor(places, device=ids.device).argsort()
    return list(torch.cat(vectors)[order].chunk(len(columns)))


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all parts, one part after the other, widened with zeros to the widest part."""
    import torch
    from torch.nn.functional import pad as widen

    widest = max(part.shape[1] for part in parts)
    return torch.cat([widen(part, (0, widest - part.shape[1])) for part in parts])


def embed(base: Base, columns: Mapping[str, TokenRows], batch_size: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return one unit vector per text of each column, shape (texts, dimensions)."""
    from torch.nn.functional import normalize

    raw = raw_vectors(base, columns, batch_size)
    return {name: normalize(vectors, dim=1).numpy() for name, vectors in raw.items()}


def raw_vectors(base: Base, columns: Mapping[str, TokenRows], batch_size: int) -> dict[str, torch.Tensor]:
    """Return the network's vector for each text of each column, shape (texts, dimensions), float32, on the CPU.

    Equal texts, such as the anchor of several pairs, are embedded once.
    """
    import torch

    texts = TokenRows.joined(list(columns.values()))
    numbers: dict[bytes, int] = {}
    # The number of each text among the different ones.
    places = [numbers.setdefault(tokens.tobytes(), len(numbers)) for tokens in texts]
    different = texts.take(np.unique(places, return_index=True)[1])
    device = next(base.network.parameters()).device
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(different)
    with torch.no_grad():
        for rows in by_length(different.lengths(), batch_size):
            ids, mask = pad([different[row] for row in rows], base.tokenizer.pad_token_id or 0)
            features = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            for row, vector in zip(rows, base.network(features)["sentence_embedding"].float().cpu(), strict=True):
                vectors[row] = vector
    parts = torch.split(torch.stack(vectors)[places], [len(rows) for rows in columns.values()])
    return dict(zip(columns, parts, strict=True))


def recall_at(k: int, anchors: npt.NDArray[np.float32], candidates: npt.NDArray[np.float32]) -> float:
    """Return the share of anchors whose own candidate (same row) is among the k with the highest cosine.

    A candidate with the same cosine, up to rounding, counts as higher, so that equal vectors earn nothing.

    Args:
        k: at least 1.
        anchors: unit vectors, shape (anchors, dimensions).
        candidates: unit vectors, shape (at least anchors, dimensions).
    """
    cosines = anchors @ candidates.T
    own = cosines[np.arange(len(anchors)), np.arange(len(anchors))]
    rank = (cosines >= own[:, None] - _ROUNDING).sum(axis=1)  # its own comparison included: the best has rank 1
    return float((rank <= k).mean())


def _correlations(
    first: npt.NDArray[np.float32], second: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation of the cosines with the scores."""
    from scipy.stats import pearsonr, spearmanr

    cosines = (first * second).sum(axis=1)
    return {
        "pearson": float(pearsonr(cosines, scores).statistic),
        "spearman": float(spearmanr(cosines, scores).statistic),
    }
