"""DP-SGD: the gradients of rows, the draw of rows, clipping, noise, the account; on tiny models."""

import itertools
import logging
import math
import sys
import types
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from tests.support.tiny import tiny_base, tiny_bert
from tsugiki.client.training import dp_sgd, trainer
from tsugiki.client.training.dp_sgd import (
    backward,
    calibrated,
    check_supported,
    make_secret,
    release_of_round,
    row_gradients,
    sampling_probability,
    train_protecting_rows,
)
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import TrainSection
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import TrainingError, UsageError
from tsugiki.common.model import load as model
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.settings import ExamplePrivacySection
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Base, Encoded
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec

ROWS, WIDTH = 12, 3
INPUTS = torch.from_numpy(np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32))
TARGETS = INPUTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
NO_NOISE = 1e-12


class Regression:
    """A task whose loss is the mean squared error of a linear layer; it remembers its batches."""

    name, row_losses = "regression", True
    pads_rows, compares_rows = False, False

    def __init__(self, inputs=INPUTS, targets=TARGETS):
        self.inputs, self.targets, self.seen = inputs, targets, []

    def batch(self, encoded, rows, base):
        """Return the inputs and targets of the rows."""
        self.seen.append(list(rows))
        return {"inputs": self.inputs[rows], "targets": self.targets[rows]}

    def loss(self, network, batch):
        """Return the mean squared error."""
        return ((network(batch["inputs"])[:, 0] - batch["targets"]) ** 2).mean()


class Flat(Regression):
    """A task that no parameter changes: what moves is noise."""

    def batch(self, encoded, rows, base):
        """Return inputs of zero."""
        self.seen.append(list(rows))
        return {"inputs": torch.zeros(len(rows), base.network.in_features)}

    def loss(self, network, batch):
        """Return zero."""
        return (network(batch["inputs"]) * 0).mean()


def graft(task=None, network=None):
    """Return a network, at zero, in the place of a model; else a linear layer of `WIDTH` inputs."""
    network = network or nn.Linear(WIDTH, 1)
    for value in network.parameters():
        nn.init.zeros_(value)
    named = sorted((name, value) for name, value in network.named_parameters() if value.requires_grad)
    tensors = tuple(TensorSpec(name, tuple(value.shape), "adapter") for name, value in named)
    spec = AdapterSpec("t", "m", "{}", "0" * 64, "float32", tensors)
    method = SimpleNamespace(row_gradients=True)
    return Graft(task or Regression(), method, Base(network.eval(), network, None), spec, torch.device("cpu"))


def rows(count):
    """Return so many rows."""
    return Encoded({"text": TokenRows.of([[0]] * count)})


def settings(**values):
    """Return the settings of plain SGD at rate 1 without warm-up, unless told otherwise; a batch is all 12 rows."""
    plain = {"optimizer": "sgd", "learning_rate": 1.0, "lr_schedule": "constant", "warmup_ratio": 0.0, "threads": 1}
    small = {"per_device_train_batch_size": ROWS, "local_steps": 1, "max_grad_norm": 0.0}
    return TrainSection(**{**plain, **small, **values})


def examples(noise=NO_NOISE, norm=1e4, **values):
    """Return settings with hardly any noise and no clipping, unless told otherwise."""
    return ExamplePrivacySection(noise_multiplier=noise, max_grad_norm=norm, **values)


def local_round(**values):
    """Return the only round of a run."""
    return LocalRound(42, "site-0", 1, 0.0, 1.0, **values)


def moved(chosen=None, private=None, model=None, count=ROWS, **options):
    """Return where training from zero leads."""
    model = model or graft()
    train_protecting_rows(model, rows(count), chosen or settings(), local_round(), private or examples(), **options)
    return model.read().astype(np.float64)


# The gradients of rows


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A tiny BERT. Read only."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def bert(bert_folder):
    """Return a function that makes a BERT classifier, its adapter off its initial values, and rows of all lengths."""
    model.grafts.clear()

    def make(dropout=False, **adapter):
        small = {"task": {"name": "sequence-classification", "max_length": 16}, "adapter": adapter}
        config = parse({**small, "train": {"device": "cpu"}})
        made = load_graft(config, str(bert_folder), 1)
        made.write(made.read() + np.random.default_rng(1).normal(0, 0.1, made.spec.size).astype(np.float32))
        for module in made.base.network.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        texts = [
            "good",
            "the bad clause number 12",
            "no party shall",
            "a clause",
            "alpha beta gamma delta omega sigma kappa",
        ]
        return made, made.task.encode(Shard({"text": texts, "label": [1, 0, 1, 1, 0]}), made.base)

    return make


