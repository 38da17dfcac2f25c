"""LoRA and its variants on tiny models."""

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel

from tests.support.architectures import CONFIGS, heads_of, make, trained
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.lora import ATTENTION_TARGETS, Lora, LoraSettings
from tsugiki.common.errors import ExportError, ModelError
from tsugiki.common.tasks.image_classification import MODEL_TYPE

LAYERS = {MODEL_TYPE: 1}
"""How often each target is there, if not in every one of two blocks."""

every_model_type = pytest.mark.parametrize("model_type", sorted(CONFIGS))


def attach(model, heads=("classifier",), **settings):
    """Return the method and the model with its adapter, in eval mode."""
    method = Lora(LoraSettings(**{"rank": 2, **settings}))
    return method, method.attach(model, heads).eval()


def test_registered_and_every_architecture_tested():
    """Catches: a missing registration; an architecture in the table that no test here runs."""
    assert ADAPTERS.get("lora") is Lora
    assert set(ATTENTION_TARGETS) == set(CONFIGS)


@every_model_type
def test_only_adapter_and_heads_require_gradients(model_type):
    """Catches: a base that is trained along; a head that stays at its random values; a head's frozen copy trained."""
    heads = heads_of(model_type)
    _, model = attach(make(model_type), heads)
    names = set(trained(model))
    adapter = {name for name in names if ".lora_A.default." in name or ".lora_B.default." in name}
    assert adapter
    for head in heads:
        own = {name for name in names - adapter if f".{head}.modules_to_save.default." in name}
        assert len(own) == len(list(make(model_type).get_submodule(head).parameters()))
        names -= own
    assert names == adapter
    layers = LAYERS.get(model_type, 2) * len(ATTENTION_TARGETS[model_type])
    assert len(adapter) == 2 * layers


def test_a_base_without_heads():
    """Catches: peft's own guess of a head (it looks for `classifier` and `score`) for an embedding model."""
    _, model = attach(make(auto=AutoModel), ())
    assert all(".lora_" in name for name in trained(model))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("nope",), "nope"),
        (("query", "nope", "no"), "nope, no"),
        (("classifier",), "classifier"),
        (("Query",), "Query"),
    ],
)
def test_unknown_targets_list_the_candidates(targets, named):
    """Catches: a target that is silently left out; a head offered, which is trained in full already."""
    with pytest.raises(ModelError) as caught:
        attach(make(), target_modules=targets)
    assert caught.value.code == "adapter-targets"
    assert str(caught.value) == (
        f"adapter.target_modules names {named} for the architecture 'bert'. Expected some of dense, key, query, value. "
        "Try: set adapter.target_modules."
    )


def test_an_architecture_without_a_default():
    """Catches: an empty list of targets handed to peft, which takes its own default or fails in its own words."""
    model = make()
    model.config.model_type = "unheard-of"
    with pytest.raises(
        ModelError, match=r"no default for the architecture 'unheard-of'.*some of dense, key, query, value"
    ):
        attach(model)
    _, grafted = attach(model, target_modules=("key",))
    assert {name.split(".")[-4] for name in trained(grafted) if "lora" in name} == {"key"}


def test_targets_given_are_the_targets():
    """Catches: targets added to the default in place of replacing it."""
    _, model = attach(make(), target_modules=("dense",))
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained(model) if "lora" in name}
    assert "bert.encoder.layer.0.attention.output.dense" in layers
    assert all(layer.endswith("dense") for layer in layers)


@pytest.mark.parametrize(("rank", "fits"), [(16, True), (17, False), (256, False)])
def test_a_rank_larger_than_the_layers_are_wide(rank, fits):
    """Catches: an adapter with more parameters than the layer that it adapts; a bound that is one off."""
    if fits:
        attach(make(), rank=rank)
        return
    with pytest.raises(ModelError, match=f"adapter.rank = {rank} is too large. Expected at most 16") as caught:
        attach(make(), rank=rank)
    assert caught.value.code == "adapter-rank"


def test_a_narrow_target_counts():
    """Catches: the width of the first target taken for all (Mistral's values have one head of two here: 8)."""
    attach(make("mistral"), ("score",), rank=8)
    with pytest.raises(ModelError, match="at most 8"):
        attach(make("mistral"), ("score",), rank=9)


