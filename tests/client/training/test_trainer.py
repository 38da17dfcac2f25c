import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tsugiki.client.training import trainer
from tsugiki.client.training.trainer import (
    LocalRound,
    adjustment_of,
    batches,
    batches_per_epoch,
    make_optimizer,
    schedule,
    set_learning_rate,
    steps_per_round,
    touched_rows,
    train,
)
from tsugiki.common.config.run import TrainSection
from tsugiki.common.errors import TrainingError
from tsugiki.common.model.graft import Graft
from tsugiki.common.tasks.base import Base, Encoded
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec

ROWS = 12
INPUTS = torch.from_numpy(np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32))
TARGETS = INPUTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
ENCODED = Encoded({"text": TokenRows.of([[row] for row in range(ROWS)])})


class Regression:
    """A task whose loss is the mean squared error of a linear layer; it remembers its batches."""

    pads_rows = False
    compares_rows = False

    def __init__(self, losses=None):
        self.seen, self.losses = [], losses

    def batch(self, encoded, rows, base):
        """Return the inputs and targets of the rows."""
        self.seen.append(list(rows))
        return {"inputs": INPUTS[rows], "targets": TARGETS[rows]}

    def loss(self, network, batch):
        """Return the mean squared error, or what it is told to."""
        error = ((network(batch["inputs"])[:, 0] - batch["targets"]) ** 2).mean()
        return error if self.losses is None else error * 0 + next(self.losses)