LORA = {"method": "lora", "rank": 2}
METHODS = [LORA, {**LORA, "freeze_a": "yes"}, {"method": "houlsby", "bottleneck": 4, "train_layer_norm": True}]


@pytest.mark.parametrize("adapter", METHODS, ids=["lora", "lora-without-a", "houlsby"])
def test_the_gradient_of_each_row_is_that_of_the_row_alone(bert, adapter):
    """Catches: a layer that Opacus differentiates wrongly, a factor of the batch, a row that padding changes."""
    made, encoded = bert(**adapter)
    assert len({len(tokens) for tokens in encoded.texts["input_ids"]}) == 5
    with row_gradients(made):
        backward(made, encoded, range(5))
        of_rows = torch.cat([value.grad_sample.flatten(1) for value in made.parameters], dim=1)
    made.base.network.train()
    for row in range(5):
        loss = made.task.loss(made.base.network, made.task.batch(encoded, [row], made.base))
        alone = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, made.parameters)])
        assert alone.norm() > 0.1
        assert torch.allclose(of_rows[row], alone, atol=1e-5, rtol=1e-5)


def test_dora_is_refused(bert):
    """Catches: a TypeError of Opacus in the middle of a round, which it has for layers with named arguments."""
    made, _ = bert(**LORA, use_dora=True)
    with pytest.raises(TrainingError, match="'lora' adapter") as caught:
        dp_sgd.check_supported(made)
    assert caught.value.code == "examples-unsupported"


