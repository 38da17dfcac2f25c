"""What every adapter method promises, on every task."""

import hashlib
import itertools
from functools import cache

import numpy as np
import pytest
import torch

from tests.support.exports import settings_of, to_fuse
from tests.support.tiny import tiny_base
from tsugiki.client.training.dp_sgd import backward, check_supported, row_gradients
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.client.training.update import make_update
from tsugiki.common.adapters import ADAPTERS, AdapterMethod
from tsugiki.common.adapters.base import Rates
from tsugiki.common.config.files import commented
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ModelError, TrainingError
from tsugiki.common.model import load as model
from tsugiki.common.model.exported import open_exported, write_exported
from tsugiki.common.model.load import load_graft
from tsugiki.common.registry import Registry
from tsugiki.common.tasks import TASKS
from tsugiki.common.wire.arrays import decode, encode
from tsugiki.common.wire.spec import unpack

SMALL = {
    "lora": {"rank": 2},
    "houlsby": {"bottleneck": 4},
    "vera": {"rank": 8},
    "prompt": {"num_virtual_tokens": 4},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix": {"num_virtual_tokens": 4},
}
"""Smaller than the default where a method has a size; a method that is not here is tried at its defaults."""

PREPARED = {"fusion": lambda folder, base: {"adapters": to_fuse(folder, base)}}
"""Settings of methods that need something beside a base: made from a folder to write to, and the base's."""

LONGER = {"bitfit": (120, 0.02), "layernorm": (120, 0.02), "prefix": (120, 0.05), "vera": (120, 0.02)}
"""Steps and learning rate with which a tiny loss falls, where 40 steps at 0.02 are too few for a method."""

LITTLE = {"prompt": 0.99, "p-tuning": 0.99, "prefix": 0.95}
"""To what share of itself the loss falls at least, where a random base reads little from other words than its own."""


def knows(method, task):
    """Return whether a method goes on the kind of model of a task's tiny case."""
    return not ADAPTERS.get(method).why_not(TASKS.get(task).test_case().model_type)


def test_every_method_has_default_rates():
    """Catches: a method without a rate for an optimizer or a kind of base, or with one that no run file may have."""
    for name in names_to_test(ADAPTERS):
        method = ADAPTERS.get(name)
        for optimizer in ("adamw", "sgd"):
            for kind in Rates._fields:
                rates = [method.default_rate(optimizer, kind, width) for width in (0, 16, 384, 8192)]
                assert all(0 < rate <= 10 for rate in rates), (name, optimizer, kind)


PAIRS = [pair for pair in itertools.product(TASKS.names(), ADAPTERS.names()) if knows(pair[1], pair[0])]
each_pair = pytest.mark.parametrize(("task", "method"), PAIRS)


