"""Losses of predicted tokens: equal to those from all logits, on every kind of output layer, without keeping logits."""

import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from tests.support.federation import tiny_config
from tests.support.tiny import tiny_llama
from tsugiki.common.config.parse import changed
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.decoding import token_losses as module
from tsugiki.common.tasks.decoding.token_losses import NOTHING, token_hits, token_losses

WORDS = 97
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = SIZES | {"num_key_value_heads": 2, "intermediate_size": 32}
GEMMA = DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0, "sliding_window": 16}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
MODELS = {
    "linear": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "bounded": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GEMMA, final_logit_softcapping=0.05)  # so low that it matters for random weights
    ),
    "scaled up": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**DECODER, logit_scale=5.0)),
    "scaled down": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**DECODER, logits_scaling=0.1, pad_token_id=0)
    ),
    "biased": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**DECODER)),
    "inside a decoder": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=32)
    ),
    "of experts": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, **EXPERTS)),
    "without attention": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "of words": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2)
    ),
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of three tokens."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * WORDS * 3)


def made(name):
    """Return a model with random weights; only one matrix of its first block, or its like, is trained."""
    torch.manual_seed(3)
    network = MODELS[name]().eval()
    network.requires_grad_(False)
    body = [value for key, value in network.named_parameters() if ".0." in key and value.ndim > 1]
    body[0].requires_grad_(True)
    return network


def batch(seed=0, rows=3, tokens=9):
    """Return rows of different lengths, in which some tokens are predicted."""
    torch.manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    predicted = (torch.rand(rows, tokens) < 0.6) & mask.roll(-1, 1).bool()
    predicted[:, -1] = False
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(predicted, ids.roll(-1, 1), NOTHING)}


def reference(network, one, temperature=1.0):
    """Return the losses from all logits, token by token."""
    logits = network(input_ids=one["input_ids"], attention_mask=one["attention_mask"], use_cache=False).logits
    places = (one["labels"] != NOTHING).nonzero().tolist()
    assert places
    found = [cross_entropy(logits[row, at] / temperature, one["labels"][row, at]) for row, at in places]
    return torch.stack(found)


def gradients(network, losses):
    """Return the gradients of a sum in which every token has another weight."""
    network.zero_grad()
    (losses * torch.linspace(-1, 2, len(losses))).sum().backward()
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert trained
    assert any(value.grad.abs().max() > 0 for value in trained.values())
    return {name: value.grad.clone() for name, value in trained.items()}