@pytest.mark.parametrize("adapter", METHODS, ids=["lora", "lora-without-a", "houlsby"])
def test_without_noise_and_clipping_it_is_the_ordinary_loop(bert, adapter):
    """Catches: sums instead of means, gradients of an earlier step in a later one, a parameter that is left out."""
    chosen = settings(learning_rate=0.05, local_steps=4)
    made, encoded = bert(**adapter)
    start = made.read()
    ordinary = train(made, encoded, chosen, local_round())
    end = made.read()
    made.write(start)
    private = train_protecting_rows(made, encoded, chosen, local_round(), examples())
    assert np.abs(end - start).max() > 0.01
    assert np.allclose(made.read(), end, atol=1e-5)
    assert private.loss == pytest.approx(ordinary.loss, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimiser_and_schedule_are_those_of_the_ordinary_loop(optimizer):
    """Catches: another optimiser, weight decay or learning rate; moments that start anew in each step."""
    decay = {"weight_decay": 0.1} if optimizer == "adamw" else {"momentum": 0.5}
    chosen = settings(optimizer=optimizer, learning_rate=0.1, local_steps=6, lr_schedule="linear", warmup_ratio=0.3)
    ordinary, chosen = graft(), chosen.model_copy(update=decay)
    train(ordinary, rows(ROWS), chosen, local_round())
    assert np.allclose(moved(chosen), ordinary.read(), atol=1e-5)


def test_sums_are_divided_by_the_expected_number_of_rows():
    """Catches: a mean over the rows that were drawn, which tells how many they were."""
    rate, model, received = 0.1, graft(), torch.zeros(WIDTH + 1)
    chosen = settings(per_device_train_batch_size=4, local_steps=20, learning_rate=rate)
    train_protecting_rows(model, rows(ROWS), chosen, local_round(), examples())
    for batch in model.task.seen:
        inputs = torch.cat([torch.ones(len(batch), 1), INPUTS[batch]], dim=1)
        received -= rate * 2 * inputs.T @ (inputs @ received - TARGETS[batch]) / 4
    assert len({len(batch) for batch in model.task.seen}) > 2
    assert np.allclose(model.read(), received, atol=1e-5)


# Clipping


def with_row(inputs, target):
    """Return the task whose row 5 is another."""
    changed, targets = INPUTS.clone(), TARGETS.clone()
    changed[5], targets[5] = torch.tensor(inputs), target
    return Regression(changed, targets)


NOTHING = with_row([0.0, 0.0, 0.0], 0.0)
"""Row 5 has no gradient, as if it were not there."""

HOSTILE = [([1e4, -1e4, 1e4], 1e6), ([1e-3, 0.0, 0.0], -1e-3), ([3e37, 0.0, 0.0], 10.0), ([math.inf, 0.0, 0.0], 1.0)]
HOSTILE += [([0.0, 0.0, 0.0], math.nan), ([0.0, 0.0, 0.0], 3e38)]


@pytest.mark.parametrize("norm", [0.01, 1.0])
@pytest.mark.parametrize(("inputs", "target"), HOSTILE)
def test_no_row_moves_the_sum_by_more_than_the_norm(inputs, target, norm):
    """Catches: clipping of the mean or of each tensor by itself, no clipping, a row that turns the sum to NaN."""

    def summed(task):
        model = graft(task)
        with suppress(TrainingError):  # "diverged", where the loss is not finite
            moved(private=examples(norm=norm), model=model)
        return model.read().astype(np.float64) * ROWS

    without, with_it = summed(NOTHING), summed(with_row(inputs, target))
    assert np.linalg.norm(with_it - without) <= norm * (1 + 1e-4)
    assert np.linalg.norm(with_it - summed(Regression())) <= 2 * norm * (1 + 1e-4)


def test_a_clipped_row_keeps_its_direction_and_a_short_one_its_length():
    """Catches: a bound that is kept because rows are dropped, or all brought to one length."""
    alone = with_row([3.0, 4.0, 0.0], 1e3)
    alone.targets[:5] = alone.targets[6:] = 0.0
    clipped = moved(private=examples(norm=2.0), model=graft(alone)) * ROWS
    assert np.allclose(clipped, 2 * np.array([1, 3, 4, 0]) / math.sqrt(26), atol=1e-4)
    free, bounded = (moved(private=examples(norm=norm)) for norm in (1e4, 50.0))
    assert np.allclose(free, bounded, atol=1e-5)


# Noise


def check_noise(steps, count, batch, noise, norm):
    """Check the variance of what steps without any gradient add up to, over 40,200 numbers."""
    model = graft(Flat(), nn.Linear(200, 200))
    chosen = settings(local_steps=steps, per_device_train_batch_size=batch)
    trained = train_protecting_rows(model, rows(count), chosen, local_round(), examples(noise, norm))
    assert trained.steps == steps
    update = model.read().astype(np.float64)
    ratio = np.mean(update**2) / (steps * (noise * norm / batch) ** 2)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / update.size), ratio
    assert abs(np.mean(update)) < 5 * np.std(update) / math.sqrt(update.size)
    return len(model.task.seen)


@pytest.mark.parametrize(("noise", "norm"), [(1.0, 1.0), (3.0, 0.1), (0.5, 20.0)])
def test_the_noise_has_the_stated_variance(noise, norm):
    """Catches: noise that is not scaled by the norm, or by the noise multiplier, or not divided with the sum."""
    check_noise(2, 16, 4, noise, norm)


def test_steps_without_rows_are_noisy_too():
    """Catches: empty batches that are skipped, with their noise and their place in the account."""
    not_empty = check_noise(60, 5000, 1, 1.0, 1.0)
    assert 15 < not_empty < 58  # about 38


def broken_scale(monkeypatch):
    """Let the noise be of the noise multiplier alone."""
    monkeypatch.setattr(dp_sgd, "gaussian", lambda draw, deviation, shape: draw.normal(0.0, 1.0, shape))


def broken_steps(monkeypatch):
    """Let steps without rows be skipped."""
    step = DPOptimizer.step
    monkeypatch.setattr(DPOptimizer, "step", lambda self: step(self) if len(self.grad_samples[0]) else None)


def broken_division(monkeypatch):
    """Let the sum be divided by the number of drawn rows."""

    def scale(self):
        for value in self.params:
            value.grad /= max(len(value.grad_sample), 1)

    monkeypatch.setattr(DPOptimizer, "scale_grad", scale)


