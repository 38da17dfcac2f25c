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
from tsugiki.common.model.graft import Graft
from tsugiki.common.rng import derive_seed, generator, seed_everything
from tsugiki.common.tasks.base import Encoded


@dataclass(frozen=True)
class Plan:
    """What one site does in one round.

    Args:
        seed: the run's.
        site: the site's name; its batches follow from seed, name and position in the run.
        round: counted from 1.
        schedule_start: share of the whole run's training done before, in [0, 1).
        schedule_stop: the same after, in (0, 1].
        proximal_mu: weight of FedProx's term.
        deadline_s: give up after so many seconds.
        moments: the optimiser's state, taken up and left here; None: it begins anew.
    """

    seed: int
    site: str
    round: int
    schedule_start: float
    schedule_stop: float
    proximal_mu: float = 0.0
    deadline_s: float = math.inf
    moments: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trained:
    """What the loop reports: optimiser steps, mean loss over them, seconds."""

    steps: int
    loss: float
    seconds: float


WINDOW = 8
"""Steps over which a loss is averaged before it is compared: single batches scatter."""

Watch = Callable[[int, int, Any], None]
"""Told after each step: how many are done, of how many, and the losses so far as a tensor, shape (steps,)."""

Ends = Callable[[int, int], bool]
"""Asked after each step whether the round ends here: how many are done, of how many."""


def train(
    graft: Graft,
    encoded: Encoded,
    settings: TrainSection,
    plan: Plan,
    watch: Watch = lambda step, steps, losses: None,
    ends: Ends = lambda step, steps: False,
) -> Trained:
    """Train the graft's parameters in place on one site's rows.

    Args:
        graft: whose parameters are trained.
        encoded: the rows.
        settings: of the loop.
        plan: which part of the run this is.
        watch: sees every step.
        ends: may end the round before all its steps are done.

    Raises:
        TrainingError: `diverged`, the loss is not finite; `deadline`, the time is up.
    """
    import torch

    started = time.perf_counter()
    torch.set_num_threads(settings.threads)
    seed_everything(derive_seed(plan.seed, "train", plan.site, plan.round))
    steps = steps_per_round(len(encoded), settings)
    optimizer = make_optimizer(graft, settings)
    if plan.moments:
        optimizer.load_state_dict(copy.deepcopy(plan.moments))  # else a round that fails would leave its own there
    optimizer.zero_grad(set_to_none=True)  # the graft is shared: a site that failed in mid-step may have left gradients
    received = [value.detach().clone() for value in graft.parameters] if plan.proximal_mu else []
    stream = batches(len(encoded), settings, plan, steps)
    losses = torch.zeros(steps, device=graft.device)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=settings.bf16 and graft.device.type == "cuda")

    graft.base.network.train()
    try:
        for step in range(steps):
            set_learning_rate(optimizer, settings, plan, step, steps)
            for _ in range(settings.gradient_accumulation_steps):
                with autocast:  # some batches hold what the model itself makes of them
                    batch = graft.task.batch(encoded, next(stream), graft.base)
                    batch = {name: tensor.to(graft.device) for name, tensor in batch.items()}
                    loss = graft.task.loss(graft.base.network, batch) / settings.gradient_accumulation_steps
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                losses[step] += loss.detach()
            add_proximal_term(graft, received, plan.proximal_mu)
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(graft.parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch(step + 1, steps, losses)
            check_divergence(losses[: step + 1], settings.divergence_factor)
            check_deadline(plan, step + 1, steps, started)
            if ends(step + 1, steps):
                break
    finally:
        graft.base.network.eval()
    mean = finite(float(losses[: step + 1].mean()))
    if plan.moments is not None:
        plan.moments.update(optimizer.state_dict())
    return Trained(step + 1, mean, time.perf_counter() - started)


def set_learning_rate(optimizer: Any, settings: TrainSection, plan: Plan, step: int, steps: int) -> None:
    """Set the learning rate of a step, counted from 0, of so many in the round."""
    position = plan.schedule_start + (plan.schedule_stop - plan.schedule_start) * step / steps
    width = (plan.schedule_stop - plan.schedule_start) / steps
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * schedule(position, width, settings)
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
    """Add the gradient of (mu / 2) * ||w - received||^2; nothing where no values are given."""
    for value, start in zip(graft.parameters, received, strict=False):
        if value.grad is not None:  # some are not trained in every round
            value.grad.add_(value.detach() - start, alpha=mu)


def check_deadline(plan: Plan, done: int, steps: int, started: float) -> None:
    """Raise a TrainingError, `deadline`, if the time since `time.perf_counter()` was `started` is up."""
    if time.perf_counter() - started > plan.deadline_s:
        raise TrainingError(f"only {done} of {steps} steps were done in {plan.deadline_s:g} s", code="deadline")


def check_divergence(losses: Any, factor: float) -> None:
    """Raise a TrainingError, `diverged`, if the last losses are far above the first; looked at every few steps.

    Args:
        losses: of all steps so far, shape (steps,).
        factor: how many times the mean of the first few may be exceeded by the mean of the last few; 0: any.
    """
    if not factor or len(losses) % WINDOW or len(losses) < 2 * WINDOW:
        return
    first, last = (finite(float(some.mean())) for some in (losses[:WINDOW], losses[-WINDOW:]))
    if last > factor * first:
        raise TrainingError(
            f"the loss has risen from {first:.3g} to {last:.3g}",
            f"at most train.divergence_factor = {factor:g} times its start",
            "lower train.learning_rate",
            code="diverged",
        )


def finite(loss: float) -> float:
    """Return the loss, or raise a TrainingError, `diverged`."""
    if not math.isfinite(loss):
        raise TrainingError("the loss is not finite", do="lower train.learning_rate", code="diverged")
    return loss


def steps_per_round(rows: int, settings: TrainSection) -> int:
    """Return the optimiser steps of a site with so many rows in one round."""
    if not settings.local_epochs:
        return settings.local_steps
    batches_of_round = settings.local_epochs * batches_per_epoch(rows, settings)
    return math.ceil(batches_of_round / settings.gradient_accumulation_steps)


def batches_per_epoch(rows: int, settings: TrainSection) -> int:
    """Return how many batches one pass over the rows takes; the last may be short."""
    return math.ceil(rows / settings.per_device_train_batch_size)


def batches(rows: int, settings: TrainSection, plan: Plan, steps: int) -> Iterator[list[int]]:
    """Yield row numbers for each batch of the round, without end.

    Rounds walk on through the shard: the batches of round 2 follow those of round 1 in the same shuffled pass, so that
    every row is seen once before any is seen twice, also when a round takes less than a pass. Nothing has to be
    remembered for that, because a pass's order follows from seed, site and its number.
    """
    size, per_epoch = settings.per_device_train_batch_size, batches_per_epoch(rows, settings)
    position = (plan.round - 1) * steps * settings.gradient_accumulation_steps
    order: npt.NDArray[np.int64] | None = None
    while True:
        epoch, index = divmod(position, per_epoch)
        if order is None or index == 0:
            order = generator(plan.seed, "batches", plan.site, epoch).permutation(rows)
        yield order[index * size : (index + 1) * size].tolist()
        position += 1


def schedule(position: float, width: float, settings: TrainSection) -> float:
    """Return the factor on the learning rate for a step that takes the run from `position` to `position + width`.

    Warm-up counts the step itself, so that the first one moves; decay does not, so that the last one moves too.

    Args:
        position: share of the whole run's training done before the step, in [0, 1).
        width: share of the run that the step is.
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
    import torch

    groups = [
        {"params": [value for value in graft.parameters if value.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in graft.parameters if value.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)
