"""LN tuning on tiny models."""

import pytest
from transformers import AutoModel

from tests.support.architectures import heads_of, make, trained
from tsugiki.common.adapters.layernorm import LayerNorm, LayerNormSettings
from tsugiki.common.errors import ModelError
from tsugiki.common.tasks.image_classification import MODEL_TYPE


def attach(model, heads=()):
    """Return the model with its adapter."""
    return LayerNorm(LayerNormSettings()).attach(model, heads)


@pytest.mark.parametrize(
    ("model_type", "tensors"),
    [("bert", 2 * (1 + 2 * 2)), ("llama", 1 + 2 * 2), ("gpt2", 2 * (1 + 2 * 2)), ("distilbert", 2 * (1 + 2 * 2))],
)
def test_every_norm_is_trained(model_type, tensors):
    """Catches: a norm that is left out: of the embeddings, at the end, an RMS norm under another name."""
    assert len(trained(attach(make(model_type, AutoModel)))) == tensors


def test_heads_come_on_top():
    """Catches: a norm list that hides the head."""
    names = set(trained(attach(make(), heads_of("bert"))))
    assert len(names) == 10 + 2
    assert len([name for name in names if "classifier.modules_to_save" in name]) == 2


def test_a_network_without_norms_is_refused():
    """Catches: an adapter with nothing in it; a declared reason that is not true any more."""
    assert LayerNorm.why_not(MODEL_TYPE) == "it has no layer norms"
    with pytest.raises(ModelError) as caught:
        attach(make(MODEL_TYPE))
    assert caught.value.code == "adapter-targets"