@pytest.mark.parametrize("broken", [broken_scale, broken_steps, broken_division])
def test_the_check_of_the_noise_fails_where_it_should(broken, monkeypatch):
    """Catches: a check of the variance that anything passes."""
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_noise(60, 5000, 1, 2.0, 0.25)


def test_the_noise_is_normal():
    """Catches: noise of the right variance and another shape."""
    from scipy.stats import kstest

    drawn = moved(private=examples(2.0, 0.5), model=graft(Flat(), nn.Linear(200, 200))) * ROWS
    assert kstest(drawn, "norm").pvalue > 1e-6


# Who draws


def test_the_noise_is_never_the_same_and_with_an_insecure_seed_it_is():
    """Catches: noise from the run's seed, which the server knows."""
    drawn = [moved(private=examples(1.0, 1.0), insecure_seed=seed) for seed in (0, 0, 7, 7, 8)]
    assert not np.allclose(drawn[0], drawn[1], atol=1e-3)
    assert np.array_equal(drawn[2], drawn[3])
    assert not np.allclose(drawn[2], drawn[4], atol=1e-3)


def draws(insecure_seed):
    """Return the batches of a run, and what dropout, by torch or by NumPy, would draw in each."""
    model, fine, drawn = graft(), Regression().loss, []

    def loss(network, batch):
        drawn.append((torch.rand(1, dtype=torch.float64).item(), np.random.rand()))
        return fine(network, batch)

    model.task.loss = loss
    chosen = settings(per_device_train_batch_size=6, local_steps=20, learning_rate=0.01)
    train_protecting_rows(model, rows(ROWS), chosen, local_round(), examples(), insecure_seed=insecure_seed)
    return model.task.seen, *zip(*drawn, strict=True)


def test_rows_and_dropout_are_drawn_in_secret(monkeypatch):
    """Catches: batches or dropout from the run's seed, or from one of which torch keeps 32 bits."""
    secret, other, seeded, same = draws(0), draws(0), draws(7), draws(7)
    assert seeded == same
    for one, two in itertools.combinations((secret, other, seeded), 2):
        assert one[0] != two[0]
        assert not set(one[1]) & set(two[1])
        assert not set(one[2]) & set(two[2])
    monkeypatch.setattr(dp_sgd.secrets, "randbits", lambda bits: 5)
    one, two = draws(0), draws(0)
    assert one[0] != two[0]
    assert not set(one[1]) & set(two[1])


def test_the_state_of_a_generator_is_more_than_a_seed(monkeypatch):
    """Catches: a seed of 64 bits, of which torch keeps 32; words in a place where torch does not look."""
    assert torch.equal(*(torch.rand(9, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32)))
    monkeypatch.setattr(dp_sgd.secrets, "randbits", lambda bits: 5)
    made = [torch.Generator() for _ in range(2)]
    for one in made:
        make_secret(one)
    first, second = (torch.rand(100_000, generator=one).double() for one in made)
    assert not torch.equal(first, second)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(100_000)
    for drawn in (first, second):
        assert abs(drawn.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
        assert abs(drawn.var() * 12 - 1) < 5 * math.sqrt(0.8 / 100_000)
    words = np.arange(1, 625, dtype=np.uint32) * 2654435761
    monkeypatch.setattr(dp_sgd.secrets, "token_bytes", lambda size: words.tobytes()[:size])
    make_secret(made[0])
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    assert np.array_equal(torch.rand(700, generator=made[0]) * 2**24, twister.random_raw(700) % 2**24)


# The draw of rows and the account


def test_each_row_has_a_coin_of_its_own():
    """Catches: batches of one size, shuffled passes, a row that is drawn more often; a count other than the steps."""
    steps, count, batch = 600, 20, 5
    model = graft(Flat(), nn.Linear(2, 2))
    chosen = settings(local_steps=steps, per_device_train_batch_size=batch)
    trained = train_protecting_rows(model, rows(count), chosen, local_round(), examples())
    drawn = np.zeros((steps, count))
    for step, numbers in enumerate(model.task.seen):
        assert len(set(numbers)) == len(numbers)
        drawn[step, numbers] = 1
    release, steps_of_round = release_of_round(count, chosen, examples(1.5))
    probability = release.sampling_probability
    assert (release.noise, release.noise_multiplier, probability) == ("gaussian", 1.5, batch / count)
    assert steps_of_round == trained.steps == steps
    variance = probability * (1 - probability)
    assert abs(drawn.mean() - probability) < 5 * math.sqrt(variance / drawn.size)
    assert np.abs(drawn.mean(axis=0) - probability).max() < 6 * math.sqrt(variance / steps)
    assert abs(drawn.sum(axis=1).var() / (count * variance) - 1) < 5 * math.sqrt(2 / steps)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(count)).max() < 6 / math.sqrt(steps)