def check(network, temperature=1.0):
    """Compare losses and gradients with the reference."""
    one = batch()
    wanted = reference(network, one, temperature)
    found = token_losses(network, one, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    expected = gradients(network, reference(network, one, temperature))
    largest = max(float(value.abs().max()) for value in expected.values())
    torch.testing.assert_close(gradients(network, found), expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_losses_and_gradients_are_those_of_all_logits(name, temperature):
    """Catches: an output layer that is taken for one matrix; a gradient for equal weights; padding among the tokens."""
    network = made(name)
    check(network, temperature)
    assert module._body(network) is not None  # else this compares the whole model with itself


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", ["linear", "tied"])
def test_an_adapted_output_layer_is_trained(name):
    """Catches: a LoRA on the output layer that gets no gradient, because logits are made without autograd."""
    torch.manual_seed(1)
    targets = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    network = get_peft_model(MODELS[name](), targets).eval()
    check(network)
    one = batch()
    found = gradients(network, token_losses(network, one))
    assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in found} == {"q_proj", "lm_head"}


def test_an_output_layer_that_shares_trained_embeddings_is_trained():
    """Catches: a tied matrix that gets the gradient of the embedding alone, since it is a parameter of the body too."""
    network = made("tied")
    network.requires_grad_(False)
    network.model.embed_tokens.weight.requires_grad_(True)
    check(network)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_activations_that_are_computed_twice_change_nothing():
    """Catches: gradient checkpointing that meets a replaced `forward` in the backward pass."""
    network = made("linear")
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()  # checkpointing works in training only; these models drop nothing
    check(network)


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora", "houlsby"])
def test_adapters_stay_on(method, tmp_path):
    """Catches: virtual tokens that are lost with a replaced `forward`, or stay among the hidden states."""
    folder = tiny_llama(tmp_path / "llama")
    config = changed(
        tiny_config(tmp_path), {"model.name": str(folder), "task": {"name": "causal-lm"}, "adapter": {"method": method}}
    )
    graft = load_graft(config, str(folder), 1)
    graft.write(graft.initial + 0.1)
    network = graft.base.network
    one = batch(tokens=8)
    one = {name: value % 20 if name == "input_ids" else value for name, value in one.items()}
    one["labels"] = torch.where(one["labels"] == NOTHING, NOTHING, one["labels"] % 20)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(token_losses(network, one), reference(network, one), rtol=1e-5, atol=1e-6)
            with graft.adapter_disabled():
                torch.testing.assert_close(token_losses(network, one), reference(network, one), rtol=1e-5, atol=1e-6)


def test_logits_are_computed_for_predicted_tokens_only_and_never_kept():
    """Catches: logits of prompts and padding; a batch's logits that autograd keeps until the backward pass."""
    network = made("linear")
    tokens = []
    network.lm_head.register_forward_hook(lambda layer, args, out: tokens.append(out.shape[:-1].numel()))
    token_losses(network, batch())  # tries the model out
    live = weakref.WeakSet()

    class Kept:
        """A tensor that autograd keeps."""

        def __init__(self, value):
            self.value = value
            live.add(self)

    tokens.clear()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        losses = token_losses(network, batch())
    assert max(tokens) == 3  # one chunk
    assert sum(tokens) == len(losses) == int((batch()["labels"] != NOTHING).sum())
    assert live  # of the body
    assert not [kept for kept in live if kept.value.shape[-1:] == (WORDS,)]


def test_hits_are_the_likeliest_tokens():
    """Catches: the hits of another chunk; a gradient that evaluation pays for."""
    network = made("linear")
    one = batch()
    logits = network(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
    best = logits.argmax(dim=-1)
    one["labels"][0, :4] = best[0, :4]
    losses, hits = token_hits(network, one)
    predicted = one["labels"] != NOTHING
    assert hits.tolist() == (best == one["labels"])[predicted].tolist()
    assert hits[:4].all()
    assert not hits.all()
    torch.testing.assert_close(losses, reference(network, one).detach())
    assert not losses.requires_grad


def test_a_batch_without_predicted_tokens_has_no_losses():
    """Catches: an empty batch that fails, or whose loss has no gradient."""
    network = made("linear")
    one = batch()
    one["labels"][:] = NOTHING
    losses = token_losses(network, one)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert [tuple(value.shape) for value in token_hits(network, one)] == [(0,), (0,)]


def test_a_model_whose_logits_need_more_than_hidden_states_is_run_as_a_whole():
    """Catches: wrong losses of an architecture whose output layer reads more than the body's output."""

    class Copying(transformers.LlamaForCausalLM):
        """Adds to each token's logits its own embedding's first number."""

        def forward(self, input_ids=None, **inputs):
            output = super().forward(input_ids=input_ids, **inputs)
            shift = torch.linspace(0, 9, WORDS) * self.model.embed_tokens(input_ids)[..., :1]
            output.logits = output.logits + shift[:, -output.logits.shape[1] :]
            return output

    torch.manual_seed(0)
    network = Copying(transformers.LlamaConfig(**DECODER)).eval()
    check(network)
    assert module._body(network) is None


def test_nothing_is_left_replaced():
    """Catches: a model that answers every later batch with the last one's states."""
    network = made("linear")
    before = token_losses(network, batch(1)).tolist()
    assert "forward" not in vars(network.model)
    token_losses(network, batch(2))
    assert token_losses(network, batch(1)).tolist() == before
    with pytest.raises(IndexError):
        token_losses(network, {**batch(), "input_ids": torch.full((3, 9), WORDS)})
    assert "forward" not in vars(network.model)
