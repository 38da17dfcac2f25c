"""What peft does for us, on tiny models."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.numpy import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MPNetConfig,
    Qwen2Config,
    RobertaConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from common.adapters import ADAPTERS
from common.adapters.peft_methods import _DEFAULT_TARGETS, Lora, LoraSettings
from common.errors import ModelError
from common.tasks.image_classification import MODEL_TYPE, small_cnn

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "bert": BertConfig(vocab_size=99, **SIZES),
    "roberta": RobertaConfig(vocab_size=99, **SIZES),
    "xlm-roberta": XLMRobertaConfig(vocab_size=99, **SIZES),
    "electra": ElectraConfig(vocab_size=99, embedding_size=8, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "mpnet": MPNetConfig(vocab_size=99, **SIZES),
    "llama": LlamaConfig(vocab_size=99, pad_token_id=0, **SIZES),
    "mistral": MistralConfig(vocab_size=99, pad_token_id=0, num_key_value_heads=1, **SIZES),
    "qwen2": Qwen2Config(vocab_size=99, pad_token_id=0, num_key_value_heads=1, **SIZES),
    "gpt2": GPT2Config(vocab_size=99, pad_token_id=0, n_embd=16, n_layer=2, n_head=2),
    "vit": ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **SIZES),
    MODEL_TYPE: small_cnn()[0](channels=3, image_size=16),
}
HEADS = {
    "distilbert": ("pre_classifier", "classifier"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "gpt2"), ("score",)),
    MODEL_TYPE: (),
}
LAYERS = {MODEL_TYPE: 1}
"""How often each target is there, if not in every one of two blocks."""

INPUTS = {"input_ids": torch.tensor([[5, 8, 13, 21], [34, 55, 89, 2]]), "attention_mask": torch.ones(2, 4).long()}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))

every_model_type = pytest.mark.parametrize("model_type", sorted(CONFIGS))


def heads_of(model_type):
    """Return the heads of a classifier."""
    return HEADS.get(model_type, ("classifier",))


def make(model_type="bert", auto=AutoModelForSequenceClassification):
    """Return a tiny model with random weights, always the same, in eval mode."""
    torch.manual_seed(7)
    if model_type in ("vit", MODEL_TYPE):
        auto = AutoModelForImageClassification
    return auto.from_config(copy.deepcopy(CONFIGS[model_type]), dtype=torch.float32).eval()


def attach(model, heads=("classifier",), **settings):
    """Return the method and the model with its adapter, in eval mode."""
    method = Lora(LoraSettings(**{"rank": 2, **settings}))
    return method, method.attach(model, heads).eval()


def trained(model):
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stir(model, only=""):
    """Move trained parameters, as training would; B leaves zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if only in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def outputs(model):
    """Return logits or hidden states."""
    inputs = {"pixel_values": IMAGES.to(model.dtype)} if model.config.model_type in ("vit", MODEL_TYPE) else INPUTS
    with torch.no_grad():
        return model(**inputs)[0]


def test_registered_and_every_architecture_tested():
    """Catches: a missing registration; an architecture in the table that no test here runs."""
    assert ADAPTERS.get("lora") is Lora
    assert set(_DEFAULT_TARGETS) == set(CONFIGS)


@every_model_type
def test_identity_at_start(model_type):
    """Catches: a B that is not zero; a base that is changed when the adapter is put on."""
    model = make(model_type)
    before = outputs(model)
    _, grafted = attach(model, heads_of(model_type))
    assert torch.equal(outputs(grafted), before)


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
    layers = LAYERS.get(model_type, 2) * len(_DEFAULT_TARGETS[model_type])
    assert len(adapter) == 2 * layers


def test_a_base_without_heads():
    """Catches: peft's own guess of a head (it looks for `classifier` and `score`) for an embedding model."""
    _, model = attach(make(auto=AutoModel), ())
    assert all(".lora_" in name for name in trained(model))