@pytest.mark.parametrize(
    ("values", "count", "probability", "steps"),
    [
        ({"local_steps": 7, "per_device_train_batch_size": 4}, 10, 0.4, 7),
        ({"local_steps": 7, "per_device_train_batch_size": 16}, 10, 1.0, 7),
        ({"local_epochs": 2, "per_device_train_batch_size": 4}, 10, 0.4, 6),
        ({"local_epochs": 3, "per_device_train_batch_size": 64}, 10, 1.0, 3),
    ],
)
def test_what_is_accounted_is_what_is_done(values, count, probability, steps):
    """Catches: a probability above 1, epochs counted as steps, steps that are not in the account."""
    chosen = settings(**values)
    release, counted = release_of_round(count, chosen, examples(1.0))
    assert (release.sampling_probability, counted) == (probability, steps)
    assert release.sampling_probability == sampling_probability(count, chosen)
    seen = []
    model = graft(Flat(), nn.Linear(2, 2))
    trained = train_protecting_rows(
        model, rows(count), chosen, local_round(), examples(), lambda *told: seen.append(told[:2])
    )
    assert trained.steps == steps
    assert seen == [(step, steps) for step in range(1, steps + 1)]
    if probability == 1.0:
        assert model.task.seen == [list(range(count))] * steps


