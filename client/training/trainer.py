"""The local loop: plain PyTorch from top to bottom."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.config.run import TrainSection
from tsugiki.common.errors import TrainingError
from tsugiki.common.model.device import computing
from tsugiki.common.model.graft import Graft
from tsugiki.common.rng import derive_seed, generator, seed_everything
from tsugiki.common.tasks.base import Batch, Encoded, Task
from tsugiki.common.tasks.classes import ADJUSTMENT, logit_adjustment


@dataclass(frozen=True)
class LocalRound:
    """One client's round.

    Args:
        seed: of the run.
        site: name of the client; its batches follow from the seed, the name and the position in the run.
        round_number: counted from 1.
        schedule_start: share of the whole run's training done before this round, in [0, 1).
        schedule_stop: share done after this round, in (0, 1].
        proximal_mu: weight of FedProx's term.
        deadline_s: seconds after which the client gives up.
        partial: whether the client ends the round in time, with the steps that it has done, instead.
        moments: the optimiser's state, read at the start and updated at the end; None: the optimiser begins anew.
        class_shares: of the federation, to which the loss is adjusted (`common/tasks/classes.py`); empty: it is not.
    """

    seed: int
    site: str
    round_number: int
    schedule_start: float
    schedule_stop: float
    proximal_mu: float = 0.0
    deadline_s: float = math.inf
    partial: bool = False
    moments: dict[str, Any] | None = None
    class_shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Trained:
    """The outcome of the loop.

    Args:
        steps: of the optimiser.
        loss: mean over the steps.
        seconds: that they took.
        missed_steps: of the round, for which the time was too short.
    """

    steps: int
    loss: float
    seconds: float
    missed_steps: int = 0

    def rows_seen(self, rows: int) -> int:
        """Return the client's rows, less those that the missed steps would have used; at least 1."""
        return max(1, rows * self.steps // (self.steps + self.missed_steps))


WINDOW = 8
"""Steps over which a loss is averaged before it is compared, because single batches scatter."""

MOST_GROUPED = 50
"""Most batches whose rows are sorted by length together; more would hardly save more padding."""

FEWEST_WINDOWS = 4
"""A pass has at least so many windows, because rows of like length often have one label: if all rows of a small site
were sorted together, most batches would be of one class."""

Lengths = npt.NDArray[np.int64]

Watch = Callable[[int, int, Any], None]
"""Called after each step with the steps done, the steps of the round, and the losses so far, a tensor of (steps,)."""

Ends = Callable[[int, int], bool]
"""Called after each step with the steps done and the steps of the round; returns whether the round ends here."""


def train(
    graft: Graft,
    encoded: Encoded,
    settings: TrainSection,
    local_round: LocalRound,
    watch: Watch = lambda step, steps, losses: None,
    ends: Ends = lambda step, steps: False,
) -> Trained:
    """Train the graft's parameters in place on one site's rows.

    Args:
        graft: the model.
        encoded: the rows.
        settings: of the loop.
        local_round: which part of the run this is.
        watch: called after each step.
        ends: called after each step; may end the round before all its steps are done.

    Raises:
        TrainingError: `diverged`, the loss is not finite; `deadline`, the time is up.
    """
    import torch

    torch.set_num_threads(settings.threads)
    seed_everything(derive_seed(local_round.seed, "train", local_round.site, local_round.round_number))
    steps = steps_per_round(len(encoded), settings)
    countdown = _Countdown(local_round, steps)
    optimizer = make_optimizer(graft, settings)
    if local_round.moments:
        # A copy: a round that fails must not leave its own state there.
        optimizer.load_state_dict(copy.deepcopy(local_round.moments))
    optimizer.zero_grad(set_to_none=True)  # the graft is shared: a site that failed in mid-step may have left gradients
    received = [value.detach().clone() for value in graft.parameters] if local_round.proximal_mu else []
    lengths = grouping_lengths(graft.task, encoded, settings)
    stream = batches(len(encoded), settings, local_round, steps, lengths)
    # On the device: reading a loss in every step would wait for the GPU.
    losses = torch.zeros(steps, device=graft.device)
    adjustment = adjustment_of(graft.task, encoded, local_round.class_shares)

    graft.base.network.train()
    try:
        for step in range(steps):
            set_learning_rate(optimizer, settings, local_round, step, steps)
            for _ in range(settings.gradient_accumulation_steps):
                with computing(settings, graft.device.type):  # some batches hold what the model itself makes of them
                    batch = graft.task.batch(encoded, next(stream), graft.base) | adjustment
                    batch = {name: tensor.to(graft.device) for name, tensor in batch.items()}
                    loss = graft.task.loss(graft.base.network, batch) / settings.gradient_accumulation_steps
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                losses[step] += loss.detach()
            add_proximal_term(graft, received, local_round.proximal_mu)
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(graft.parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch(step + 1, steps, losses)
            check_divergence(losses[: step + 1], settings.divergence_factor)
            if countdown.is_over(step + 1) or ends(step + 1, steps):
                break
    finally:
        graft.base.network.eval()
    mean = finite(float(losses[: step + 1].mean()))
    if local_round.moments is not None:
        local_round.moments.update(optimizer.state_dict())
    return Trained(step + 1, mean, countdown.elapsed_s, countdown.missed_steps)


class _Countdown:
    """The time of a client's round.

    Attributes:
        missed_steps: of the round, for which it was too short.

    Args:
        local_round: has the deadline.
        steps: of the round.
    """

    def __init__(self, local_round: LocalRound, steps: int) -> None:
        self.missed_steps = 0
        self._local_round = local_round
        self._steps = steps
        self._started = time.perf_counter()
        self._step_began = self._started
        self._longest_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """The time since the start."""
        return time.perf_counter() - self._started

    def is_over(self, done: int) -> bool:
        """Return whether the round ends after this step, because another one may be late.

        Raises:
            TrainingError: `deadline`, the time is up, and the client may not send what it has.
        """
        if not self._local_round.partial:
            check_deadline(self._local_round, done, self._steps, self._started)
            return False
        now = time.perf_counter()
        self._longest_s = max(self._longest_s, now - self._step_began)
        self._step_began = now
        if done == self._steps or now - self._started + self._longest_s <= self._local_round.deadline_s:
            return False
        self.missed_steps = self._steps - done
        return True


def adjustment_of(task: Task, encoded: Encoded, class_shares: Sequence[float]) -> Batch:
    """Return what is added to each batch, so that its loss is adjusted to the rows' own shares of the classes.

    Args:
        task: of the rows.
        encoded: the client's rows.
        class_shares: of the federation; empty: nothing is added.
    """
    import torch

    if not class_shares or encoded.targets is None or not task.adjusts_logits:
        return {}
    return {ADJUSTMENT: torch.from_numpy(logit_adjustment(encoded.targets, class_shares))}


def set_learning_rate(optimizer: Any, settings: TrainSection, local_round: LocalRound, step: int, steps: int) -> None:
    """Set the learning rate of a step.

    Args:
        optimizer: of the round.
        settings: of the loop.
        local_round: which part of the run's schedule the round is.
        step: counted from 0.
        steps: of the round.
    """
    position = local_round.schedule_start + (local_round.schedule_stop - local_round.schedule_start) * step / steps
    width = (local_round.schedule_stop - local_round.schedule_start) / steps
    factor = schedule(position, width, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
        if not settings.bias_correction:
            group["lr"] *= uncorrected(optimizer, group)


def uncorrected(optimizer: Any, group: Any) -> float:
    """Return the factor that takes Adam's bias correction off its next step: (1 - beta1^t) / sqrt(1 - beta2^t).

    It begins above 3, and steps are too long until it comes near 1. Source: Kingma and Ba 2015, arXiv:1412.6980,
    section 3, for the correction; Mosbach et al. 2021, arXiv:2006.04884, for what happens without.
    """
    states = [optimizer.state[value] for value in group["params"] if value in optimizer.state]
    done = max((int(state["step"]) for state in states), default=0)
    beta_1, beta_2 = group["betas"]
    return float((1 - beta_1 ** (done + 1)) / math.sqrt(1 - beta_2 ** (done + 1)))


def add_proximal_term(graft: Graft, received: Sequence[Any], mu: float) -> None:
    """Add the gradient of (mu / 2) * ||w - received||^2. No-op if `received` is empty."""
    for value, start in zip(graft.parameters, received, strict=False):
        if value.grad is not None:  # some are not trained in every round
            value.grad.add_(value.detach() - start, alpha=mu)


def check_deadline(local_round: LocalRound, done: int, steps: int, started: float) -> None:
    """Check that the round's time is not up.

    Args:
        local_round: has the deadline.
        done: steps so far.
        steps: of the round.
        started: `time.perf_counter()` at the start of the round.

    Raises:
        TrainingError: `deadline`, the time is up.
    """
    if time.perf_counter() - started > local_round.deadline_s:
        raise TrainingError(f"only {done} of {steps} steps were done in {local_round.deadline_s:g} s", code="deadline")


def check_divergence(losses: Any, factor: float) -> None:
    """Check every few steps that the loss has not risen far above its start.

    Args:
        losses: of all steps so far, shape (steps,).
        factor: the mean of the last few losses may be at most this many times the mean of the first few; 0: no check.

    Raises:
        TrainingError: `diverged`, it has.
    """
    if not factor or len(losses) % WINDOW or len(losses) < 2 * WINDOW:
        return
    first = finite(float(losses[:WINDOW].mean()))
    last = finite(float(losses[-WINDOW:].mean()))
    if last > factor * first:
        raise TrainingError(
            f"the loss has risen from {first:.3g} to {last:.3g}",
            f"at most train.divergence_factor = {factor:g} times its start",
            "lower train.learning_rate",
            code="diverged",
        )


def finite(loss: float) -> float:
    """Return the loss.

    Raises:
        TrainingError: `diverged`, it is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError("the loss is not finite", hint="lower train.learning_rate", code="diverged")
    return loss


def steps_per_round(rows: int, settings: TrainSection) -> int:
    """Return the optimiser steps of a client in one round, given its number of rows."""
    if not settings.local_epochs:
        return settings.local_steps
    batches_of_round = settings.local_epochs * batches_per_epoch(rows, settings)
    return math.ceil(batches_of_round / settings.gradient_accumulation_steps)


def batches_per_round(rows: int, settings: TrainSection) -> int:
    """Return the batches of a client in one round, given its number of rows; each step accumulates some of them."""
    return steps_per_round(rows, settings) * settings.gradient_accumulation_steps


def batches_per_epoch(rows: int, settings: TrainSection) -> int:
    """Return how many batches one pass over the rows takes; the last may be short."""
    return math.ceil(rows / settings.per_device_train_batch_size)


def groups_by_length(task: Task, settings: TrainSection) -> bool:
    """Return whether the local loop batches rows of like length."""
    if settings.group_by_length == "auto":
        return task.pads_rows and not task.compares_rows
    return settings.group_by_length


def grouping_lengths(task: Task, encoded: Encoded, settings: TrainSection) -> Lengths | None:
    """Return the lengths by which rows are batched, shape (rows,), or None if they are batched at random."""
    if not groups_by_length(task, settings):
        return None
    return task.lengths(encoded)


def batches(
    rows: int, settings: TrainSection, local_round: LocalRound, steps: int, lengths: Lengths | None = None
) -> Iterator[list[int]]:
    """Yield row numbers for each batch of the round, without end.

    Rounds continue through the shard: the batches of round 2 follow those of round 1 in the same shuffled pass. So
    every row is seen once before any is seen twice, also if a round is shorter than a pass. Nothing has to be stored
    for that, because the order of a pass follows from the seed, the site, the number of the pass, and the lengths.

    With lengths, the pass is cut into windows of at most `MOST_GROUPED` batches. The rows of a window are sorted by
    length and cut into batches, which are shuffled.

    Args:
        rows: number of rows.
        settings: of the loop.
        local_round: which part of the run this is.
        steps: of the round.
        lengths: of the rows, shape (rows,): those of like length share a batch. None: batches at random.
    """
    per_epoch = batches_per_epoch(rows, settings)
    width = window_batches(rows, settings)
    size = settings.per_device_train_batch_size
    position = (local_round.round_number - 1) * steps * settings.gradient_accumulation_steps
    while True:
        epoch, index = divmod(position, per_epoch)
        order = _pass_order(rows, local_round.seed, local_round.site, epoch)
        while index < per_epoch:
            number, place = divmod(index, width)
            chosen = order[number * width * size : (number + 1) * width * size]
            if lengths is None:
                window = _cut(chosen, size)
            else:
                draw = generator(local_round.seed, "batches-by-length", local_round.site, epoch, number)
                window = _grouped(chosen, size, lengths, draw)
            yield from window[place:]
            position += len(window) - place
            index += len(window) - place


def window_batches(rows: int, settings: TrainSection) -> int:
    """Return the number of batches whose rows are sorted by length together, given the rows of the client."""
    return min(MOST_GROUPED, max(1, batches_per_epoch(rows, settings) // FEWEST_WINDOWS))


def touched_rows(
    rows: int, settings: TrainSection, seed: int, site: str, rounds: int, grouped: bool
) -> npt.NDArray[np.int64]:
    """Return the numbers of the rows that a client's batches may contain in a run, ascending.

    Args:
        rows: number of rows, at least one.
        settings: of the loop.
        seed: of the run.
        site: name of the client.
        rounds: of the run.
        grouped: whether rows are batched by length. Then all rows of a window are touched, because their lengths
            decide which of them come first.
    """
    batches_of_run = rounds * steps_per_round(rows, settings) * settings.gradient_accumulation_steps
    if grouped:
        width = window_batches(rows, settings)
        batches_of_run = math.ceil(batches_of_run / width) * width
    if batches_of_run >= batches_per_epoch(rows, settings):
        return np.arange(rows)
    first = _pass_order(rows, seed, site, 0)[: batches_of_run * settings.per_device_train_batch_size]
    return np.sort(first)


def _grouped(order: npt.NDArray[np.int64], size: int, lengths: Lengths, draw: np.random.Generator) -> list[list[int]]:
    """Return batches of rows of like length."""
    # Stable, so that rows of equal length keep their random order.
    found = _cut(order[np.argsort(lengths[order], kind="stable")], size)
    # Unshuffled, training would see short rows first.
    return [found[batch] for batch in draw.permutation(len(found))]


def _cut(order: npt.NDArray[np.int64], size: int) -> list[list[int]]:
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


def _pass_order(rows: int, seed: int, site: str, epoch: int) -> npt.NDArray[np.int64]:
    """Return the row numbers of a client in the order of one pass, shape (rows,)."""
    return generator(seed, "batches", site, epoch).permutation(rows)


def schedule(position: float, width: float, settings: TrainSection) -> float:
    """Return the factor on the learning rate for a step that takes the run from `position` to `position + width`.

    Warm-up counts the step itself, so that the first step trains; decay does not, so that the last step trains too.

    Args:
        position: share of the whole run's training done before the step, in [0, 1).
        width: share of the run that the step takes.
        settings: lr_schedule and warmup_ratio.
    """
    warmup = settings.warmup_ratio
    if position < warmup:
        return min(1.0, (position + width) / warmup)
    left = (1.0 - position) / (1.0 - warmup)
    if settings.lr_schedule == "linear":
        return left
    if settings.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return 1.0


def make_optimizer(graft: Graft, settings: TrainSection) -> Any:
    """Return a fresh optimiser; weight decay spares biases and norms (all one-dimensional parameters)."""
    values = zip(graft.spec.tensors, graft.parameters, strict=True)
    return optimizer_over([(tensor.part == "head", value.ndim > 1, value) for tensor, value in values], settings)


def optimizer_over(values: Sequence[tuple[bool, bool, Any]], settings: TrainSection) -> Any:
    """Return a fresh optimiser, with a group of parameters for each rate and weight decay.

    `peak` of a group is its learning rate before the schedule.

    Args:
        values: whether a parameter is the head's, whether weight decay applies to it, and the parameter.
        settings: of the loop.
    """
    import torch

    groups = []
    for of_head, rate in ((False, settings.rate), (True, settings.head_rate)):
        for decays, decay in ((True, settings.weight_decay), (False, 0.0)):
            chosen = [value for is_head, has_decay, value in values if (is_head, has_decay) == (of_head, decays)]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "lr": rate, "peak": rate})
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    return torch.optim.AdamW(groups)
