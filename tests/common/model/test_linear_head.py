"""Which heads have a solution in closed form, and where its numbers go."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.federation import tiny_config
from tsugiki.common.config.parse import changed
from tsugiki.common.head_sums import ClosedFormHead
from tsugiki.common.model import linear_head as module
from tsugiki.common.model.linear_head import LinearHead, linear_head, warm_head_of, with_head
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.spec import unpack


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run that computes its head."""
    return tiny_config(tmp_path_factory.mktemp("run"), task={"warm_head": "auto"})


@pytest.fixture
def graft(config):
    """The shared model."""
    return load_graft(config, config.model.name, config.run.seed)


def test_a_classifier_of_one_layer_is_found(config, graft):
    """Catches: the layer that peft keeps beside the trained one; another layer's width."""
    head = linear_head(graft)
    assert head == warm_head_of(graft, config)
    assert (head.classes, head.bias) == (2, True)
    assert head.layer.weight.requires_grad
    assert head.width == head.layer.weight.shape[1]
    assert {f"{head.name}.weight", f"{head.name}.bias"} == {
        tensor.name for tensor in graft.spec.tensors if tensor.part == "head"
    }


def test_a_head_with_another_trained_layer_is_left_random(config):
    """Catches: a solution on the features of a layer that training changes."""
    pooled = changed(config, {"task.train_pooler": True})
    graft = load_graft(pooled, pooled.model.name, pooled.run.seed)
    assert linear_head(graft) is None
    assert "not one linear layer" in warm_head_of(graft, pooled)


def test_a_task_without_classes_has_none(tmp_path):
    """Catches: a line about heads in every run of another task."""
    config = tiny_config(tmp_path, task={"name": "sentence-embedding"}, evaluation={"data": ""})
    graft = SimpleNamespace(spec=SimpleNamespace(tensors=()), task=SimpleNamespace(labels=()))
    assert linear_head(graft) is None
    assert warm_head_of(graft, config) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task.warm_head": "off"}, ""),
        ({"privacy": {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}}, "private"),
        ({"privacy": {"examples": {"noise_multiplier": 1.0, "delta": 1e-3}}}, "private"),
    ],
)
def test_what_switches_it_off(config, graft, changes, reason):
    """Catches: exact sums in a private run; a setting without effect."""
    found = warm_head_of(graft, changed(config, changes))
    assert isinstance(found, str)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("bound", ["MOST_WIDTH", "MOST_NUMBERS"])
def test_its_size_is_bounded(config, graft, monkeypatch, bound):
    """Catches: hours of solving, or messages of gigabytes, for a wide base."""
    monkeypatch.setattr(module, bound, 5)
    assert "too many" in warm_head_of(graft, config)


def test_the_numbers_go_into_the_head_alone(graft):
    """Catches: a head written into the adapter; the initial values changed in place."""
    head = linear_head(graft)
    before = graft.initial.copy()
    weight = np.arange(head.classes * head.width, dtype=np.float32).reshape(head.classes, head.width)
    bias = np.array([5.0, -5.0], np.float32)
    vector = with_head(graft.initial, graft, head, ClosedFormHead(weight, bias, 1.0, 1.0))
    assert np.array_equal(graft.initial, before)
    old = unpack(before, graft.spec)
    for name, values in unpack(vector, graft.spec).items():
        wanted = {f"{head.name}.weight": weight, f"{head.name}.bias": bias}.get(name, old[name])
        assert np.array_equal(values, wanted)


def test_a_layer_without_a_bias(graft):
    """Catches: a bias written where there is none."""
    head = linear_head(graft)
    bare = LinearHead(head.name, head.layer, head.width, head.classes, False)
    values = ClosedFormHead(np.ones((2, head.width), np.float32), np.ones(2, np.float32), 1.0, 1.0)
    tensors = unpack(with_head(graft.initial, graft, bare, values), graft.spec)
    assert not (tensors[f"{head.name}.bias"] == 1).any()
