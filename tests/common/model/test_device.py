"""Devices, activations that are computed twice, and bases in 4 bits.

None of this has been run on a GPU: what needs one is skipped, and says so. The 4-bit tests run on a CPU where
bitsandbytes is installed.
"""

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.support.exports import to_fuse
from tests.support.tiny import tiny_base, tiny_cnn, tiny_llama, tiny_sentence_transformer
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ConfigError, ModelError
from tsugiki.common.model import device
from tsugiki.common.model import load as model
from tsugiki.common.model.device import BITS_PER_WEIGHT, choose_device, loading, weight_bytes
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS

SMALL = {"lora": {"rank": 2}, "vera": {"rank": 8}, "houlsby": {"bottleneck": 4}}
VIRTUAL = ("prompt", "p-tuning", "prefix")
PAIRS = [
    (task, method)
    for task in ("causal-lm", "sequence-classification", "sentence-embedding")
    for method in ADAPTERS.names()
    if method != "prefix" and not ADAPTERS.get(method).why_not(TASKS.get(task).test_case().model_type)
]

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, of the extra [quantized], is not installed"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny bases by kind of model. Read only."""
    return {kind: tiny_base(tmp_path_factory.mktemp(kind), kind) for kind in ("bert", "llama")}


@pytest.fixture(autouse=True)
def no_graft_is_left():
    """Every test starts without a loaded base."""
    model.grafts.clear()


def config_of(task, method="lora", adapters=(), **settings):
    """Return a run of a task's tiny case; `adapters` are the exports that are fused."""
    virtual = {"num_virtual_tokens": 4} if method in VIRTUAL else {}
    fused = {"adapters": list(adapters)} if adapters else {}
    return parse(
        {
            "task": {"name": task, **TASKS.get(task).test_case().settings},
            "adapter": {"method": method, **SMALL.get(method, {}), **virtual, **fused},
            "train": {"threads": 1, "local_steps": 8, "learning_rate": 0.02, "lr_schedule": "constant"},
            "model": settings,
        }
    )


def graft_of(bases, task, method="lora", **settings):
    """Return a new graft and its rows."""
    case = TASKS.get(task).test_case()
    base = bases[case.model_type]
    adapters = to_fuse(base.parent / f"{base.name}-fused", base) if method == "fusion" else ()
    model.grafts.clear()
    graft = load_graft(config_of(task, method, adapters, **settings), str(base), 1)
    return graft, graft.task.encode(Shard(case.rows), graft.base)


