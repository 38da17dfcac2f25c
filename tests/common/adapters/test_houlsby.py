"""Houlsby modules on tiny models."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from tests.support.exports import load_alone, save_alone
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.houlsby import Houlsby, HoulsbySettings
from tsugiki.common.errors import ModelError

HIDDEN, BLOCKS, WIDTH = 32, 2, 5
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "bert": BertConfig(vocab_size=99, **SIZES),
    "roberta": RobertaConfig(vocab_size=99, **SIZES),
    "xlm-roberta": XLMRobertaConfig(vocab_size=99, **SIZES),
    "electra": ElectraConfig(vocab_size=99, embedding_size=16, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=99, dim=HIDDEN, n_layers=BLOCKS, n_heads=2, hidden_dim=48),
    "llama": LlamaConfig(vocab_size=99, pad_token_id=0, **SIZES),
}
HEADS = {"bert": ("classifier",), "distilbert": ("pre_classifier", "classifier"), "llama": ("score",)}
PLACES = {
    "bert": ("attention.output.dropout", "output.dropout"),
    "distilbert": ("attention.out_lin", "ffn.dropout"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
}
INPUTS = {"input_ids": torch.tensor([[5, 8, 13, 21], [34, 55, 89, 2]]), "attention_mask": torch.ones(2, 4).long()}

every_model_type = pytest.mark.parametrize("model_type", sorted(Houlsby.model_types))
each_structure = pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "llama"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors on several threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(model_type="bert", auto=AutoModelForSequenceClassification, dtype=torch.float32, **changes):
    """Return a tiny model with random weights, always the same, in eval mode."""
    config = copy.deepcopy(CONFIGS[model_type])
    config.update(changes)
    torch.manual_seed(7)
    return auto.from_config(config, dtype=dtype).eval()


def attach(model, heads=("classifier",), **settings):
    """Return the method and the model with its bottlenecks."""
    torch.manual_seed(11)
    method = Houlsby(HoulsbySettings(bottleneck=WIDTH, **settings))
    return method, method.attach(model, heads)


def stir(model):
    """Move every trained parameter, as training would; `up` leaves zero."""
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def outputs(model):
    """Return the first output: logits or hidden states."""
    with torch.no_grad():
        return model(**INPUTS)[0]


def trained(model):
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def biased(model, model_type):
    """Give the bottlenecks of the first block different biases, nothing else; return the block and the two biases."""
    block = next(m for n, m in model.named_modules() if n.endswith(("layer.0", "layers.0")))
    biases = torch.randn(2, HIDDEN)
    with torch.no_grad():
        for place, bias in zip(PLACES[model_type], biases, strict=True):
            block.get_submodule(place).bottleneck.up.bias.copy_(bias)
    return block, biases


def test_registered_and_every_architecture_tested():
    """Catches: a missing registration; an architecture in the table that no test here runs."""
    assert ADAPTERS.get("houlsby") is Houlsby
    assert Houlsby.model_types == set(CONFIGS)


@every_model_type
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_identity_after_attach(model_type, activation):
    """Catches: an up-projection that is not zero; another object returned; the base's tensors renamed."""
    model = make(model_type)
    before, names = outputs(model), set(dict(model.named_parameters()))
    _, grafted = attach(model, (), activation=activation)
    assert grafted is model
    assert torch.equal(outputs(model), before)
    assert names == {name for name in dict(model.named_parameters()) if ".bottleneck." not in name}
    down = model.get_parameter(next(name for name in trained(model) if name.endswith("down.weight")))
    assert 0.01 < down.std() < 0.03


