"""BitFit on tiny models."""

import pytest
import torch
from transformers import AutoModel, BertConfig

from tests.support.architectures import CONFIGS, heads_of, make, outputs, stir, trained
from tsugiki.common.adapters.bitfit import NO_BIASES, Bitfit, BitfitSettings
from tsugiki.common.errors import ModelError
from tsugiki.common.tasks.image_classification import MODEL_TYPE

WITH_BIASES = sorted(set(CONFIGS) - {"llama", "mistral"})


def attach(model, heads=()):
    """Return the method and the model."""
    method = Bitfit(BitfitSettings())
    return method, method.attach(model, heads)


@pytest.mark.parametrize("model_type", WITH_BIASES)
def test_biases_and_heads_are_trained_and_nothing_else(model_type):
    """Catches: layer norms' biases left out; a head's weight frozen; a bias of a head counted as the adapter's base."""
    heads = heads_of(model_type)
    _, model = attach(make(model_type), heads)
    names = set(dict(make(model_type).named_parameters()))
    wanted = {name for name in names if name.endswith("bias") or name.startswith(tuple(f"{head}." for head in heads))}
    assert set(trained(model)) == wanted
    kept = {name.replace("/", ".") for name, _ in model.base_values.named_buffers()}
    assert kept == {name for name in wanted if not name.startswith(tuple(f"{head}." for head in heads))}


def test_count_for_all_minilm():
    """Catches: a documented number that is none; a pooler without effect among what is exchanged."""
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    _, model = attach(model)
    # in each of 6 blocks: 5 linear layers of width 384, one of 1536, 2 norms; and the embeddings' norm
    assert sum(value.numel() for value in trained(model).values()) == 6 * (5 * 384 + 1536 + 2 * 384) + 384
    assert not [name for name in trained(model) if "pooler" in name]


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_base_without_biases_is_refused(model_type):
    """Catches: an adapter with nothing in it; a base that is left frozen."""
    assert Bitfit.why_not(model_type) == NO_BIASES
    model = make(model_type)
    with pytest.raises(ModelError, match=NO_BIASES) as caught:
        attach(model, ("score",))
    assert caught.value.code == "adapter-unsupported"
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit", MODEL_TYPE])
def test_merged_is_a_plain_model(model_type):
    """Catches: the base's own values in what is exported; a merge in place."""
    method, model = attach(make(model_type), heads_of(model_type))
    stir(model)
    merged = method.merge(model)
    assert torch.equal(outputs(merged), outputs(model))
    assert not torch.allclose(outputs(merged), outputs(make(model_type)), atol=1e-4)
    assert set(dict(merged.named_modules())) == set(dict(make(model_type).named_modules()))
    with method.disabled(model):
        assert not torch.allclose(outputs(merged), outputs(model), atol=1e-4)
