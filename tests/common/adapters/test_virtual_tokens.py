"""Virtual tokens on tiny models of every architecture."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM

from tests.support.architectures import CONFIGS, heads_of, make, outputs, stir, trained
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.virtual_tokens import VirtualTokens
from tsugiki.common.errors import ModelError
from tsugiki.common.tasks.image_classification import MODEL_TYPE

SETTINGS = {"prompt": {}, "p-tuning": {"encoder_hidden_size": 8}, "prefix": {}}
COUNT = 3
PAIRS = [(kind, method) for method in SETTINGS for kind in sorted(CONFIGS) if not ADAPTERS.get(method).why_not(kind)]
DECODERS = ("llama", "mistral", "qwen2", "gpt2")

each_pair = pytest.mark.parametrize(("model_type", "method"), PAIRS)
each_method = pytest.mark.parametrize("method", SETTINGS)


def attach(model, method, heads=(), count=COUNT):
    """Return the method and the model with stirred virtual tokens, in eval mode."""
    kind = ADAPTERS.get(method)
    method = kind(kind.Settings(num_virtual_tokens=count, **SETTINGS[method]))
    torch.manual_seed(5)
    return method, stir(method.attach(model, heads)).eval()


def test_every_method_is_tested_and_what_it_knows_is_told():
    """Catches: a method that no test here runs; a pair that is neither known nor refused with a reason."""
    found = {name for name in ADAPTERS.names() if issubclass(ADAPTERS.get(name), VirtualTokens)}
    assert found == set(SETTINGS)
    assert {kind for kind, method in PAIRS if method == "prompt"} == set(CONFIGS) - {"vit", MODEL_TYPE}
    refused = {kind: ADAPTERS.get("prefix").why_not(kind) for kind in set(CONFIGS)}
    assert {kind for kind, why in refused.items() if "keys and values" in why} == {"distilbert", "mpnet"}
    assert {kind for kind, why in refused.items() if "images" in why} == {"vit", MODEL_TYPE}


@each_pair
def test_outputs_change_and_keep_their_places(model_type, method):
    """Catches: virtual tokens that nobody reads, or that stay among the hidden states, which tasks pool."""
    plain = make(model_type, AutoModel)
    before = plain(**_inputs(), output_hidden_states=True)
    _, model = attach(make(model_type, AutoModel), method)
    after = model(**_inputs(), output_hidden_states=True)
    assert after.last_hidden_state.shape == before.last_hidden_state.shape
    assert [states.shape for states in after.hidden_states] == [states.shape for states in before.hidden_states]
    assert not torch.allclose(after.last_hidden_state, before.last_hidden_state, atol=1e-3)
    if before.get("pooler_output") is not None:
        torch.testing.assert_close(after.pooler_output, model.pooler(after.last_hidden_state))


@each_pair
def test_off_gives_the_base_under_trained_heads(model_type, method):
    """Catches: peft's disable_adapter, which fails on encoders; heads that are switched off too."""
    heads = heads_of(model_type)
    method, model = attach(make(model_type), method, heads)
    reference = make(model_type)
    for head in heads:
        reference.get_submodule(head).load_state_dict(model.get_submodule(head).state_dict())
    on = outputs(model)
    with method.disabled(model):
        assert torch.equal(outputs(model), outputs(reference))
        assert not torch.allclose(outputs(model), on, atol=1e-4)
    assert torch.equal(outputs(model), on)


