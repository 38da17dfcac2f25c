"""Real files, as the studies read them: SST-2's sentences, SNLI's pairs, STS-B and Japanese reviews by position."""

from collections import Counter

import pytest

from tsugiki.common.data.shard import read
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks import TASKS

pytestmark = pytest.mark.data


def test_sst2(real_data):
    """Catches: a quotation mark that joins two sentences into one; a label column taken for text."""
    kind = TASKS.get("sequence-classification")
    task = kind(kind.Settings())
    form = DataFormat(columns={"text": "sentence"}, quoting="none")
    sizes = {}
    for part in ("train", "dev", "test"):
        shard = read(real_data / "sst2" / f"{part}.tsv", task.columns, form, labels=task.labels)
        sizes[part] = len(shard)
        assert set(Counter(shard.columns["label"])) == {0, 1}
    assert sizes == {"train": 60_614, "dev": 6_735, "test": 872}


def test_stsb(real_data):
    """Catches: a first row taken for a header; a comma inside a sentence."""
    kind = TASKS.get("sentence-embedding")
    task = kind(kind.Settings(loss="cosine-similarity", score_max=5.0))
    form = DataFormat(header=False, columns={"sentence1": 0, "sentence2": 1, "score": 2})
    shard = read(real_data / "stsb" / "stsb-en-test.csv", task.columns, form)
    assert len(shard) == 1_379
    assert 0.0 <= min(shard.columns["score"]) <= max(shard.columns["score"]) <= 5.0
    assert all(shard.columns["sentence1"])


def test_snli(real_data):
    """Catches: a quotation mark taken literally, so that a row has too many columns; premise and hypothesis swapped."""
    kind = TASKS.get("sequence-classification")
    task = kind(kind.Settings(num_labels=3, pair=True))
    form = DataFormat(columns={"text": "premise", "text_pair": "hypothesis"})
    shard = read(real_data / "snli" / "validation.tsv", task.columns, form, labels=task.labels)
    assert Counter(shard.columns["label"]) == {0: 3_329, 1: 3_235, 2: 3_278}
    assert shard.columns["text"][0] == "Two women are embracing while holding to go packages."
    assert shard.columns["text_pair"][1] == "Two woman are holding packages."


def test_japanese_reviews(real_data):
    """Catches: labels below zero taken for unknown ones; the first row taken for a header; the parts mixed up."""
    kind = TASKS.get("sequence-classification")
    task = kind(kind.Settings(labels=("1", "0", "-1")))
    form = DataFormat(header=False, columns={"text": 2, "label": 1, "usage": 4}, quoting="none")
    path = real_data / "ja_sentiment" / "jrte_pn.tsv"
    shard = read(path, task.columns, form, labels=task.labels, extra_columns=("usage",))
    parts = Counter(zip(shard.extra["usage"], shard.columns["label"], strict=True))
    assert Counter(shard.extra["usage"]) == {"train": 3_888, "dev": 1_112, "test": 553}
    assert (parts["test", 0], parts["test", 1], parts["test", 2]) == (336, 139, 78)