def refused(wanted):
    """Return the code with which a device is refused."""
    with pytest.raises(ModelError) as caught:
        choose_device(wanted)
    return caught.value.code


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_device(cuda, mps, chosen, monkeypatch):
    """Catches: a run that is asked for a GPU and trains on the CPU without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto") == chosen
    assert choose_device("cpu") == "cpu"
    assert [choose_device("cuda") if cuda else refused("cuda")] == ["cuda" if cuda else "device"]


# Activations


def step(graft, encoded):
    """Return the loss of a batch, and all gradients, with dropout on and always alike."""
    torch.manual_seed(3)
    graft.base.network.train()
    batch = graft.task.batch(encoded, range(6), graft.base)
    loss = graft.task.loss(graft.base.network, batch)
    loss.backward()
    graft.base.network.eval()
    return loss.item(), [value.grad.clone() for value in graft.parameters]


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_activations_computed_twice_give_the_same_gradients(bases, task, method):
    """Catches: gradients cut off at a frozen block, other dropout the second time, a setting that does nothing."""
    kept, encoded = graft_of(bases, task, method)
    twice, _ = graft_of(bases, task, method, gradient_checkpointing=True)
    calls = {}
    for graft in (kept, twice):
        step(graft, encoded)  # before any is counted: a class of language models is looked at once, in further passes
        graft.base.network.zero_grad()
    for name, graft in (("kept", kept), ("twice", twice)):
        block = next(one for one in graft.base.transformer.modules() if isinstance(one, GradientCheckpointingLayer))
        inner = next(one for one in block.modules() if isinstance(one, torch.nn.Linear))
        calls[name] = []
        inner.register_forward_hook(lambda *_, seen=calls[name]: seen.append(1))
    (loss, gradients), (again, others) = step(kept, encoded), step(twice, encoded)
    assert len(calls["twice"]) == 2 * len(calls["kept"]) > 0
    assert again == pytest.approx(loss, abs=1e-6)
    assert any(gradient.any() for gradient in gradients)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_the_base_and_the_spec_stay_the_same(bases):
    """Catches: a site that saves memory and is taken for one with another base, or trains otherwise."""
    results = []
    for saving in (False, True):
        graft, encoded = graft_of(bases, "causal-lm", gradient_checkpointing=saving)
        settings = config_of("causal-lm").train
        train(graft, encoded, settings, LocalRound(1, "site-0", 1, 0.0, 1.0))
        results.append((graft.spec.sha256, graft.read()))
    assert results[0][0] == results[1][0]
    assert np.allclose(results[0][1], results[1][1], atol=1e-5)


def test_a_model_that_cannot_is_refused(tmp_path):
    """Catches: a ValueError of transformers, or a setting that is passed over."""
    config = config_of("image-classification", gradient_checkpointing=True)
    with pytest.raises(ModelError, match="SmallCnn does not support") as caught:
        load_graft(config, str(tiny_cnn(tmp_path)), 1)
    assert caught.value.code == "gradient-checkpointing"


def test_prefixes_are_refused():
    """Catches: prefixes that blocks drop while they are computed twice, so that nothing is learned."""
    with pytest.raises(ConfigError, match="keys and values from outside"):
        config_of("causal-lm", "prefix", gradient_checkpointing=True)


# 4 bits


def test_what_is_missing_is_told(monkeypatch):
    """Catches: an ImportError, or a run that goes on without the 4 bits it asked for."""
    config = config_of("causal-lm", quantization="nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="on the device 'cpu'") as caught:
        loading(config)
    assert caught.value.code == "quantization"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="without bitsandbytes") as caught:
        loading(config)
    assert "tsugiki[quantized]" in str(caught.value)
    assert loading(config_of("causal-lm")) == {}


@pytest.mark.parametrize(
    "name", ["bert.pooler.dense", "pooler.dense", "classifier", "classifier.dense", "lm_head", "dense"]
)
def test_what_may_be_trained_whole_is_never_in_four_bits(name, monkeypatch):
    """Catches: a pooler inside the base held in 4 bits, which takes no gradient; blocks that stay whole."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(BitsAndBytesConfig, "post_init", lambda self: None)  # it looks for bitsandbytes' version
    skipped = loading(config_of("causal-lm", quantization="nf4"))["quantization_config"].llm_int8_skip_modules
    assert not should_convert_module(name, skipped)
    assert should_convert_module("bert.encoder.layer.0.attention.self.query", skipped)
    assert should_convert_module("bert.encoder.layer.0.attention.output.dense", skipped)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """4 bits on this machine's CPU, on which a run may not have them, without bitsandbytes' layout for inference."""
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes is not installed")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)
    monkeypatch.setattr(device, "_QUANTISED_ON", ("cpu", "cuda"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Tiny bases whose rows hold whole blocks of 64 weights. Read only."""
    llama, bert = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("bert")
    folders = {"llama": tiny_llama(llama, hidden=128), "bert": tiny_sentence_transformer(bert, hidden=128)}
    for folder in folders.values():  # a tensor that nothing loads: counted as the base's where others are not found
        file = folder / "model.safetensors"
        save_file({**load_file(file), "model.cls.bias": torch.ones(2)}, file, {"format": "pt"})
    return folders


@installed
@pytest.mark.filterwarnings("ignore")  # bitsandbytes, of faster kernels
@pytest.mark.parametrize("task", ["causal-lm", "preference", "sequence-classification", "sentence-embedding"])
def test_four_bits_keep_the_fingerprint_and_learn(wide, on_the_cpu, task):
    """Catches: a hash over what is in memory; heads in 4 bits; a rank held against packed shapes; nothing learned."""
    whole, _ = graft_of(wide, task)
    small, encoded = graft_of(wide, task, quantization="nf4")
    kinds = {type(one).__name__ for one in small.base.transformer.modules()}
    assert "Linear4bit" in kinds
    assert small.spec.sha256 == whole.spec.sha256
    assert all(value.dtype == torch.float32 for value in small.parameters)
    rows = small.task.batch(encoded, range(len(encoded)), small.base)
    with torch.no_grad():
        before = small.task.loss(small.base.network, rows).item()
    train(small, encoded, config_of(task).train, LocalRound(1, "site-0", 1, 0.0, 1.0))
    with torch.no_grad():
        assert small.task.loss(small.base.network, rows).item() < before


@installed
@pytest.mark.filterwarnings("ignore")
def test_the_size_in_four_bits_is_estimated(wide, on_the_cpu):
    """Catches: an estimate of another layer's weights, of heads, or without the blocks' constants."""
    folder = wide["bert"]
    task = TASKS.get("sequence-classification")(TASKS.get("sequence-classification").Settings())
    plain = task.load(folder, torch.float32)
    estimated = weight_bytes(plain, "nf4")
    quantised = task.load(folder, torch.float32, **loading(config_of("sequence-classification", quantization="nf4")))
    state = quantised.transformer.state_dict()
    packed = sum(value.numel() * value.element_size() for name, value in state.items() if name.endswith(".weight"))
    constants = sum(value.numel() * value.element_size() for name, value in state.items() if name.endswith("absmax"))
    biases = sum(value.numel() * 4 for name, value in state.items() if name.endswith("bias"))
    assert estimated == pytest.approx(packed + constants + biases, rel=0.03)
    assert weight_bytes(plain, "none") > 1.3 * estimated


def test_bits_per_weight_are_the_papers():
    """Catches: constants counted for each weight, or left out. Dettmers et al.: 0.127 bits for each weight."""
    assert pytest.approx(0.127, abs=1e-3) == BITS_PER_WEIGHT - 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here: 4 bits and bf16 were not run on a GPU")
@pytest.mark.parametrize("settings", [{"quantization": "nf4"}, {"gradient_checkpointing": True}])
def test_on_a_gpu(bases, settings):
    """Catches: tensors left on the CPU; autocast with which nothing is learned."""
    if "quantization" in settings and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes, of the extra [quantized], is not installed")
    graft, encoded = graft_of(bases, "causal-lm", **settings)
    assert {value.device.type for value in graft.base.network.parameters()} == {"cuda"}
    chosen = config_of("causal-lm").train.model_copy(update={"precision": "bf16"})
    before = graft.read()
    assert train(graft, encoded, chosen, LocalRound(1, "site-0", 1, 0.0, 1.0)).steps == 8
    assert np.isfinite(graft.read()).all()
    assert (graft.read() != before).any()