def graft(task=None):
    """Return a linear layer at zero in the place of a model."""
    network = nn.Linear(3, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    tensors = (TensorSpec("bias", (1,), "adapter"), TensorSpec("weight", (1, 3), "adapter"))
    spec = AdapterSpec("t", "m", "{}", "0" * 64, "float32", tensors)
    return Graft(task or Regression(), None, Base(network, network, None), spec, torch.device("cpu"))


def settings(**values):
    """Return the settings of plain SGD without warm-up, unless told otherwise."""
    plain = {"optimizer": "sgd", "learning_rate": 0.1, "lr_schedule": "constant", "warmup_ratio": 0.0, "threads": 1}
    small = {"per_device_train_batch_size": 4, "local_steps": 3, "max_grad_norm": 0.0}
    return TrainSection(**{**plain, **small, **values})


def local_round(round_=1, rounds=1, **values):
    """Return one round of a run."""
    return LocalRound(42, "site-0", round_, (round_ - 1) / rounds, round_ / rounds, **values)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every step that is taken."""
    seen = []
    step = torch.optim.SGD.step

    def watched(self, *arguments):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    return seen


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine", "constant"])
def test_rounds_divide_one_schedule_and_one_sequence_of_batches(rates, lr_schedule):
    """Catches: a schedule, a warm-up or a shuffle that starts anew in every round."""

    def run(rounds, steps):
        model = graft()
        chosen = settings(local_steps=steps, lr_schedule=lr_schedule, warmup_ratio=0.25)
        rates.clear()
        for number in range(1, rounds + 1):
            train(model, ENCODED, chosen, local_round(number, rounds))
        return list(rates), model.task.seen, model.read()

    (one_rates, one_seen, one), (many_rates, many_seen, many) = run(1, 12), run(4, 3)
    assert many_seen == one_seen
    assert np.allclose(many_rates, one_rates, rtol=1e-12)
    assert np.allclose(many, one, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_head_keeps_its_own_rate(optimizer):
    """Catches: a schedule that sets one rate for all; a head without weight decay; a parameter in no group."""
    model = graft()
    tensors = (TensorSpec("bias", (1,), "adapter"), TensorSpec("weight", (1, 3), "head"))
    model = replace(model, spec=replace(model.spec, tensors=tensors))
    chosen = settings(optimizer=optimizer, learning_rate=0.1, head_learning_rate=0.5, weight_decay=0.2, local_steps=4)
    made = make_optimizer(model, chosen)
    set_learning_rate(made, chosen.model_copy(update={"lr_schedule": "linear"}), local_round(), 2, 4)
    groups = {id(value): group for group in made.param_groups for value in group["params"]}
    bias, weight = (groups[id(value)] for value in model.parameters)
    assert len(made.param_groups) == len(groups) == 2
    assert (bias["lr"], weight["lr"]) == pytest.approx((0.05, 0.25))
    assert (bias["weight_decay"], weight["weight_decay"]) == (0.0, 0.2)


def test_the_heads_rate_moves_the_head_alone():
    """Catches: a head that trains at the adapter's rate."""
    model = graft()
    tensors = (TensorSpec("bias", (1,), "adapter"), TensorSpec("weight", (1, 3), "head"))
    model = replace(model, spec=replace(model.spec, tensors=tensors))
    moved = {}
    for head_rate in (0.1, 0.3):
        model.write(model.initial)
        train(model, ENCODED, settings(local_steps=1, head_learning_rate=head_rate), local_round())
        moved[head_rate] = model.read() - model.initial
    assert moved[0.3][0] == moved[0.1][0] != 0
    assert np.allclose(moved[0.3][1:], 3 * moved[0.1][1:], rtol=1e-5)


@pytest.mark.parametrize("lr_schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_every_step_moves_and_none_more_than_the_peak(lr_schedule, warmup, steps):
    """Catches: a first warm-up step at 0, a last step at 0, a rate above the given one."""
    chosen = settings(lr_schedule=lr_schedule, warmup_ratio=warmup)
    factors = [schedule(step / steps, 1 / steps, chosen) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_the_shapes_of_the_schedules():
    """Catches: warm-up that does not reach the peak, a decay from elsewhere, a cosine of another period."""
    linear, cosine, constant = (
        settings(lr_schedule=name, warmup_ratio=0.2) for name in ("linear", "cosine", "constant")
    )
    assert [schedule(position / 10, 0.1, linear) for position in range(10)] == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert schedule(0.6, 0.1, cosine) == pytest.approx(0.5)
    assert schedule(0.4, 0.1, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(0.9, 0.1, constant) == 1.0


def first(rows, chosen, count, at=None):
    """Return the first batches of a round."""
    at = at or local_round()
    return list(itertools.islice(batches(rows, chosen, at, steps_per_round(rows, chosen)), count))


def test_a_pass_sees_every_row_once():
    """Catches: rows drawn with replacement, a short last batch dropped, the same order in every pass."""
    seen = first(10, settings(), 6)
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    passes = [[row for batch in part for row in batch] for part in (seen[:3], seen[3:])]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert passes[0] != passes[1]


@pytest.mark.parametrize(
    "values",
    [
        {"local_steps": 2},
        {"local_steps": 5, "gradient_accumulation_steps": 3},
        {"local_epochs": 1},
        {"local_epochs": 2, "gradient_accumulation_steps": 2},
        {"local_epochs": 1, "gradient_accumulation_steps": 5},
    ],
)
def test_rounds_walk_on_through_the_shard(values):
    """Catches: a round that starts its pass anew, so that some rows are never seen, or seen twice before others."""
    chosen, rounds = settings(**values), 7
    taken = steps_per_round(10, chosen) * chosen.gradient_accumulation_steps
    seen = [batch for number in range(1, rounds + 1) for batch in first(10, chosen, taken, local_round(number, rounds))]
    assert seen == first(10, chosen, rounds * taken)


def test_batches_follow_from_seed_site_and_round():
    """Catches: a global generator, and one shuffle for all sites."""
    chosen = settings()
    assert first(10, chosen, 5) == first(10, chosen, 5)
    assert first(10, chosen, 3) != first(10, chosen, 3, LocalRound(7, "site-0", 1, 0.0, 1.0))
    assert first(10, chosen, 3) != first(10, chosen, 3, LocalRound(42, "site-1", 1, 0.0, 1.0))


@pytest.mark.parametrize(
    ("values", "rows", "steps"),
    [
        ({"local_steps": 7}, 10, 7),
        ({"local_steps": 7, "local_epochs": 1}, 10, 3),
        ({"local_epochs": 2}, 8, 4),
        ({"local_epochs": 2, "gradient_accumulation_steps": 2}, 10, 3),
        ({"local_epochs": 1, "gradient_accumulation_steps": 8}, 10, 1),
    ],
)
def test_steps_of_a_round(values, rows, steps):
    """Catches: epochs counted in batches, or passes that are longer because steps are rounded up in each."""
    assert steps_per_round(rows, settings(**values)) == steps


def test_batches_of_a_pass():
    """Catches: a short last batch that is not counted, and an empty one that is."""
    assert [batches_per_epoch(rows, settings()) for rows in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_accumulation_equals_one_large_batch():
    """Catches: gradients summed instead of averaged, or zeroed between the parts."""
    small, large = graft(), graft()
    parts = settings(per_device_train_batch_size=2, gradient_accumulation_steps=6, local_steps=3)
    whole = settings(per_device_train_batch_size=12, local_steps=3)
    of_parts, of_whole = train(small, ENCODED, parts, local_round()), train(large, ENCODED, whole, local_round())
    assert np.allclose(small.read(), large.read(), atol=1e-6)
    assert of_parts.loss == pytest.approx(of_whole.loss, abs=1e-6)
    assert (of_parts.steps, of_whole.steps) == (3, 3)


def test_the_loss_is_the_mean_over_steps():
    """Catches: the last step's loss, or a sum, reported."""
    model = graft(Regression(itertools.cycle([1.0, 2.0, 6.0])))
    assert train(model, ENCODED, settings(), local_round()).loss == pytest.approx(3.0)


def test_the_proximal_term_has_the_gradient_of_its_definition():
    """Catches: a missing factor, a pull towards zero instead of the received values, a term at the first step."""
    mu, rate = 0.7, 0.1
    model, free = graft(), graft()
    start = np.array([0.5, -1.0, 2.0, 0.25], np.float32)
    for one in (model, free):
        one.write(start)
    whole = settings(per_device_train_batch_size=12, local_steps=1)
    train(free, ENCODED, whole, local_round())
    moved = free.read()
    train(free, ENCODED, whole, local_round())
    train(model, ENCODED, settings(per_device_train_batch_size=12, local_steps=2), local_round(proximal_mu=mu))
    assert np.allclose(model.read(), free.read() - rate * mu * (moved - start), atol=1e-6)
    assert not np.allclose(model.read(), free.read(), atol=1e-3)


def test_gradients_are_clipped_as_one_vector():
    """Catches: clipping of each tensor by itself, and a limit that is not applied."""
    model = graft()
    train(model, ENCODED, settings(max_grad_norm=0.01, local_steps=1, learning_rate=1.0), local_round())
    assert np.linalg.norm(model.read()) == pytest.approx(0.01, rel=1e-4)
    unclipped = graft()
    train(unclipped, ENCODED, settings(max_grad_norm=0.0, local_steps=1, learning_rate=1.0), local_round())
    assert np.linalg.norm(unclipped.read()) > 0.1
    assert np.allclose(model.read() / 0.01, unclipped.read() / np.linalg.norm(unclipped.read()), atol=1e-3)


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_weight_decay_spares_one_dimensional_parameters(optimizer, kind):
    """Catches: decay of biases and norms, and a parameter that no group has."""
    made = make_optimizer(graft(), settings(optimizer=optimizer, weight_decay=0.1))
    assert type(made) is kind
    decays = {tuple(value.shape): group["weight_decay"] for group in made.param_groups for value in group["params"]}
    assert decays == {(1, 3): 0.1, (1,): 0.0}


def test_momentum_is_passed_on():
    """Catches: a setting that does nothing."""
    assert make_optimizer(graft(), settings(momentum=0.9)).param_groups[0]["momentum"] == 0.9


def test_without_bias_correction_adam_is_berts_first():
    """Catches: a switch that does nothing; a factor of another step; betas taken for each other."""
    model, lr, beta_1, beta_2 = graft(), 0.01, 0.9, 0.999
    train(
        model,
        ENCODED,
        settings(optimizer="adamw", learning_rate=lr, bias_correction=False, local_steps=5),
        local_round(),
    )
    other = graft()
    mean, square = [0, 0], [0, 0]
    stream = batches(ROWS, settings(), local_round(), 5)
    for _ in range(5):
        loss = other.task.loss(other.base.network, other.task.batch(ENCODED, next(stream), None))
        grads = torch.autograd.grad(loss, other.parameters)
        with torch.no_grad():
            for at, (value, grad) in enumerate(zip(other.parameters, grads, strict=True)):
                mean[at] = beta_1 * mean[at] + (1 - beta_1) * grad
                square[at] = beta_2 * square[at] + (1 - beta_2) * grad**2
                value -= lr * mean[at] / (square[at].sqrt() + 1e-8)
    assert all(torch.allclose(*pair, rtol=1e-4) for pair in zip(model.parameters, other.parameters, strict=True))
    corrected = graft()
    train(corrected, ENCODED, settings(optimizer="adamw", learning_rate=lr, local_steps=5), local_round())
    assert (np.abs(model.read()) > 2 * np.abs(corrected.read())).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_moments_that_are_kept_make_two_rounds_one(optimizer):
    """Catches: an optimiser that begins anew although it is told not to, or that keeps what it should forget."""
    chosen = settings(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0, local_steps=6)
    half = chosen.model_copy(update={"local_steps": 3})
    whole, kept, anew = graft(), graft(), graft()
    train(whole, ENCODED, chosen, local_round())
    moments = {}
    for round_ in (1, 2):
        train(kept, ENCODED, half, local_round(round_, 2, moments=moments))
        train(anew, ENCODED, half, local_round(round_, 2))
    assert np.allclose(kept.read(), whole.read(), atol=1e-6)
    assert not np.allclose(anew.read(), whole.read(), atol=1e-4)


def test_a_round_that_fails_leaves_the_moments_of_the_one_before():
    """Catches: moments of NaN that are kept, with which a client can never train again."""
    chosen, moments, model = settings(optimizer="adamw"), {}, graft()
    train(model, ENCODED, chosen, local_round(1, 3, moments=moments))
    kept = {key: value["exp_avg"].clone() for key, value in moments["state"].items()}
    model.task.losses = iter([math.nan] * 3)
    with pytest.raises(TrainingError):
        train(model, ENCODED, chosen, local_round(2, 3, moments=moments))
    assert kept
    assert all(torch.equal(moments["state"][key]["exp_avg"], value) for key, value in kept.items())
    model.task.losses = None
    model.write(np.zeros(4, np.float32))
    assert math.isfinite(train(model, ENCODED, chosen, local_round(3, 3, moments=moments)).loss)


@pytest.mark.parametrize(
    ("losses", "factor", "diverged"),
    [
        ([1.0] * 8 + [3.1] * 8, 3.0, True),
        ([1.0] * 8 + [2.9] * 8, 3.0, False),
        ([1.0] * 8 + [3.1] * 7 + [0.1], 3.0, False),
        ([0.1] + [1.0] * 7 + [2.0] * 8, 3.0, False),
        ([1.0] * 8 + [99.0] * 8, 0.0, False),
        ([1.0] * 4 + [99.0] * 4, 3.0, False),
    ],
)
def test_a_loss_that_rises_far_above_its_start_is_told(losses, factor, diverged):
    """Catches: a single bad batch taken for divergence; a rise that is never looked at; a watch that cannot be off."""
    model, chosen = graft(Regression(iter(losses))), settings(local_steps=len(losses), divergence_factor=factor)
    if not diverged:
        assert train(model, ENCODED, chosen, local_round()).steps == len(losses)
        return
    with pytest.raises(TrainingError) as caught:
        train(model, ENCODED, chosen, local_round())
    assert caught.value.code == "diverged"
    assert not model.base.network.training


@pytest.mark.parametrize("factor", [0.0, 3.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value, factor):
    """Catches: an update of NaN sent as a result; a loss that is said to have risen from nan to nan."""
    losses = [1.0, value, *[1.0] * 14]
    model = graft(Regression(iter(losses)))
    with pytest.raises(TrainingError, match="is not finite") as caught:
        train(model, ENCODED, settings(local_steps=len(losses), divergence_factor=factor), local_round())
    assert caught.value.code == "diverged"


def test_the_deadline_ends_training(monkeypatch):
    """Catches: a site that goes on training for a round that is over."""
    ticks = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    model = graft()
    with pytest.raises(TrainingError, match="Only 3 of 8 steps were done in 2 s") as caught:
        train(model, ENCODED, settings(local_steps=8), local_round(deadline_s=2.0))
    assert caught.value.code == "deadline"
    assert not model.base.network.training


def test_a_partial_round_ends_before_the_step_that_would_be_late(monkeypatch):
    """Catches: a slow site that sends nothing, or too late; missed steps that count as done."""
    now = itertools.accumulate([0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # the steps take 1, 3, 1, 1, ... s
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    model = graft()
    next(now)
    trained = train(model, ENCODED, settings(local_steps=8), local_round(deadline_s=8.9, partial=True))
    # after 6 s another step may take 3 s: it would end at 9 s
    assert (trained.steps, trained.missed_steps) == (4, 4)
    assert trained.rows_seen(30) == 15
    assert trained.rows_seen(1) == 1


def test_a_round_that_is_done_in_time_is_not_partial(monkeypatch):
    """Catches: a last step that is taken for a missed one; a whole round that weighs less for being asked to hurry."""
    ticks = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    trained = train(graft(), ENCODED, settings(local_steps=3), local_round(deadline_s=3.0, partial=True))
    assert (trained.steps, trained.missed_steps) == (3, 0)
    assert trained.rows_seen(30) == 30


def test_the_model_is_left_ready_for_evaluation():
    """Catches: dropout left on, and gradients left for the next round."""
    model = graft()
    train(model, ENCODED, settings(), local_round())
    assert not model.base.network.training
    assert all(value.grad is None for value in model.parameters)


def test_training_learns():
    """Catches: a loop that goes through the motions."""
    model = graft()
    train(model, ENCODED, settings(local_steps=400), local_round())
    assert np.allclose(model.read(), [0.3, 1.0, -2.0, 0.5], atol=1e-2)
    assert Regression().loss(model.base.network, {"inputs": INPUTS, "targets": TARGETS}) < 1e-3


def test_gradients_left_by_a_failed_site_do_not_reach_the_next():
    """Catches: the shared model's leftover gradients, one site's data, added to another site's first step."""
    clean, shared = graft(), graft()
    for value in shared.parameters:
        value.grad = torch.ones_like(value)
    for one in (clean, shared):
        train(one, ENCODED, settings(), local_round())
    assert np.array_equal(clean.read(), shared.read())


# Batches by length


def skewed(rows, seed=0):
    """Return lengths of which most are short and a few long, as those of real texts."""
    drawn = np.random.default_rng(seed).lognormal(2.5, 0.7, rows)
    return np.clip(drawn, 3, 128).astype(np.int64)


def grouped(rows, chosen, count, at=None, lengths=None):
    """Return the first batches of a round, by length."""
    at = at or local_round()
    lengths = skewed(rows) if lengths is None else lengths
    return list(itertools.islice(batches(rows, chosen, at, steps_per_round(rows, chosen), lengths), count))


def real_share(seen, lengths):
    """Return real tokens over padded tokens."""
    real = sum(int(lengths[batch].sum()) for batch in seen)
    return real / sum(len(batch) * int(lengths[batch].max()) for batch in seen)


@pytest.mark.parametrize("rows", [1, 3, 4, 33, 400, 803, 1001])
def test_a_pass_by_length_sees_every_row_once(rows):
    """Catches: rows lost at the end of a window, a short batch dropped, one order for every pass."""
    chosen = settings()
    count = batches_per_epoch(rows, chosen)
    seen = grouped(rows, chosen, 2 * count)
    passes = [[row for batch in part for row in batch] for part in (seen[:count], seen[count:])]
    assert all(sorted(found) == list(range(rows)) for found in passes)
    assert sorted(map(len, seen[:count])) == sorted(map(len, first(rows, chosen, count)))
    if rows > 32:
        assert passes[0] != passes[1]


@pytest.mark.parametrize(
    "values", [{"local_steps": 7}, {"local_steps": 60}, {"local_steps": 3, "gradient_accumulation_steps": 5}]
)
def test_rounds_cut_windows_and_passes_and_lose_nothing(values):
    """Catches: a round that sorts its window anew and repeats what the round before had."""
    chosen, rounds, rows = settings(**values), 9, 451
    taken = steps_per_round(rows, chosen) * chosen.gradient_accumulation_steps
    seen = [
        batch for number in range(1, rounds + 1) for batch in grouped(rows, chosen, taken, local_round(number, rounds))
    ]
    assert seen == grouped(rows, chosen, rounds * taken)


def test_batches_by_length_pad_little():
    """Catches: windows that are not sorted, or shuffled by rows after they were."""
    lengths, chosen = skewed(4000), settings(per_device_train_batch_size=16)
    count = batches_per_epoch(len(lengths), chosen)
    assert real_share(grouped(4000, chosen, count), lengths) >= 0.9
    assert real_share(first(4000, chosen, count), lengths) < 0.6


def test_batches_by_length_follow_from_seed_site_and_lengths():
    """Catches: a global generator; short rows always first; ties broken by chance."""
    chosen, rows = settings(), 1000
    seen = grouped(rows, chosen, 250)
    assert grouped(rows, chosen, 250) == seen
    assert grouped(rows, chosen, 250, LocalRound(7, "site-0", 1, 0.0, 1.0)) != seen
    assert grouped(rows, chosen, 250, LocalRound(42, "site-1", 1, 0.0, 1.0)) != seen
    longest = [int(skewed(rows)[batch].max()) for batch in seen[:50]]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
    # Equal lengths: the batches are those of the shuffled pass, in another order.
    even = grouped(rows, chosen, 50, lengths=np.ones(rows, np.int64))
    assert sorted(even) == sorted(first(rows, chosen, 50))


def test_a_small_site_has_several_windows():
    """Catches: all rows of a small site sorted together, so that batches are of one length, and often of one class."""
    lengths = np.repeat([5, 50], 32)
    seen = grouped(64, settings(), 16, lengths=lengths)
    assert sum(len(set(lengths[batch])) > 1 for batch in seen) >= 2
    few = grouped(20, settings(), 5, lengths=skewed(20))  # too few for any group
    assert [sorted(batch) for batch in few] == [sorted(batch) for batch in first(20, settings(), 5)]


class Texts(Regression):
    """A task with rows of several lengths, which its loss may compare."""

    pads_rows = True

    def __init__(self, compares_rows):
        super().__init__()
        self.compares_rows = compares_rows

    def lengths(self, encoded):
        """Return the tokens of each row."""
        return encoded.texts["text"].lengths()


@pytest.mark.parametrize(
    ("value", "compares_rows", "by_length"),
    [("auto", False, True), ("auto", True, False), (True, True, True), (False, False, False)],
)
def test_the_loop_groups_where_it_may(value, compares_rows, by_length):
    """Catches: in-batch negatives chosen by length; a setting that nothing reads."""
    encoded = Encoded({"text": TokenRows.of([[1] * (row + 1) for row in range(ROWS)])})
    chosen = settings(group_by_length=value, per_device_train_batch_size=1, local_steps=ROWS)
    model = graft(Texts(compares_rows))
    train(model, encoded, chosen, local_round())
    wanted = grouped(ROWS, chosen, ROWS, lengths=np.arange(ROWS)) if by_length else first(ROWS, chosen, ROWS)
    assert model.task.seen == wanted
    assert first(ROWS, chosen, ROWS) != grouped(ROWS, chosen, ROWS, lengths=np.arange(ROWS))


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize(
    ("values", "rounds"),
    [
        ({"local_steps": 3}, 4),
        ({"local_steps": 3, "gradient_accumulation_steps": 2}, 7),
        ({"local_steps": 90}, 4),
        ({"local_epochs": 1}, 1),
    ],
)
def test_touched_rows_are_all_that_batches_contain(values, rounds, by_length):
    """Catches: a row that is trained on and was never tokenised; all rows tokenised for a run of few steps."""
    rows, chosen = 803, settings(**values)
    steps = steps_per_round(rows, chosen)
    draw = grouped if by_length else first
    seen = {
        row
        for number in range(1, rounds + 1)
        for batch in draw(rows, chosen, steps * chosen.gradient_accumulation_steps, local_round(number, rounds))
        for row in batch
    }
    touched = touched_rows(rows, chosen, 42, "site-0", rounds, by_length).tolist()
    assert touched == sorted(touched)
    assert seen <= set(touched)
    if not by_length:
        assert seen == set(touched)
    assert len(touched) <= len(seen) + by_length * 4 * 50


def test_only_a_loss_that_takes_an_adjustment_gets_one():
    """Catches: a tensor that is handed to the network of a task from a package, which knows no such input."""
    rows = Encoded(ENCODED.texts, targets=np.array([0] * 9 + [1] * 3))
    takes = SimpleNamespace(adjusts_logits=True)
    assert set(adjustment_of(takes, rows, (0.5, 0.5))) == {"adjustment"}
    assert adjustment_of(takes, rows, ()) == {}
    assert adjustment_of(SimpleNamespace(adjusts_logits=False), rows, (0.5, 0.5)) == {}
