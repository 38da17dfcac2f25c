"""The features that the head reads, and their sums over a site's rows."""

import numpy as np
import pytest
import torch

from tests.support.federation import tiny_config
from tests.support.tiny import tiny_llama
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training import features
from tsugiki.client.training.features import rows_for_sums, sum_features
from tsugiki.common.head_sums import ClosedFormHead, check_sums
from tsugiki.common.model.linear_head import linear_head, with_head
from tsugiki.common.model.load import load_graft


def loaded(folder, **sections):
    """Return the model of a tiny run, its head, and its first site's rows."""
    config = tiny_config(folder, **sections)
    graft = load_graft(config, config.model.name, config.run.seed)
    graft.write(graft.initial)
    site = simulated_sites(config)[0]
    return graft, linear_head(graft), graft.task.encode(site.train_shard(graft.task), graft.base)


def logits_of(graft, encoded):
    """Return the model's own logits of all rows."""
    with torch.no_grad():
        batch = graft.task.batch(encoded, range(len(encoded)), graft.base)
        return graft.task.logits(graft.base.network, batch).numpy()


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_the_sums_are_over_what_the_head_reads(tmp_path, base):
    """Catches: features of another layer, or of another position of the text; dropout; a row twice."""
    model = {"name": str(tiny_llama(tmp_path / "llama"))} if base == "llama" else {}
    graft, head, encoded = loaded(tmp_path, **({"model": model} if model else {}))
    count = len(encoded)
    graft.base.network.train()
    sums = sum_features(graft, head, encoded, range(count), 5, 1)
    assert graft.base.network.training
    graft.base.network.eval()
    check_sums(sums, count)
    # with each feature as the weight of an output, the model's own logits say what the head reads
    weight = np.zeros((head.classes, head.width), np.float32)
    read = np.zeros((count, head.width))
    for column in range(head.width):
        weight[:] = 0
        weight[0, column] = 1
        values = ClosedFormHead(weight, np.zeros(head.classes, np.float32), 1.0, 1.0)
        graft.write(with_head(graft.initial, graft, head, values))
        read[:, column] = logits_of(graft, encoded)[:, 0]
    graft.write(graft.initial)
    ones = np.column_stack([read, np.ones(count)])
    assert np.allclose(sums.gram, ones.T @ ones, rtol=1e-4, atol=1e-4)
    assert np.allclose(sums.moments, ones.T @ np.eye(2)[encoded.targets], rtol=1e-4, atol=1e-4)
    assert head.bias == (base == "bert")


def test_equal_calls_give_equal_bytes_and_leave_no_hook(tmp_path):
    """Catches: a hook that stays, so that the model answers with features."""
    graft, head, encoded = loaded(tmp_path)
    before = logits_of(graft, encoded)
    first, second = (sum_features(graft, head, encoded, range(len(encoded)), 5, 1) for _ in range(2))
    assert first.gram.tobytes() == second.gram.tobytes()
    assert first.moments.tobytes() == second.moments.tobytes()
    assert np.array_equal(first.gram, first.gram.T)
    assert np.array_equal(logits_of(graft, encoded), before)


def test_few_rows_are_all_taken_and_many_are_drawn(monkeypatch):
    """Catches: the first rows of a sorted file; another draw in another process; rows beyond the file."""
    monkeypatch.setattr(features, "MOST_ROWS", 10)
    assert rows_for_sums(10, 1, "acme") == list(range(10))
    drawn = rows_for_sums(1000, 1, "acme")
    assert drawn == sorted(set(drawn)) == rows_for_sums(1000, 1, "acme")
    assert len(drawn) == 10
    assert max(drawn) > 100
    assert drawn != rows_for_sums(1000, 1, "other")
    assert drawn != rows_for_sums(1000, 2, "acme")
