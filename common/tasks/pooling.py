"""A classifier that pools its base's last hidden states, and how a base pools of its own accord.

Such a classifier is a `SentenceTransformer`: transformer, pooling, dropout, and one linear layer whose outputs are the
logits. sentence-transformers loads it again, without code of this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "first", "model"]

HEAD = "classifier"
"""Name of the linear layer as a child of the transformer, where trained modules are found by name."""

HEAD_FILE = "3_Dense/model.safetensors"
"""Where sentence-transformers saves the linear layer, by its place among the modules."""

_MODES: Mapping[str, Literal["mean", "cls"]] = {"mean": "mean", "first": "cls"}
"""sentence-transformers' names for the ways of pooling."""

_LEGACY_MODE = "pooling_mode_"
"""Older configurations have a switch for each mode, such as `pooling_mode_mean_tokens`."""


def embedder_modes(folder: Path) -> tuple[str, ...]:
    """Return how the embedder in a folder pools, in sentence-transformers' words, such as ("mean",).

    Returns:
        Empty if the folder is no embedder, or if its pooling is not described.

    Raises:
        OSError, ValueError: the embedder's files cannot be read.
    """
    description = folder / "modules.json"
    if not description.is_file():
        # sentence-transformers adds mean pooling to a transformer that comes without modules.json.
        is_embedder = (folder / "sentence_bert_config.json").is_file()
        return ("mean",) if is_embedder else ()
    for module in json.loads(description.read_text("utf-8")):
        if str(module["type"]).rpartition(".")[2] == "Pooling":
            return _modes(json.loads((folder / str(module["path"]) / "config.json").read_text("utf-8")))
    return ()


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modes in a Pooling module's configuration, of any version of sentence-transformers."""
    found = config.get("pooling_mode")
    if isinstance(found, str):
        return (found,)
    if found:
        return tuple(found)
    switched_on = [name for name, value in config.items() if name.startswith(_LEGACY_MODE) and value is True]
    # Without the last word: "cls_token", "mean_tokens".
    return tuple(name.removeprefix(_LEGACY_MODE).rpartition("_")[0] for name in switched_on) or ("mean",)


def pooling_of(modes: Sequence[str]) -> Pooling:
    """Return the pooling that a classifier on an embedder takes from it, given `embedder_modes`."""
    if modes == ("mean",):
        return "mean"
    if modes == ("cls",):
        return "first"
    return "model"


def load_pooled(folder: Path, pooling: Pooling, labels: Sequence[str], max_length: int, **how: Any) -> Any:
    """Return a `SentenceTransformer` whose outputs are logits; its transformer has the linear layer as a child.

    Args:
        folder: of the base.
        pooling: "mean", over the real tokens, or "first", the first real token.
        labels: names of the classes, in order.
        max_length: most tokens of a text.
        how: arguments of `from_pretrained`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Dropout
    from sentence_transformers.sentence_transformer.modules import Pooling as Pool
    from torch import nn

    no_code = {"trust_remote_code": False}  # if it is not set, transformers asks at the terminal
    body = Transformer(
        str(folder),
        model_kwargs={**how, "use_safetensors": True, **no_code},
        processor_kwargs=no_code,
        config_kwargs=dict(no_code),
    )
    config = body.model.config
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    dense = Dense(body.get_embedding_dimension(), len(labels), activation_function=nn.Identity())
    # As BERT's own classification head starts.
    nn.init.normal_(dense.linear.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(dense.linear.bias)
    dense.register_forward_pre_hook(_in_the_type_of_the_head)
    pool = Pool(body.get_embedding_dimension(), _MODES[pooling])
    network = SentenceTransformer(modules=[body, pool, Dropout(_dropout(config)), dense], device="cpu")
    network.max_seq_length = min(max_length, network.max_seq_length or max_length)
    setattr(body.model, HEAD, dense.linear)
    _lend(dense.linear, dense)
    return network


def _lend(head: Any, dense: Any) -> None:
    """Let the `Dense` call the head without owning it: Opacus would count a module with two owners twice."""
    del dense.linear
    vars(dense)["linear"] = head  # not `setattr`, which would make it a child


def _dropout(config: Any) -> float:
    """Return the dropout before the head that the base's own classifier would have; 0 if its config has none."""
    rates = (
        getattr(config, name, None) for name in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    )
    return float(next((rate for rate in rates if rate is not None), 0.0))


def _in_the_type_of_the_head(dense: Any, inputs: tuple[dict[str, Any]]) -> None:
    """Forward pre-hook: cast the pooled vectors, because the head may have another type than the frozen base."""
    features = inputs[0]
    dtype = _plain(dense.linear).weight.dtype
    features["sentence_embedding"] = features["sentence_embedding"].to(dtype)


def put_in_place(network: Any, transformer: Any) -> None:
    """Replace the transformer of a pooled classifier, and the head by the one that the new transformer brings."""
    network[0].model = transformer
    _lend(getattr(transformer, HEAD), network[-1])


def class_logits(network: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a pooled classifier, or of a transformers model for classes, shape (rows, classes)."""
    from torch import nn

    if isinstance(network, nn.Sequential):  # a `SentenceTransformer`, which writes into what it is given
        pooled: torch.Tensor = network(dict(inputs))["sentence_embedding"]
        return pooled
    logits: torch.Tensor = network(**inputs).logits
    return logits


@contextmanager
def head_apart(network: Any) -> Iterator[None]:
    """Let the head be a plain layer outside the transformer inside a `with` block, so that it is saved once.

    No-op for a `SentenceTransformer` that is no classifier.
    """
    transformer = network[0].model
    head = getattr(transformer, HEAD, None)
    if head is None:
        yield
        return
    dense = network[-1]
    own = HEAD in dict(transformer.named_children())  # inside a `PeftModel` it may stay: that saves no transformer
    try:
        del dense.linear
        dense.linear = _plain(head)
        if own:
            delattr(transformer, HEAD)
        yield
    finally:
        if own:
            setattr(transformer, HEAD, head)
        _lend(head, dense)


def _plain(head: Any) -> Any:
    """Return the trained linear layer itself, which peft wraps."""
    trained = getattr(head, "modules_to_save", None)
    return head if trained is None else trained["default"]
