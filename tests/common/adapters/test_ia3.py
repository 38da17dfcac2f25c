"""(IA)^3 on tiny models."""

import pytest

from tests.support.architectures import CONFIGS, heads_of, make, trained
from tsugiki.common.adapters.ia3 import _DEFAULT_TARGETS, Ia3, Ia3Settings
from tsugiki.common.errors import ModelError


def attach(model, heads=("classifier",), **settings):
    """Return the model with its adapter."""
    return Ia3(Ia3Settings(**settings)).attach(model, heads)


def factors(model):
    """Return the number of factors by the name of the layer."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): value.numel()
        for name, value in trained(model).items()
        if "ia3_l" in name
    }


def test_every_architecture_tested():
    """Catches: an architecture in the table of which nobody has seen that its names are right."""
    assert set(_DEFAULT_TARGETS) == set(CONFIGS)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "mpnet", "llama", "vit"])
def test_keys_values_and_the_inner_activations_of_each_block(model_type):
    """Catches: peft's own default for BERT, which also scales the inputs of the attention's output projection."""
    found = factors(attach(make(model_type), heads_of(model_type)))
    assert sorted(found.values()) == [16] * 4 + [24] * 2  # in each of two blocks 2 keys and values, 1 inner activation
    assert not [name for name in found if name.endswith("attention.output.dense")]


def test_targets_given_are_the_targets():
    """Catches: inputs and outputs exchanged; the default added."""
    found = factors(attach(make(), target_modules=("query",), feedforward_modules=("dense",)))
    assert found["bert.encoder.layer.0.attention.self.query"] == 16
    assert found["bert.encoder.layer.1.output.dense"] == 24
    assert not [name for name in found if name.endswith((".key", ".value"))]


@pytest.mark.parametrize("settings", [{"target_modules": ("nope",)}, {"feedforward_modules": ("key", "nope")}])
def test_unknown_targets_list_the_candidates(settings):
    """Catches: a layer that is silently left out; a name taken for a pattern."""
    with pytest.raises(ModelError, match=r"nope for the architecture 'bert'\. Expected some of dense, key") as caught:
        attach(make(), **settings)
    assert caught.value.code == "adapter-targets"


def test_an_architecture_without_a_default():
    """Catches: nothing at all adapted."""
    model = make()
    model.config.model_type = "unheard-of"
    with pytest.raises(ModelError, match="no default for the architecture 'unheard-of'"):
        attach(model)