def test_rank_alpha_and_dropout_reach_peft():
    """Catches: a setting that is validated, hashed and ignored."""
    _, model = attach(make(), rank=4, alpha=12.0, dropout=0.25)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert layer.lora_A["default"].weight.shape == (4, 16)
    assert layer.scaling["default"] == 3.0
    assert layer.lora_dropout["default"].p == 0.25


def test_rslora_scales_by_the_root_of_the_rank():
    """Catches: a setting that is hashed and ignored."""
    _, model = attach(make(), rank=4, alpha=12.0, use_rslora=True)
    assert model.base_model.model.bert.encoder.layer[0].attention.self.query.scaling["default"] == 6.0


def test_dora_trains_the_length_of_each_row():
    """Catches: magnitudes that are frozen, and so not exchanged; lengths of columns."""
    _, model = attach(make(), use_dora=True)
    magnitudes = {name: value for name, value in trained(model).items() if "magnitude" in name}
    assert len(magnitudes) == 4
    weight = make().bert.encoder.layer[0].attention.self.query.weight
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector.default.weight"
    torch.testing.assert_close(magnitudes[name].detach(), weight.detach().norm(dim=1))


def test_the_orthogonal_start_is_away_from_zero_and_takes_an_even_rank():
    """Catches: B at zero; peft's own ValueError in the middle of a start."""
    _, model = attach(make(), rank=4, init="orthogonal")
    assert all(value.any() for name, value in trained(model).items() if "lora_B" in name)
    with pytest.raises(ValidationError, match=r"an even rank"):
        LoraSettings(rank=3, init="orthogonal")


@pytest.mark.parametrize("settings", [{}, {"init": "orthogonal"}, {"use_dora": True}])
def test_a_frozen_a_is_a_constant(settings):
    """Catches: an A that is frozen and compared by nobody, or compared and trained."""
    method, model = attach(make(), freeze_a="yes", **settings)
    constants = method.constants(model)
    assert len(constants) == 4
    assert not set(constants) & set(trained(model))
    assert not [name for name in trained(model) if "lora_A" in name]


def test_a_frozen_factor_stays_frozen_when_the_adapter_comes_on_again():
    """Catches: peft, which lets every tensor be trained that it switches on: A would gather gradients for ever."""
    method, model = attach(make(), freeze_a="yes")
    before = set(trained(model))
    assert not any(".lora_A." in name for name in before)
    for fails in (False, True):
        try:
            with method.disabled(model):
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert set(trained(model)) == before


@every_model_type
def test_a_merged_pair_is_zero_scaled_alike_and_counts(model_type):
    """Catches: a second pair that is not active, has another scale, or is a random start; one lost in a merge."""
    method, model = attach(make(model_type), heads_of(model_type), merged_rank=3)
    named = model.get_base_model().named_modules()
    layers = {name: module for name, module in named if "merged" in getattr(module, "lora_A", ())}
    assert layers
    expected = {}
    for name, layer in layers.items():
        own = min(3, layer.in_features, layer.out_features)
        assert layer.r["merged"] == own
        assert layer.scaling["merged"] == layer.scaling["default"]
        assert not layer.get_delta_weight("merged").any()
        assert layer.active_adapters == ["default", "merged"]
        weight = layer.get_base_layer().weight.detach().clone()
        with torch.no_grad():
            for which in ("default", "merged"):
                layer.lora_A[which].weight.fill_(0.1)
                layer.lora_B[which].weight.fill_(0.2)
            expected[name] = weight + layer.get_delta_weight("default") + layer.get_delta_weight("merged")
    whole = dict(method.merge(model).named_modules())
    for name, weight in expected.items():
        assert torch.allclose(whole[name].weight, weight, atol=1e-6), name


def test_two_pairs_are_not_written_as_one(tmp_path):
    """Catches: an export without what the rounds have learned."""
    method, model = attach(make(), merged_rank=3)
    with pytest.raises(ExportError) as caught:
        method.save(model, tmp_path, "org/base")
    assert caught.value.code == "export-unsupported"
    assert not list(tmp_path.iterdir())