@every_model_type
def test_trainable_names_and_count(model_type):
    """Catches: a block, a place or a bias that is left out; trainable tensors of the base; unreadable names."""
    _, model = attach(make(model_type, AutoModel), ())
    path, places = ("encoder.layer", PLACES["bert"])
    if model_type in ("distilbert", "llama"):
        path, places = {"distilbert": "transformer.layer", "llama": "layers"}[model_type], PLACES[model_type]
    expected = {
        f"{path}.{block}.{place}.bottleneck.{tensor}"
        for block in range(BLOCKS)
        for place in places
        for tensor in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    assert set(trained(model)) == expected
    count = sum(p.numel() for p in trained(model).values())
    assert count == 2 * BLOCKS * (2 * HIDDEN * WIDTH + WIDTH + HIDDEN)


@each_structure
def test_only_bottlenecks_and_heads_move(model_type):
    """Catches: a base that is not frozen; a head that is; bottlenecks out of the graph; parameters used twice."""
    heads = HEADS.get(model_type, ("classifier",))
    _, model = attach(make(model_type), heads)
    before = {name: p.detach().clone() for name, p in stir(model).named_parameters()}
    functional.cross_entropy(model(**INPUTS).logits, torch.tensor([0, 1])).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {name for name in before if ".bottleneck." in name or name.startswith(heads)}
    assert moved == with_gradient == expected
    assert len({p.data_ptr() for p in trained(model).values()}) == len(expected)


def test_bottleneck_computes_the_formula():
    """Catches: a forgotten skip connection, activation or bias."""
    _, model = attach(make(), ())
    dropout = model.get_submodule("bert.encoder.layer.1.output.dropout")
    down, up = dropout.bottleneck.down, dropout.bottleneck.up
    with torch.no_grad():
        for parameter in (down.bias, up.weight, up.bias):
            parameter.normal_()
    hidden = torch.randn(2, 3, HIDDEN)
    expected = hidden + functional.gelu(hidden @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(dropout(hidden), expected)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_placed_after_dropout_and_before_residual_and_norm_in_bert(dropout):
    """Catches: a bottleneck before the dropout (all is dropped here), after the residual, or after the LayerNorm."""
    _, model = attach(make(hidden_dropout_prob=dropout), ())
    block, biases = biased(model.train(), "bert")
    for output, width, bias in ((block.attention.output, HIDDEN, biases[0]), (block.output, 48, biases[1])):
        hidden, residual = torch.randn(2, 3, width), torch.randn(2, 3, HIDDEN)
        expected = output.LayerNorm((1 - dropout) * output.dense(hidden) + bias + residual)
        torch.testing.assert_close(output(hidden, residual), expected)


def test_placed_before_the_residual_in_llama():
    """Catches: bottlenecks on another projection, or on a normalised input."""
    _, model = attach(make("llama", AutoModel), ())
    block, biases = biased(model, "llama")
    hidden = torch.randn(2, 3, HIDDEN)
    angles = model.rotary_emb(hidden, torch.arange(3)[None])
    with Houlsby(HoulsbySettings()).disabled(model):
        attended = hidden + block.self_attn(block.input_layernorm(hidden), angles, None)[0] + biases[0]
        expected = attended + block.mlp(block.post_attention_layernorm(attended)) + biases[1]
    torch.testing.assert_close(block(hidden, position_embeddings=angles), expected)


def test_placed_before_residual_and_norm_in_distilbert():
    """Catches: bottlenecks after a residual or a LayerNorm."""
    _, model = attach(make("distilbert", AutoModel), ())
    block, biases = biased(model, "distilbert")
    hidden = torch.randn(2, 3, HIDDEN)
    with Houlsby(HoulsbySettings()).disabled(model):
        attended = block.sa_layer_norm(block.attention(hidden)[0] + biases[0] + hidden)
        expected = block.output_layer_norm(block.ffn(attended) + biases[1] + attended)
    torch.testing.assert_close(block(hidden), expected)


@each_structure
@pytest.mark.parametrize("train_layer_norm", [False, True])
def test_disabled_restores_the_base(model_type, train_layer_norm):
    """Catches: trained layer norms left in the base's outputs; values lost afterwards; a nested block that enables."""
    base = outputs(make(model_type))
    method, model = attach(make(model_type), (), train_layer_norm=train_layer_norm)
    stir(model)
    with_adapter, before = outputs(model), trained(model)
    with method.disabled(model):
        with method.disabled(model):
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), base)
    assert not torch.equal(with_adapter, base)
    assert torch.equal(outputs(model), with_adapter)
    after = trained(model)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_disabled_keeps_heads_and_open_graphs():
    """Catches: heads switched off too; layer norms overwritten in place, which breaks a backward pass begun before."""
    method, model = attach(make(), train_layer_norm=True)
    stir(model)
    alone = make()
    alone.classifier.load_state_dict(model.classifier.state_dict())
    loss = model(**INPUTS).logits.sum()
    with method.disabled(model):
        assert torch.equal(outputs(model), outputs(alone))
    loss.backward()
    assert model.get_parameter("bert.encoder.layer.0.output.LayerNorm.weight").grad is not None