def names_to_test(registry):
    """Return all names; a loop over none would pass."""
    assert registry.names(), f"no {registry.kind} is registered"
    return registry.names()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by the kind of model, each written once."""
    return cache(lambda model_type: tiny_base(tmp_path_factory.mktemp("base"), model_type))


@pytest.fixture
def folder(bases, task):
    """A base that the task can load. Read only."""
    return bases(TASKS.get(task).test_case().model_type)


@cache
def small(method, base):
    """Return the settings with which a method is tried on a base."""
    if method not in PREPARED:
        return SMALL.get(method, {})
    return PREPARED[method](base.with_name(f"{base.name}-{method}"), base)


@pytest.fixture(autouse=True)
def no_graft_is_left():
    """Every test starts without a loaded base."""
    model.grafts.clear()


def run(folder, task, method, form="", **adapter):
    """Return the run of a tiny case, or of one of its further forms, at a rate that moves; a batch is all rows."""
    kind = TASKS.get(task)
    settings = settings_of(kind.extra_cases()[form] if form else kind.test_case(), folder)
    train_settings = {
        "learning_rate": 0.01,
        "local_steps": 15,
        "per_device_train_batch_size": 24,
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "threads": 1,
        "device": "cpu",
    }
    return parse(
        {
            "task": {"name": task, **settings},
            "adapter": {"method": method, **(small(method, folder) if knows(method, task) else {}), **adapter},
            "train": train_settings,
        }
    )


class Site:
    """A graft and the tiny case's rows."""

    def __init__(self, folder, task, method, **adapter):
        self.config = run(folder, task, method, **adapter)
        self.graft = load_graft(self.config, str(folder), self.config.run.seed)
        self.task = self.graft.task
        self.encoded = self.task.encode(Shard(TASKS.get(task).test_case().rows), self.graft.base)

    def train(self, round_=1, proximal_mu=0.0, **changes):
        """Train one round from where the graft is; return the update and what the loop reports."""
        received = self.graft.read()
        local_round = LocalRound(1, "site-0", round_, schedule_start=0.0, schedule_stop=1.0, proximal_mu=proximal_mu)
        trained = train(self.graft, self.encoded, self.config.train.model_copy(update=changes), local_round)
        return make_update(self.graft.read(), received), trained

    def batch(self):
        """Return all rows."""
        return self.task.batch(self.encoded, range(len(self.encoded)), self.graft.base)

    def loss(self):
        """Return the loss over all rows; where answers are drawn for it, always by the same numbers."""
        torch.manual_seed(0)
        with torch.no_grad():
            return self.task.loss(self.graft.base.network, self.batch()).item()

    def hidden(self, base=None):
        """Return the last hidden states of the transformer, for images its logits; or of another base's."""
        base = base or self.graft.base
        if self.encoded.images is not None:
            with torch.no_grad():
                return base.transformer(pixel_values=self.batch()["pixel_values"][:3]).logits
        tokens = next(iter(self.encoded.texts.values())).lists()[:3]
        length = min(map(len, tokens))
        ids = torch.tensor([row[:length] for row in tokens])
        with torch.no_grad():
            result = base.transformer(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        return result.hidden_states[-1]

    def frozen(self):
        """Return a hash of each tensor that is neither trained nor exchanged, buffers included."""
        transformer = self.graft.base.transformer
        trained = {tensor.name for tensor in self.graft.spec.tensors}
        tensors = [*transformer.named_parameters(), *transformer.named_buffers()]
        return {
            name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
            for name, tensor in tensors
            if name not in trained
        }


def test_there_are_methods_and_a_registry_without_any_fails():
    """Catches: tests below that pass because they loop over nothing."""
    assert {method for _, method in PAIRS} == set(names_to_test(ADAPTERS))
    assert {task for task, _ in PAIRS} == set(TASKS.names())
    with pytest.raises(AssertionError, match="no adapter method is registered"):
        names_to_test(Registry("adapter method"))


@pytest.mark.parametrize(
    ("task", "method"), sorted(set(itertools.product(TASKS.names(), ADAPTERS.names())) - set(PAIRS))
)
def test_a_pair_that_does_not_go_is_refused_with_the_reason(task, method, folder):
    """Catches: a declared reason that nobody is told; a pair that is left out of these tests and run all the same."""
    reason = ADAPTERS.get(method).why_not(TASKS.get(task).test_case().model_type)
    assert 10 < len(reason) < 80
    with pytest.raises(ModelError, match=f"does not fit .*: {reason}") as caught:
        Site(folder, task, method)
    assert caught.value.code == "adapter-unsupported"


@pytest.mark.parametrize("method", ADAPTERS.names())
def test_the_class_is_whole(method):
    """Catches: a name that differs from the registered one; settings that do not choose the class."""
    kind = ADAPTERS.get(method)
    assert issubclass(kind, AdapterMethod)
    assert kind.name == method == kind.Settings().method
    assert kind.export_format in ("peft", "tsugiki")
    assert f'method = "{method}"' in commented(TASKS.names()[0], method, "fedavg")
    assert all(field.description for field in kind.Settings.model_fields.values())


@each_pair
def test_without_training_the_update_is_zero_and_the_outputs_are_the_bases(task, method, folder):
    """Catches: an adapter that disturbs the base before it has learned anything; rounding in write, read, subtract."""
    site = Site(folder, task, method)
    received = site.graft.read()
    before = site.hidden()
    site.graft.write(received)
    update = make_update(site.graft.read(), received)
    assert update.dtype == np.float32
    assert not update.any()
    with site.graft.adapter_disabled():
        assert torch.allclose(site.hidden(), before, atol=1e-6) == site.graft.method.starts_at_base


@each_pair
def test_training_changes_the_adapter_and_its_head_only(task, method, folder):
    """Catches: a base that drifts (BatchNorm statistics, a layer left trainable); an adapter tensor that is stuck."""
    site = Site(folder, task, method)
    frozen = site.frozen()
    assert len(frozen) >= 6  # of the smallest base
    update, trained = site.train()
    assert site.frozen() == frozen
    assert np.isfinite(update).all()
    assert trained.steps == 15
    stuck = [name for name, value in unpack(update, site.graft.spec).items() if not value.any()]
    assert stuck == []
    assert (site.graft.spec.parameters("head") > 0) == bool(site.graft.base.heads)
    trainable = {name for name, value in site.graft.base.network.named_parameters() if value.requires_grad}
    assert len(trainable) == len(site.graft.spec.tensors)


@each_pair
def test_the_loss_falls(task, method, folder):
    """Catches: a wrong sign, a graph that is cut, an optimiser of other parameters, a report of another loss."""
    site = Site(folder, task, method)
    before = site.loss()
    assert before > 0  # else a share of it says nothing
    steps, rate = LONGER.get(method, (40, 0.02))
    _, trained = site.train(local_steps=steps, learning_rate=rate)
    after = site.loss()
    assert after < LITTLE.get(method, 0.9) * before
    assert after < trained.loss < 1.1 * before


@each_pair
def test_off_gives_the_bases_outputs_and_on_the_trained_ones(task, method, folder):
    """Catches: a part of the adapter that cannot be switched off; a switch that stays."""
    site = Site(folder, task, method)
    bare = site.task.load(folder, torch.float32)
    bare.network.eval()
    plain = site.hidden(bare)
    site.train()
    on = site.hidden()
    assert not torch.allclose(on, plain, atol=1e-4)
    with site.graft.adapter_disabled():
        assert torch.allclose(site.hidden(), plain, atol=1e-6)
    assert torch.equal(site.hidden(), on)
    trained = {name for name, value in site.graft.base.transformer.named_parameters() if value.requires_grad}
    assert trained == {tensor.name for tensor in site.graft.spec.tensors}


@each_pair
def test_a_trained_adapter_survives_the_wire(task, method, folder):
    """Catches: a tensor in another place, or rounded, at the receiving side."""
    site = Site(folder, task, method)
    site.train()
    vector, on = site.graft.read(), site.hidden()
    received = decode(encode(vector, site.graft.spec), site.graft.spec)
    assert received.tobytes() == vector.tobytes()
    site.graft.write(np.zeros_like(vector))
    site.graft.write(received)
    assert site.graft.read().tobytes() == vector.tobytes()
    assert torch.equal(site.hidden(), on)


@each_pair
def test_an_export_is_put_on_its_base_again(task, method, folder, tmp_path):
    """Catches: a part that a library's loader leaves at chance or drops; constants drawn anew; a spec that differs."""
    site = Site(folder, task, method)
    site.train()
    vector, on = site.graft.read(), site.hidden()
    site.graft.method.save(site.graft.base.transformer, tmp_path, "tiny/base")
    write_exported(tmp_path, site.graft, "float32", "tiny/base")
    torch.manual_seed(99)
    loaded = open_exported(tmp_path, str(folder))
    assert loaded.read().tobytes() == vector.tobytes()
    assert torch.equal(site.hidden(loaded.base), on)


@each_pair
def test_half_the_bytes(task, method, folder):
    """Catches: float16 that both sides agree on and only one uses."""
    half, whole = (Site(folder, task, method, wire_dtype=kind).graft.spec for kind in ("float16", "float32"))
    assert 2 * half.size_bytes == whole.size_bytes
    assert half.sha256 != whole.sha256
    vector = np.ones(whole.size, np.float32)
    sent = {spec.wire_dtype: len(encode(vector, spec)["adapter"].data) for spec in (half, whole)}
    assert sent["float32"] - sent["float16"] == half.size_bytes  # the headers are equally long


@each_pair
def test_one_seed_one_result(task, method, folder):
    """Catches: dropout, batches or initial values from a generator that nobody seeded."""
    updates = []
    for noise in (1, 2):
        model.grafts.clear()
        torch.manual_seed(noise)
        np.random.seed(noise)
        site = Site(folder, task, method)
        updates.append(site.train()[0])
        assert site.graft.spec.size == updates[0].size
    assert updates[0].tobytes() == updates[1].tobytes()
    site.graft.write(site.graft.initial)
    assert site.train(round_=2)[0].tobytes() != updates[0].tobytes()


@each_pair
def test_evaluation_measures_what_the_run_watches(task, method, folder):
    """Catches: a monitor that no metric has; a NaN; an evaluation that changes the model or depends on the batches."""
    site = Site(folder, task, method)
    site.train()
    vector = site.graft.read()
    with torch.no_grad():
        metrics = [site.task.evaluate(site.graft.base, site.encoded, size) for size in (5, 64)]
    assert site.task.monitor in metrics[0]
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics[0].values())
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)
    assert site.graft.read().tobytes() == vector.tobytes()