def test_the_ledger_of_rows_agrees_with_googles_library(tmp_path):
    """Catches: rounds or steps left out, another adjacency, the probability of clients in the place of rows'."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    chosen, delta, rounds = settings(local_steps=25, per_device_train_batch_size=8), 1e-5, 3
    ledger = Ledger(tmp_path / "ledger.jsonl", delta, {})
    release, count = release_of_round(100, chosen, examples(1.1))
    for round_ in range(rounds):
        told = ledger.charge("rows", release, count, round=round_)
    event = dp_accounting.PoissonSampledDpEvent(0.08, dp_accounting.GaussianDpEvent(1.1))
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(event, 25 * rounds)
    assert told == pytest.approx(accountant.get_epsilon(delta), rel=1e-2)
    assert ledger.epsilons() == {"rows": told}


def test_the_least_noise_that_keeps_the_target_over_all_rounds():
    """Catches: a target for each round, noise that misses it or wastes it, a given multiplier that is replaced."""
    chosen = settings(local_steps=10, per_device_train_batch_size=10)
    wanted = ExamplePrivacySection(target_epsilon=3.0, delta=1e-5)
    found = calibrated(100, chosen, wanted, 4)
    assert found == wanted.model_copy(update={"noise_multiplier": found.noise_multiplier})
    release, count = release_of_round(100, chosen, found)
    assert epsilon({release: 4 * count}, 1e-5) <= 3.0
    less, _ = release_of_round(100, chosen, examples(found.noise_multiplier * 0.98))
    assert epsilon({less: 4 * count}, 1e-5) > 3.0
    given = ExamplePrivacySection(target_epsilon=3.0, noise_multiplier=0.7)
    assert calibrated(100, chosen, given, 4) == given
    assert calibrated(100, chosen, ExamplePrivacySection(), 4) == ExamplePrivacySection()


@pytest.mark.parametrize("target", [0.05, 1e-6])
def test_a_target_that_no_noise_keeps(target):
    """Catches: noise that [privacy.examples] would not take, an exception without a code."""
    with pytest.raises(TrainingError, match="over 1000 steps") as caught:
        calibrated(ROWS, settings(local_steps=10), ExamplePrivacySection(target_epsilon=target), 100)
    assert caught.value.code == "examples-unsupported"


# What is around it


def test_the_proximal_term_is_neither_clipped_nor_noisy():
    """Catches: a term that is clipped away with the rows, pulls elsewhere, or is missing."""
    mu, rate, norm, start = 500.0, 0.1, 1e-3, np.array([0.5, -1.0, 2.0, 0.25], np.float32)

    def end(steps, **values):
        model = graft()
        model.write(start)
        chosen = settings(local_steps=steps, learning_rate=rate)
        train_protecting_rows(model, rows(ROWS), chosen, local_round(**values), examples(2.0, norm), insecure_seed=3)
        return model.read()

    one, two = end(1), end(2)
    assert np.array_equal(end(1, proximal_mu=mu), one)
    term = -rate * mu * (one - start)
    assert np.linalg.norm(term) > 10 * rate * norm
    assert np.allclose(end(2, proximal_mu=mu) - two, term, atol=1e-5)


def snapshot(model):
    """Return all that Opacus might leave on a model: hooks, attributes, names, modes, gradients."""
    network, seen = model.base.network, {}
    for name, module in network.named_modules():
        hooks = [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
        seen[name] = (type(module), sorted(vars(module)), hooks, module.training)
    for name, value in network.named_parameters():
        seen[f"{name}:"] = (id(value), sorted(vars(value)), value.requires_grad, value.grad is None)
    return seen


class Stopped(Exception):
    """Raised in the middle of training."""


@contextmanager
def stopping(made, where):
    """Raise in the first forward or backward pass of a graft, when most of it is done."""

    def stop(*ignored):
        raise Stopped

    if where == "forward":
        handle = made.base.network.get_submodule("classifier").register_forward_hook(stop)
    else:
        handle = made.parameters[0].register_hook(stop)
    try:
        with pytest.raises(Stopped):
            yield
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["", "forward", "backward"])
@pytest.mark.parametrize("adapter", METHODS[1:], ids=["lora", "houlsby"])
def test_the_graft_is_left_as_it_was(bert, adapter, where):
    """Catches: hooks, rows' gradients or activations left behind; names with a prefix; dropout left on."""
    made, encoded = bert(dropout=True, **adapter)
    named = dict(made.base.network.named_parameters())
    before, frozen = snapshot(made), {name: one.clone() for name, one in named.items() if not one.requires_grad}
    chosen, start = settings(per_device_train_batch_size=5, local_steps=2), made.read()
    with stopping(made, where) if where else nullcontext():
        train_protecting_rows(made, encoded, chosen, local_round(), examples(1.0, 1.0))
    assert snapshot(made) == before
    assert np.array_equal(made.read(), start) == bool(where)
    assert all(torch.equal(named[name], one) for name, one in frozen.items())
    assert [tensor.name for tensor in made.spec.tensors] == sorted(named.keys() - frozen.keys())
    train_protecting_rows(
        made, encoded, chosen, local_round(), examples(1.0, 1.0)
    )  # nothing is in the way of another round
    train(made, encoded, chosen, local_round())
    assert np.isfinite(made.read()).all()


def test_gradients_left_by_others_do_not_count():
    """Catches: the shared model's leftovers, one site's data, in another site's first step."""
    shared = graft()
    for value in shared.parameters:
        value.grad = torch.ones_like(value)
    assert np.allclose(moved(model=shared), moved(), atol=1e-6)


def test_a_loss_that_is_not_finite_is_an_error():
    """Catches: NaN reported as a loss; parameters that are not finite because of one row."""
    model = graft(with_row([0.0] * 3, math.nan))
    with pytest.raises(TrainingError) as caught:
        train_protecting_rows(model, rows(ROWS), settings(local_steps=3, learning_rate=0.01), local_round(), examples())
    assert caught.value.code == "diverged"
    assert np.isfinite(model.read()).all()
    assert np.any(model.read())


def test_the_loss_is_the_mean_over_drawn_rows(monkeypatch):
    """Catches: steps without rows counted as a loss of 0; NaN where no row was drawn at all."""
    model, seen = graft(Flat(), nn.Linear(2, 2)), []
    model.task.loss = lambda network, batch: (network(batch["inputs"]) * 0).mean() + len(batch["inputs"])
    chosen = settings(per_device_train_batch_size=1, local_steps=50)
    trained = train_protecting_rows(
        model, rows(100), chosen, local_round(), examples(), lambda *told: seen.append(told[2].clone())
    )
    drawn = [len(batch) for batch in model.task.seen]
    assert trained.loss == pytest.approx(sum(size**2 for size in drawn) / sum(drawn))
    assert [value for value, _ in itertools.groupby(seen[-1].tolist()) if value] == [
        v for v, _ in itertools.groupby(drawn)
    ]
    assert len(drawn) < 50
    monkeypatch.setattr(dp_sgd, "sampling_probability", lambda *arguments: 1e-12)
    assert train_protecting_rows(model, rows(10), chosen, local_round(), examples()).loss == 0.0


