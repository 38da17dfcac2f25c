"""What every method of peft's promises, on tiny models of every architecture."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.numpy import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.architectures import CONFIGS, heads_of, make, outputs, stir, trained
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.peft_base import PeftMethod
from tsugiki.common.tasks.image_classification import MODEL_TYPE

KINDS = {
    "lora": {"rank": 2},
    "lora-rslora": {"rank": 2, "use_rslora": True},
    "lora-dora": {"rank": 2, "use_dora": True},
    "lora-orthogonal": {"rank": 2, "init": "orthogonal"},
    "ia3": {},
    "vera": {"rank": 3},
    "layernorm": {},
}
PAIRS = [
    (model_type, kind)
    for model_type in sorted(CONFIGS)
    for kind in KINDS
    if not ADAPTERS.get(kind.partition("-")[0]).why_not(model_type)
]
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of layer norms
each_pair = pytest.mark.parametrize(("model_type", "kind"), PAIRS)


def attach(model, heads=("classifier",), kind="lora"):
    """Return the method and the model with its adapter, in eval mode."""
    method = ADAPTERS.get(kind.partition("-")[0])
    method = method(method.Settings(**KINDS[kind]))
    return method, method.attach(model, heads).eval()


def test_every_method_of_pefts_is_tested():
    """Catches: a method that no test here runs."""
    found = {name for name in ADAPTERS.names() if issubclass(ADAPTERS.get(name), PeftMethod)}
    assert found == {kind.partition("-")[0] for kind in KINDS}


@each_pair
def test_only_adapter_and_heads_require_gradients(model_type, kind):
    """Catches: a base that is trained along; a head that stays at its random values; a frozen copy trained."""
    heads = heads_of(model_type)
    _, model = attach(make(model_type), heads, kind)
    names = set(trained(model))
    for head in heads:
        own = {name for name in names if f".{head}.modules_to_save.default." in name}
        assert len(own) == len(list(make(model_type).get_submodule(head).parameters()))
        names -= own
    assert names
    assert all(".default" in name for name in names)


@each_pair
def test_identity_at_start(model_type, kind):
    """Catches: a B that is not zero; a base that is changed when the adapter is put on."""
    model = make(model_type)
    before = outputs(model)
    _, grafted = attach(model, heads_of(model_type), kind)
    assert torch.allclose(outputs(grafted), before, atol=0 if "orthogonal" not in kind else 1e-6)


@each_pair
def test_disabled_gives_the_base_under_trained_heads(model_type, kind):
    """Catches: peft's disable_adapter alone, which puts the untrained heads back as well."""
    heads = heads_of(model_type)
    method, model = attach(make(model_type), heads, kind)
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


@each_pair
def test_merge_gives_a_plain_model_and_leaves_the_original(model_type, kind):
    """Catches: a merge in place, after which the run would go on with a changed base; gpt2's transposed weights."""
    method, model = attach(make(model_type), heads_of(model_type), kind)
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


def test_a_tied_output_layer_is_merged_into_weights_of_its_own(tmp_path):
    """Catches: what the output layer has learned merged into the embeddings as well, which are the same tensor."""
    base = make("llama", AutoModelForCausalLM, tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    lora = ADAPTERS.get("lora")
    method = lora(lora.Settings(rank=2, target_modules=("q_proj", "lm_head")))
    model = stir(method.attach(base, ()).eval())
    method.merge(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(outputs(again), outputs(model), atol=1e-5)
    assert torch.equal(again.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.allclose(again.lm_head.weight, again.model.embed_tokens.weight, atol=1e-2)


@each_pair
def test_save_writes_what_peft_loads(model_type, kind, tmp_path):
    """Catches: a folder without the heads; a local path named as the base; peft's empty model card."""
    method, model = attach(make(model_type), heads_of(model_type), kind)
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


@pytest.mark.parametrize("kind", KINDS)
def test_whether_transformers_loads_it_is_told_rightly(kind, tmp_path):
    """Catches: an embedder whose adapter is lost in part without an error; an exception that outlives its reason."""
    method, model = attach(make(auto=AutoModel), (), kind)
    method.save(stir(model), tmp_path, "org/base")
    plain = make(auto=AutoModel)
    try:
        plain.load_adapter(str(tmp_path))  # what `SentenceTransformer(folder)` does
        same = torch.allclose(outputs(plain.eval()), outputs(model), atol=1e-6)
    except ValueError:  # VeRA
        same = False
    assert same == method.loads_anywhere