@pytest.mark.parametrize(("model_type", "norms"), [("bert", 4), ("llama", 2)])
def test_layer_norms_are_trained_only_on_request_and_only_in_blocks(model_type, norms):
    """Catches: norms of the embeddings or of the end among them; frozen copies that would be exchanged or stored."""
    _, plain = attach(make(model_type), ())
    _, model = attach(make(model_type), (), train_layer_norm=True)
    added = set(trained(model)) - set(trained(plain))
    assert len(added) == norms * BLOCKS
    assert all("norm" in name.lower() and ("layer." in name or "layers." in name) for name in added)
    assert not any("base_norm" in name for name in model.state_dict())


@pytest.mark.parametrize("heads", [("classifier",), ()])
@pytest.mark.parametrize("train_layer_norm", [False, True])
def test_save_and_load(tmp_path, heads, train_layer_norm):
    """Catches: a saved part that is not loaded; loading that needs more than the plain base; another base's norms."""
    auto = AutoModelForSequenceClassification if heads else AutoModel
    make(auto=auto).save_pretrained(tmp_path / "base")
    method, model = attach(auto.from_pretrained(tmp_path / "base"), heads, train_layer_norm=train_layer_norm)
    save_alone(method, stir(model), tmp_path / "out" / "adapter")
    loaded = load_alone(auto.from_pretrained(tmp_path / "base").train(), tmp_path / "out" / "adapter")
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model.eval()))
    with method.disabled(loaded), method.disabled(model):
        assert torch.equal(outputs(loaded), outputs(model))


@each_structure
def test_pfeiffer_has_only_the_bottleneck_after_the_feed_forward(model_type):
    """Catches: a placement that is validated and ignored; the attention's place kept; a switch that misses one."""
    base = outputs(make(model_type, AutoModel))
    method, model = attach(make(model_type, AutoModel), (), placement="pfeiffer")
    found = {name.split(".bottleneck.")[0] for name in trained(model)}
    place = PLACES.get(model_type, PLACES["bert"])[1]
    assert len(found) == BLOCKS
    assert all(name.endswith(place) and not name.endswith(f"attention.{place}") for name in found)
    assert sum(p.numel() for p in trained(model).values()) == BLOCKS * (2 * HIDDEN * WIDTH + WIDTH + HIDDEN)
    stir(model)
    assert not torch.allclose(outputs(model), base, atol=1e-3)
    with method.disabled(model):
        assert torch.equal(outputs(model), base)


def test_unknown_architecture():
    """Catches: a silent run without bottlenecks."""
    model = AutoModel.from_config(GPT2Config(vocab_size=99, n_embd=HIDDEN, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"distilbert, electra, llama.*lora") as caught:
        attach(model, ())
    assert caught.value.code == "adapter-unsupported"
    assert all(p.requires_grad for p in model.parameters())


def test_the_outputs_type_follows_the_projection():
    """Catches: float32 bottlenecks in a bfloat16 base, whose forward fails; bottlenecks trained in bfloat16."""
    _, model = attach(make(dtype=torch.bfloat16), ())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert outputs(model).dtype == torch.bfloat16


def test_same_seed_same_start_and_copies_are_apart():
    """Catches: initial values not from torch's generator; a deep copy that runs the original's bottlenecks."""
    (_, first), (_, second) = attach(make(), ()), attach(make(), ())
    assert all(torch.equal(p, trained(second)[name]) for name, p in trained(first).items())
    twin = copy.deepcopy(first)
    with torch.no_grad():
        next(p for name, p in trained(twin).items() if name.endswith("up.bias")).normal_()
    assert not torch.equal(outputs(twin), outputs(first))
    assert torch.equal(outputs(first), outputs(second))


@each_structure
@pytest.mark.parametrize("train_layer_norm", [False, True])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_per_sample_gradients(model_type, train_layer_norm):
    """Catches: trainable layers that Opacus refuses (own buffers) or differentiates wrongly (in-place or shared)."""
    opacus = pytest.importorskip("opacus", reason="Opacus, of the extra [privacy], is not installed")

    dropouts = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "seq_classif_dropout",
    )
    base = make(model_type, **dict.fromkeys(dropouts, 0.0)).train()
    _, model = attach(base, HEADS.get(model_type, ("classifier",)), train_layer_norm=train_layer_norm)
    stir(model)
    wrapped = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    functional.cross_entropy(wrapped(**INPUTS).logits, torch.tensor([0, 1])).backward()
    for row in range(2):
        model.zero_grad()
        logits = model(**{key: value[row : row + 1] for key, value in INPUTS.items()}).logits
        functional.cross_entropy(logits, torch.tensor([row])).backward()
        for name, parameter in trained(model).items():
            found = wrapped.get_parameter(f"_module.{name}").grad_sample[row]
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