@each_pair
def test_the_proximal_term_holds_the_update_back(task, method, folder):
    """Catches: mu that is configured, sent and ignored; a sign that pushes away; the head forgotten."""
    site = Site(folder, task, method)
    sgd = {"optimizer": "sgd", "learning_rate": 0.1}  # AdamW would scale the term away again
    norms, updates = [], []
    for mu in (0.0, 1.0, 10.0):
        site.graft.write(site.graft.initial)
        updates.append(site.train(proximal_mu=mu, **sgd)[0])
        norms.append(float(np.linalg.norm(updates[-1])))
    assert norms[0] > norms[1] > norms[2] > 0
    site.graft.write(site.graft.initial)
    assert site.train(**sgd)[0].tobytes() == updates[0].tobytes()


@pytest.mark.parametrize(
    ("task", "method", "form"),
    [
        (*pair, form)
        for pair in PAIRS
        for form in ("", "pooler", "mean", "first")
        if TASKS.get(pair[0]).row_losses and form in ("", *TASKS.get(pair[0]).extra_cases())
    ],
)
def test_the_gradient_of_each_row_is_right_or_refused(task, method, form, folder):
    """Catches: a method whose numbers Opacus overlooks or counts twice: a row's gradient that escapes the clipping."""
    pytest.importorskip("opacus", reason="Opacus, of the extra [privacy], is not installed")
    site = Site(folder, task, method, form=form)
    site.train(local_steps=3)
    if not site.graft.method.row_gradients:
        with pytest.raises(TrainingError, match="adapter") as caught:
            check_supported(site.graft)
        assert caught.value.code == "examples-unsupported"
        return
    check_supported(site.graft)
    for module in site.graft.base.network.modules():
        module.p = 0.0  # no dropout: the rows are looked at twice
    with row_gradients(site.graft):
        backward(site.graft, site.encoded, [0, 1, 2])
        together = [value.grad_sample.clone() for value in site.graft.parameters]
    for row in range(3):
        for value in site.graft.parameters:
            value.grad = None
        site.task.loss(site.graft.base.network, site.task.batch(site.encoded, [row], site.graft.base)).backward()
        for value, samples in zip(site.graft.parameters, together, strict=True):
            torch.testing.assert_close(samples[row], value.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("task", "method"), [pair for pair in PAIRS if pair[0] == "sequence-classification"])