def test_the_deadline_ends_training(monkeypatch):
    """Catches: a site that goes on training for a round that is over."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(dp_sgd, "time", clock)
    model = graft()
    with pytest.raises(TrainingError, match="Only 3 of 8 steps were done in 2 s") as caught:
        train_protecting_rows(model, rows(ROWS), settings(local_steps=8), local_round(deadline_s=2.0), examples())
    assert caught.value.code == "deadline"
    assert not model.base.network.training


def test_training_learns_with_noise():
    """Catches: a loop that goes through the motions."""
    chosen = settings(local_steps=400, learning_rate=0.1)
    assert np.allclose(moved(chosen, examples(0.1, 1.0)), [0.3, 1.0, -2.0, 0.5], atol=0.1)


# What it refuses


def refused(made):
    """Return what is refused."""
    before = snapshot(made)
    with pytest.raises(TrainingError) as caught:
        train_protecting_rows(made, rows(ROWS), settings(), local_round(), examples())
    assert caught.value.code == "examples-unsupported"
    assert snapshot(made) == before
    return str(caught.value)


def test_a_task_whose_rows_depend_on_each_other_is_refused(tmp_path):
    """Catches: in-batch negatives, where the gradient of one row holds all others."""
    assert [name for name in TASKS.names() if TASKS.get(name).row_losses] != []
    assert not TASKS.get("sentence-embedding").row_losses
    model.grafts.clear()
    config = parse({"task": {"name": "sentence-embedding"}, "train": {"device": "cpu"}})
    made = load_graft(config, str(tiny_base(tmp_path, "bert")), 1)
    assert "sentence-embedding" in refused(made)


class Windows(nn.Module):
    """Cuts each row into three, which the trained layer sees as rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs):
        return self.layer(inputs.reshape(-1, 1)).reshape(-1, WIDTH)


class Hidden(nn.Module):
    """Uses the weight of a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, inputs):
        return inputs @ self.layer.weight.T


class Counting(nn.Linear):
    """Trained, with a buffer."""

    def __init__(self):
        super().__init__(WIDTH, 1)
        self.register_buffer("count", torch.zeros(1))


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (lambda: nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, 1)), "batch norm"),
        (Windows, "for each row"),
        (Hidden, "for each row"),
        (Counting, "buffers"),
        (lambda: nn.Sequential(nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, 1)), "layer norm without a bias"),
        (lambda: nn.Linear(WIDTH, 1, dtype=torch.bfloat16), "half precision"),
    ],
)
def test_layers_whose_rows_cannot_be_told_apart_are_refused(network, problem):
    """Catches: clipping of something else than a row's whole gradient, which bounds nothing."""
    assert problem in refused(graft(network=network()))


def test_a_batch_norm_that_stays_in_eval_mode_is_fine():
    """Catches: a refusal of frozen statistics, which mix nothing."""
    network = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, 1))
    network[0].eval().train = lambda mode=True: network[0]
    check_supported(graft(network=network.eval()))


def test_without_opacus_there_is_a_hint(monkeypatch):
    """Catches: a traceback in the place of what to install."""
    for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UsageError, match=r"pip install 'tsugiki\[privacy\]'"):
        train_protecting_rows(graft(), rows(ROWS), settings(), local_round(), examples())


def test_importing_opacus_does_not_set_up_logging(monkeypatch):
    """Catches: every log line of the process twice, because a library called basicConfig when it was imported."""

    class Imported(types.ModuleType):
        def __getattr__(self, name):
            logging.root.addHandler(logging.NullHandler())
            return name

    before = list(logging.root.handlers)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", Imported("opacus.grad_sample"))
    assert dp_sgd._hooks() == "GradSampleHooks"
    assert logging.root.handlers == before
