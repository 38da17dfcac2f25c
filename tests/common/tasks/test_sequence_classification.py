"""Classification of one text or of a pair."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    MobileBertConfig,
    MobileBertModel,
    PreTrainedTokenizerFast,
)

from tests.support.tiny import MAX_TOKENS, tiny_bert
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ConfigError, ModelError
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.tasks.sequence_classification import SequenceClassification, SequenceClassificationSettings

ROWS = Shard({"text": ["good clause", "a bad clause number nine", "the party", "bad"], "label": [1, 0, 1, 0]})


def make(**settings):
    """Return the task."""
    return SequenceClassification(SequenceClassificationSettings(**settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny BERT. Read only."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def base(folder):
    """A loaded base for two classes. Read only."""
    torch.manual_seed(3)
    loaded = make().load(folder, torch.float32)
    loaded.network.eval()
    return loaded


def tiny_decoder(folder):
    """Write a GPT-2 whose tokenizer has no padding token, as GPT-2's own."""
    words = ["the", "a", "bad", "good", "clause", "party", "number", "nine", "<end>"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[-1]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=words[-1], model_max_length=32).save_pretrained(folder)
    torch.manual_seed(5)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    GPT2Model(GPT2Config(vocab_size=len(words), eos_token_id=8, bos_token_id=8, **sizes)).save_pretrained(folder)
    return folder


def logits(task, base, encoded, rows):
    """Return the logits of one batch."""
    batch = task.batch(encoded, rows, base)
    batch.pop("labels")
    with torch.no_grad():
        return base.network(**batch).logits


@pytest.mark.parametrize(
    ("settings", "labels"),
    [({}, ("0", "1")), ({"num_labels": 3}, ("0", "1", "2")), ({"labels": ("no", "yes")}, ("no", "yes"))],
)
def test_classes(settings, labels, folder):
    """Catches: names in another order than their numbers; an exported model that calls its classes LABEL_0."""
    task = make(**settings)
    assert task.labels == labels
    config = task.load(folder, torch.float32).network.config
    assert config.num_labels == len(labels)
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: index for index, label in enumerate(labels)}


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], ["a", "b", "a"]])
def test_class_names_have_to_differ(labels):
    """Catches: two classes that would be one."""
    with pytest.raises(ConfigError, match="at least two class names, all different"):
        parse({"task": {"name": "sequence-classification", "labels": labels}})


def test_columns():
    """Catches: a pair read from one column; a second text asked of everybody."""
    assert [(column.name, column.kind) for column in make().columns] == [("text", "text"), ("label", "label")]
    assert [column.name for column in make(pair=True).columns] == ["text", "text_pair", "label"]
    assert make().evaluation_columns == (make().columns,)


def test_encode_keeps_special_tokens_and_cuts(base):
    """Catches: texts without [CLS] and [SEP]; a limit that counts without them."""
    encoded = make(max_length=8).encode(ROWS, base)
    tokens = base.tokenizer.convert_ids_to_tokens
    assert tokens(encoded.texts["input_ids"][0]) == ["[CLS]", "good", "clause", "[SEP]"]
    assert [len(row) for row in encoded.texts["input_ids"]] == [4, 8, 4, 3]
    assert tokens(encoded.texts["input_ids"][1])[-1] == "[SEP]"
    assert encoded.targets.tolist() == [1, 0, 1, 0]
    assert encoded.targets.dtype == np.int64


def test_no_more_tokens_than_the_base_has_positions(base):
    """Catches: an IndexError in the embedding, at whichever site has a long text."""
    task = make(max_length=4 * MAX_TOKENS)
    long = Shard({"text": ["clause " * 500], "label": [1]})
    encoded = task.encode(long, base)
    assert len(encoded.texts["input_ids"][0]) == MAX_TOKENS
    assert logits(task, base, encoded, [0]).shape == (1, 2)


def test_a_pair_becomes_one_sequence_with_marked_segments(base):
    """Catches: the second text dropped; segments that are all zero; the pair's order."""
    rows = Shard({"text": ["good", "bad"], "text_pair": ["a clause", "the"], "label": [1, 0]})
    task = make(pair=True)
    encoded = task.encode(rows, base)
    words = base.tokenizer.convert_ids_to_tokens(encoded.texts["input_ids"][0])
    assert words == ["[CLS]", "good", "[SEP]", "a", "clause", "[SEP]"]
    batch = task.batch(encoded, [0, 1], base)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]


def test_batch_takes_the_rows_asked_for_in_that_order(base):
    """Catches: labels of other rows than the texts'."""
    task = make()
    encoded = task.encode(ROWS, base)
    batch = task.batch(encoded, [3, 0], base)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].shape == (2, 4)
    assert batch["input_ids"][0].tolist()[:3] == encoded.texts["input_ids"][3].tolist()
    assert "labels" not in task.batch(Encoded(encoded.texts), [0], base)