def test_a_head_inside_the_base_is_trained_and_comes_back(task, method, folder, tmp_path):
    """Catches: a pooler that a method freezes, counts as its own, or exports as the checkpoint has it."""
    site = Site(folder, task, method, form="pooler")
    tensors = {tensor.name: tensor.part for tensor in site.graft.spec.tensors if ".pooler." in tensor.name}
    assert list(tensors.values()) == ["head", "head"]
    before = site.frozen()
    update, _ = site.train()
    assert site.frozen() == before
    assert all(unpack(update, site.graft.spec)[name].any() for name in tensors)
    vector, on = site.graft.read(), site.loss()
    site.graft.method.save(site.graft.base.transformer, tmp_path, "tiny/base")
    write_exported(tmp_path, site.graft, "float32", "tiny/base")
    identity = site.graft.spec.base_fingerprint
    with site.graft.adapter_disabled():
        off = site.loss()
    assert off != on
    site.graft = open_exported(tmp_path, str(folder))
    assert site.graft.read().tobytes() == vector.tobytes()
    assert site.loss() == on
    with site.graft.adapter_disabled():
        assert site.loss() == off
    assert site.graft.spec.base_fingerprint == identity == Site(folder, task, method).graft.spec.base_fingerprint


@pytest.mark.parametrize("form", ["mean", "first"])
@pytest.mark.parametrize("method", [method for task, method in PAIRS if task == "sequence-classification"])
def test_a_head_above_pooled_states_is_trained_and_comes_back(method, form, bases, tmp_path):
    """Catches: a head that is called in two places and trained in one; one that is switched off with the adapter."""
    task = "sequence-classification"
    folder = bases("bert")
    site = Site(folder, task, method, form=form)
    heads = {tensor.name for tensor in site.graft.spec.tensors if tensor.part == "head"}
    assert {name.split(".")[-1] for name in heads} == {"weight", "bias"}
    before, frozen = site.loss(), site.frozen()
    with site.graft.adapter_disabled():
        assert (site.loss() == pytest.approx(before, abs=1e-6)) == site.graft.method.starts_at_base
    update, _ = site.train(local_steps=40, learning_rate=0.02)
    assert site.frozen() == frozen
    assert all(value.any() for value in unpack(update, site.graft.spec).values())
    vector, on = site.graft.read(), site.loss()
    assert on < before
    with site.graft.adapter_disabled():
        off = site.loss()
    assert off not in (on, before)
    site.graft.method.save(site.graft.base.transformer, tmp_path, "tiny/base")
    write_exported(tmp_path, site.graft, "float32", "tiny/base")
    identity = site.graft.spec.base_fingerprint
    site.graft = open_exported(tmp_path, str(folder))
    assert site.graft.read().tobytes() == vector.tobytes()
    assert site.loss() == on
    with site.graft.adapter_disabled():
        assert site.loss() == off
    # The same base, however its states are read: exports of both kinds can share it.
    assert site.graft.spec.base_fingerprint == identity == Site(folder, task, method).graft.spec.base_fingerprint