@each_pair
def test_a_padded_row_is_the_row_alone(model_type, method):
    """Catches: padding that is attended to, or whose score is read, as peft's wrapper does on decoders."""
    _, model = attach(make(model_type), method, heads_of(model_type))
    pad = model.config.pad_token_id
    ids = torch.tensor([[5, 8, 13, 21, 34], [34, 55, 89, pad, pad]])
    together = model(input_ids=ids, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])).logits
    alone = model(input_ids=ids[1:, :3], attention_mask=torch.ones(1, 3).long()).logits
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize(
    ("method", "config"), [("prompt", PromptTuningConfig), ("prefix", PrefixTuningConfig)], ids=["prompt", "prefix"]
)
def test_a_language_model_says_what_pefts_says(model_type, method, config):
    """Catches: keys for values, blocks or heads exchanged, a mask or places that are off by the virtual tokens."""
    _, model = attach(make(model_type, AutoModelForCausalLM), method)
    theirs = get_peft_model(
        make(model_type, AutoModelForCausalLM), config(num_virtual_tokens=COUNT, task_type="CAUSAL_LM")
    ).eval()
    ours = model.base_model.virtual_tokens.embedding.weight
    theirs.prompt_encoder["default"].embedding.load_state_dict({"weight": ours.detach()})
    wanted = outputs(theirs)[:, COUNT if method == "prompt" else 0 :]
    torch.testing.assert_close(outputs(model), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", DECODERS)
@each_method
def test_a_language_model_generates_the_same_with_and_without_cache(model_type, method):
    """Catches: virtual tokens put before every new word again; a cache without them."""
    base = make(model_type, AutoModelForCausalLM)
    base.generation_config.eos_token_id = None
    _, model = attach(base, method)
    texts = [
        model.generate(**_inputs(), max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    ]
    assert texts[0].shape == (2, 10)
    assert torch.equal(*texts)


@each_method
def test_what_is_trained(method):
    """Catches: embeddings of the base among it; a count that the settings do not say."""
    _, model = attach(make(auto=AutoModel), method)
    names = {name: tuple(value.shape) for name, value in trained(model).items()}
    assert all(name.startswith("virtual_tokens.") for name in names)
    assert names["virtual_tokens.embedding.weight"] == ((COUNT, 2 * 2 * 16) if method == "prefix" else (COUNT, 16))
    assert (len(names) > 1) == (method == "p-tuning")


def test_a_prompt_begins_with_words():
    """Catches: peft's fallback to noise; words that follow from an unseeded generator."""
    method = ADAPTERS.get("prompt")
    starts = []
    for _ in range(2):
        model = make(auto=AutoModel)
        torch.manual_seed(3)
        method(method.Settings(num_virtual_tokens=5)).attach(model, ())
        starts.append(model.virtual_tokens.embedding.weight)
    words = model.get_input_embeddings().weight
    assert torch.equal(*starts)
    assert all((words == vector).all(dim=1).any() for vector in starts[0])


@each_method
def test_copies_are_apart(method):
    """Catches: a deep copy whose forward is still the original's."""
    _, model = attach(make(auto=AutoModel), method)
    on, twin = outputs(model), copy.deepcopy(model)
    assert torch.equal(outputs(twin), on)
    stir(twin)
    assert not torch.equal(outputs(twin), on)
    assert torch.equal(outputs(model), on)


@each_method
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_per_sample_gradients(method):
    """Catches: virtual tokens looked up once for all rows, of which Opacus makes one row's gradient."""
    opacus = pytest.importorskip("opacus", reason="Opacus, of the extra [privacy], is not installed")
    base = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = attach(base, method, ("classifier",))[1].train()
    wrapped = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    functional.cross_entropy(wrapped(**_inputs()).logits, torch.tensor([0, 1])).backward()
    for row in range(2):
        model.zero_grad()
        logits = model(**{key: value[row : row + 1] for key, value in _inputs().items()}).logits
        functional.cross_entropy(logits, torch.tensor([row])).backward()
        for name, parameter in trained(model).items():
            found = wrapped.get_parameter(f"_module.{name}").grad_sample[row]
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_unknown_architecture_is_refused():
    """Catches: an AttributeError in the middle of a start."""
    with pytest.raises(ModelError) as caught:
        attach(make(MODEL_TYPE), "prompt")
    assert caught.value.code == "adapter-unsupported"


def _inputs():
    return {"input_ids": torch.tensor([[5, 8, 13, 21], [34, 55, 89, 2]]), "attention_mask": torch.ones(2, 4).long()}