@every_model_type
def test_disabled_gives_the_base_under_trained_heads(model_type):
    """Catches: peft's disable_adapter alone, which puts the untrained heads back as well."""
    heads = heads_of(model_type)
    method, model = attach(make(model_type), heads)
    stir(model)
    reference = make(model_type)
    for head in heads:
        wrapper = model.base_model.model.get_submodule(head)
        reference.get_submodule(head).load_state_dict(wrapper.modules_to_save["default"].state_dict())
    on, names = outputs(model), set(trained(model))
    with method.disabled(model):
        assert torch.allclose(outputs(model), outputs(reference), atol=1e-6)
        assert not torch.allclose(outputs(model), on, atol=1e-4)
        assert not heads or not torch.allclose(outputs(model), outputs(make(model_type)), atol=1e-4)
    assert torch.equal(outputs(model), on)
    assert set(trained(model)) == names


def test_disabled_ends_after_an_error():
    """Catches: an adapter that stays off, with frozen parameters, when an evaluation fails."""
    method, model = attach(make())
    stir(model)
    on, names = outputs(model), set(trained(model))
    with pytest.raises(ZeroDivisionError), method.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(outputs(model), on)
    assert set(trained(model)) == names


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
        f"adapter.target_modules: {named} for the architecture 'bert'. expected some of dense, key, query, value. "
        "Do: set adapter.target_modules."
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
    with pytest.raises(ModelError, match=f"adapter.rank = {rank}. expected at most 16") as caught:
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


@every_model_type
def test_merge_gives_a_plain_model_and_leaves_the_original(model_type):
    """Catches: a merge in place, after which the run would go on with a changed base; gpt2's transposed weights."""
    method, model = attach(make(model_type), heads_of(model_type))
    stir(model).double()  # in which rounding hides nothing
    on = outputs(model)
    merged = method.merge(model)
    assert type(merged) is type(make(model_type))
    assert set(dict(merged.named_parameters())) == set(dict(make(model_type).named_parameters()))
    assert torch.allclose(outputs(merged), on, atol=1e-9)
    assert torch.equal(outputs(model), on)
    with method.disabled(model):
        assert not torch.allclose(outputs(model), on, atol=1e-4)
    stir(model)
    assert torch.allclose(outputs(merged), on, atol=1e-9)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "gpt2", "vit", MODEL_TYPE])
def test_save_writes_what_peft_loads(model_type, tmp_path):
    """Catches: a folder without the heads; a local path named as the base; peft's empty model card."""
    method, model = attach(make(model_type), heads_of(model_type))
    stir(model)
    model.peft_config["default"].base_model_name_or_path = "/home/me/model"
    method.save(model, tmp_path, "org/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert model.peft_config["default"].base_model_name_or_path == "/home/me/model"
    again = PeftModel.from_pretrained(make(model_type), tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize(
    ("model_type", "auto", "heads", "task_type"),
    [
        ("llama", AutoModelForCausalLM, (), "CAUSAL_LM"),
        ("gpt2", AutoModelForCausalLM, (), "CAUSAL_LM"),
        ("llama", AutoModelForSequenceClassification, ("score",), "SEQ_CLS"),
        ("llama", AutoModel, (), "FEATURE_EXTRACTION"),
        ("bert", AutoModel, (), "FEATURE_EXTRACTION"),
        (MODEL_TYPE, None, (), None),
    ],
)
def test_peft_is_told_the_kind_of_model(model_type, auto, heads, task_type):
    """Catches: a language model that peft takes for one that makes features, and that cannot generate."""
    _, model = attach(make(model_type, auto), heads)
    assert model.peft_config["default"].task_type == task_type
    assert hasattr(model, "generate") or task_type != "CAUSAL_LM"


def test_a_language_model_loads_by_its_adapter_alone(tmp_path):
    """Catches: an adapter that peft's own loader for language models does not take; a frozen output layer saved."""
    base = make("llama", AutoModelForCausalLM)
    base.save_pretrained(tmp_path / "base")
    method, model = attach(base, ())
    stir(model)
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(outputs(again), outputs(model))
    assert outputs(again).shape[-1] == 99
