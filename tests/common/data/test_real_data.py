"""Real files, read as the studies read them: SST-2's tab-separated sentences and STS-B's rows without a header."""

from collections import Counter

import pytest

from common.data.shard import read
from common.settings import DataFormat
from common.tasks import TASKS

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