def test_loss_is_the_cross_entropy(base):
    """Catches: a sum in place of a mean; labels passed on, with which the model would compute a loss of its own."""
    task = make()
    batch = task.batch(task.encode(ROWS, base), [0, 1, 2], base)
    with torch.no_grad():
        loss = task.loss(base.network, batch)
        scores = base.network(**{name: value for name, value in batch.items() if name != "labels"}).logits.double()
        expected = -scores.log_softmax(dim=1)[range(3), batch["labels"]].mean()
        own = base.network(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert "labels" in batch


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_evaluate_does_not_depend_on_the_batches(base, batch_size):
    """Catches: predictions of sorted rows compared with unsorted labels; padding that changes an answer."""
    task = make()
    rows = Shard({"text": [*ROWS.columns["text"], "alpha beta gamma delta", "on"], "label": [1, 0, 1, 0, 1, 1]})
    encoded = task.encode(rows, base)
    with torch.no_grad():
        found = task.evaluate(base, encoded, batch_size)
    scores = torch.cat([logits(task, base, encoded, [row]) for row in range(6)])
    targets, predicted = torch.tensor(rows.columns["label"]), scores.argmax(dim=1)
    f1 = []
    for label in set(targets.tolist()) | set(predicted.tolist()):
        hits = ((predicted == label) & (targets == label)).sum()
        f1.append((2 * hits / ((predicted == label).sum() + (targets == label).sum())).item())
    assert found["accuracy"] == pytest.approx((predicted == targets).float().mean().item())
    assert found["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    assert found["loss"] == pytest.approx(-scores.log_softmax(dim=1)[range(6), targets].mean().item(), rel=1e-4)


def test_macro_f1_counts_the_classes_that_are_there(base):
    """Catches: absent classes counted with 0; a warning of scikit-learn for them."""
    task = make()
    encoded = task.encode(Shard({"text": ["good", "good"], "label": [0, 0]}), base)
    sure = torch.nn.Parameter(torch.tensor([9.0, 0.0]))
    kept, base.network.classifier.bias = base.network.classifier.bias, sure
    with torch.no_grad():
        found = task.evaluate(base, encoded, 2)
    base.network.classifier.bias = kept
    assert found["macro_f1"] == found["accuracy"] == 1.0
    assert math.isfinite(found["loss"])


@pytest.mark.parametrize("seed", [1, 2])
def test_a_checkpoints_own_head_is_kept_if_it_fits(tmp_path, base, seed):
    """Catches: a trained head thrown away; an error for one of another shape."""
    base.network.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(seed)
    same, other = (make(num_labels=n).load(tmp_path, torch.float32).network.classifier for n in (2, 3))
    assert torch.equal(same.weight, base.network.classifier.weight)
    assert other.weight.shape == (3, 32)


NARROW = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (
            lambda: DistilBertModel(DistilBertConfig(vocab_size=99, dim=16, n_layers=1, n_heads=2, hidden_dim=16)),
            ("pre_classifier", "classifier"),
        ),
        (lambda: DebertaV2Model(DebertaV2Config(vocab_size=99, **NARROW)), ("pooler", "classifier")),
        (lambda: BertModel(BertConfig(vocab_size=99, **NARROW)), ("classifier",)),
    ],
)
def test_heads_are_all_new_layers(tmp_path, base, model, heads):
    """Catches: DistilBERT's pre_classifier or DeBERTa's pooler, which are new as well, frozen at random values."""
    base.tokenizer.save_pretrained(tmp_path)
    model().save_pretrained(tmp_path)
    assert make().load(tmp_path, torch.float32).heads == heads


def test_the_head_of_a_decoder(tmp_path):
    """Catches: a head known by an encoder's name only."""
    assert make().load(tiny_decoder(tmp_path), torch.float32).heads == ("score",)


def test_the_bases_own_pooler_is_trained_on_demand(folder, tmp_path, base):
    """Catches: a setting without effect; one that is ignored where there is no pooler."""
    assert make(train_pooler=True).load(folder, torch.float32).heads == ("bert.pooler", "classifier")
    base.tokenizer.save_pretrained(tmp_path / "first")
    first = MobileBertConfig(vocab_size=99, classifier_activation=False, embedding_size=16, **NARROW)
    MobileBertModel(first).save_pretrained(tmp_path / "first")  # its pooler is the first token as it is
    for other in (tiny_decoder(tmp_path), tmp_path / "first"):
        with pytest.raises(ModelError, match="has no pooler in its base that could be trained") as caught:
            make(train_pooler=True).load(other, torch.float32)
        assert caught.value.code == "head-missing"


def test_a_decoder_looks_at_the_last_token_of_each_text(tmp_path):
    """Catches: padding with a token that the model does not know as padding, so that short texts are judged by it."""
    task = make()
    base = task.load(tiny_decoder(tmp_path), torch.float32)
    base.network.eval()
    encoded = task.encode(ROWS, base)
    together = logits(task, base, encoded, [0, 1, 2, 3])
    alone = torch.cat([logits(task, base, encoded, [row]) for row in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
