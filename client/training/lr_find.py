"""Find a learning rate: train a few steps while it grows, suggest a rate, and try it in a short federation.

Source of the range test: Smith 2017, arXiv:1506.01186, section 3.3. The loss keeps falling for a while at rates at
which longer training collapses, and its smoothing lags behind. So the suggestion is well below the rate of the least
loss, and a short run of the federation itself has to confirm it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsugiki.client.site.simulated import SimulatedSite, simulated_sites
from tsugiki.client.training.trainer import LocalRound, batches, grouping_lengths, make_optimizer, uncorrected
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TrainingError, UsageError
from tsugiki.common.files import write_atomically
from tsugiki.common.model.device import computing
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.model.rates import with_rates
from tsugiki.common.model.start import started
from tsugiki.common.plots import BLUE, LIGHT_GREY, RED, new_figure, plain_numbers, plot_format, render, style
from tsugiki.common.rng import derive_seed, seed_everything
from tsugiki.common.settings import HeadedSettings
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Encoded

SMOOTHING = 0.9
"""Weight of the smoothed loss so far in the next one."""
GIVE_UP = 4.0
"""Stop once the smoothed loss is this many times the least one: training has diverged, higher rates show nothing."""
FEWEST = 10
"""Steps that are taken before anything is concluded."""
BELOW_LEAST = 5.0
"""The rate of the least smoothed loss is this many times the suggestion: between 3, which is bold, and 10."""
HIGHEST = {"adamw": 1.0, "sgd": 10.0}
"""The last rate of a range test by optimizer."""
STEP_DOWN = 3.0
"""A suggestion that fails in the federation is divided by this."""
TRIALS = 4
"""Most rates that are tried in the federation."""
TRIAL_ROUNDS = 3
TRIAL_STEPS = 20
"""Rounds of a trial, and most local steps in each of them."""
LEAST_FALL = 0.02
"""A loss that falls by a smaller share than this has not fallen: batches differ by more."""
_UNTRAINED = 1e-12
"""A rate that trains nothing, for the loss before training."""

TrainingLosses = Callable[[RunConfig], list[float]]
"""Runs a simulated federation; returns the mean training loss of each round. Fewer than its rounds: it diverged."""


@dataclass(frozen=True)
class Sweep:
    """The outcome of a range test.

    Args:
        rates: learning rates, growing by one factor, shape (steps,).
        losses: of each step's batch.
        smoothed: their exponential mean, with its bias at the start corrected.
        suggestion: a fifth of `least`; NaN if the curve is flat.
        least: the rate at which the smoothed loss is least.
        seconds: duration of the test.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float
    least: float
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A short run of the federation at one rate.

    Args:
        rate: the peak learning rate.
        before: mean training loss of the sites before anything is trained.
        losses: of each round, as means over the sites; fewer than `TRIAL_ROUNDS` if training diverged.
    """

    rate: float
    before: float
    losses: list[float]

    @property
    def fall(self) -> float:
        """By what share the loss fell until the last round; below 0: it rose; minus infinity: training diverged."""
        if len(self.losses) < TRIAL_ROUNDS:
            return -math.inf
        return (self.before - self.losses[-1]) / self.before

    @property
    def fell(self) -> bool:
        """Whether the loss fell clearly, and did not come back up by half of its fall."""
        if self.fall < LEAST_FALL:
            return False
        least = min(self.losses)
        return self.losses[-1] - least <= 0.5 * (self.before - least)


def find_rate(
    config: RunConfig, lowest: float, highest: float, steps: int, central: bool, watch: Callable[[int], None]
) -> Sweep:
    """Try growing learning rates on the first simulated site, or on all rows in one place.

    Args:
        config: the run. Optimiser, batch size and clipping of [train] are used; gradients are not accumulated, and
            the proximal term and DP-SGD are left out.
        lowest: the first rate.
        highest: the last rate.
        steps: most steps of the test.
        central: train on all rows of the simulation's file.
        watch: called after each step with the number of steps done.

    Raises:
        UsageError: the range is empty, or the task's loss does not show progress.
        ConfigError: the run has no file of rows.
        DataError, ModelError: rows or model cannot be loaded.
        TrainingError: `diverged`, the loss is not finite from the start.
    """
    if not 0 < lowest < highest:
        raise UsageError(
            f"{lowest:g} to {highest:g} is no range of rates", "a range above 0", "`tsugiki lr-find --help`"
        )
    if TASKS.get(config.task.name).signed_loss:
        problem = (
            f"a range test says nothing of {config.task.name}: its loss may be below 0, and varies with what is drawn"
        )
        raise UsageError(problem, "a task whose loss says how far it has come", "short runs with different rates")
    if central:
        config = in_one_place(config)
    config = with_rates(config, config.model.name)  # the test sets rates of its own; the optimiser starts from numbers
    site: SimulatedSite = simulated_sites(config)[0]
    graft = load_graft(config, config.model.name, config.run.seed)
    config, initial = started(config, graft)
    graft.write(initial)
    encoded = graft.task.encode(site.train_shard(graft.task), graft.base)
    rates = [float(rate) for rate in np.geomspace(lowest, highest, steps)]
    try:
        return _sweep(graft, encoded, config, rates, watch)
    finally:
        graft.write(graft.initial)


def in_one_place(config: RunConfig) -> RunConfig:
    """Return the run of one site with all rows, without privacy: training in one place."""
    one_site = {"clients": 1, "clients_per_site": 1, "partition": "iid", "column": "", "ranks": []}
    changes = {f"simulation.{key}": value for key, value in one_site.items()}
    return changed(config, {"strategy": {"min_clients": 1}, "privacy": {}, **changes})


def try_rates(
    config: RunConfig, suggestion: float, training_losses: TrainingLosses, watch: Callable[[int], None]
) -> list[Trial]:
    """Try a rate in a short run of the federation, and lower ones until the loss falls; at most `TRIALS` rates.

    Args:
        config: the run. Its sites, strategy, optimiser and warm-up are used; the rate stays at its peak after the
            warm-up, as it nearly does in the first rounds of a long run. Privacy and evaluation are left out.
        suggestion: the first rate.
        training_losses: runs a federation.
        watch: called after each run with the number of runs done, the one without training included.

    Returns:
        The trials in order. The last one is the first whose loss fell, if any did.

    Raises:
        TrainingError: `diverged`, there is no loss before training.
        TsugikiError: the federation cannot start.
    """
    short = _short(config)
    untrained = training_losses(changed(short, {"run.rounds": 1, **_rates(_UNTRAINED)}))
    if not untrained:
        raise TrainingError("the federation has no loss before training", "replies from enough sites", code="diverged")
    watch(1)
    trials: list[Trial] = []
    while len(trials) < TRIALS and not (trials and trials[-1].fell):
        rate = _round(suggestion / STEP_DOWN ** len(trials))
        losses = training_losses(changed(short, _rates(rate)))
        trials.append(Trial(rate, untrained[0], losses))
        watch(1 + len(trials))
    return trials


def _rates(rate: float) -> dict[str, float]:
    """Return the settings of a trial's rates: adapter and head share one, as in the range test."""
    return {"train.learning_rate": rate, "train.head_learning_rate": rate}


def _short(config: RunConfig) -> RunConfig:
    """Return the federation's run with few rounds and steps, and without what a trial does not need."""
    steps = min(config.train.local_steps, TRIAL_STEPS)
    return changed(
        config,
        {
            "run.rounds": TRIAL_ROUNDS,
            "train.local_steps": steps,
            "train.local_epochs": 0,
            "train.lr_schedule": "constant",
            "train.validate_every_steps": 0,
            "train.local_patience": 0,
            "privacy": {},
            "evaluation": {},
            "simulation.engine": "in-process",
            # The range test starts from a random head. After a linear probe there is often little left to fall.
            **({"task.warm_head": "off"} if isinstance(config.task, HeadedSettings) else {}),
        },
    )


def _round(rate: float) -> float:
    """Return the rate with two digits, as it is printed."""
    return float(f"{rate:.1e}")


def _sweep(
    graft: Graft, encoded: Encoded, config: RunConfig, rates: Sequence[float], watch: Callable[[int], None]
) -> Sweep:
    import torch

    started = time.perf_counter()
    settings = config.train
    seed = config.run.seed
    torch.set_num_threads(settings.threads)
    seed_everything(derive_seed(seed, "lr-find"))
    optimizer = make_optimizer(graft, settings)
    lengths = grouping_lengths(graft.task, encoded, settings)
    stream = batches(len(encoded), settings, LocalRound(seed, "lr-find", 1, 0.0, 1.0), len(rates), lengths)
    losses: list[float] = []
    graft.base.network.train()
    try:
        for step, rate in enumerate(rates, 1):
            for group in optimizer.param_groups:
                group["lr"] = rate
                if not settings.bias_correction:
                    group["lr"] *= uncorrected(optimizer, group)
            # The loss is looked at before the step: at a rate that diverges, none is taken.
            with computing(settings, graft.device.type):
                batch = graft.task.batch(encoded, next(stream), graft.base)
                batch = {name: value.to(graft.device) for name, value in batch.items()}
                loss = graft.task.loss(graft.base.network, batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]) or _over(smooth(losses)):
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(graft.parameters, settings.max_grad_norm)
            optimizer.step()
            watch(step)
    finally:
        graft.base.network.eval()
    # The last loss may be infinite: it ended the test, and has no place on a curve.
    kept = [loss for loss in losses if math.isfinite(loss)]
    if len(kept) < FEWEST:
        raise TrainingError(
            f"the loss was finite for {len(kept)} steps only", f"{FEWEST} or more", "lower --lowest", code="diverged"
        )
    smoothed = smooth(kept)
    suggestion, least = suggest(rates[: len(kept)], kept)
    return Sweep(list(rates[: len(kept)]), kept, smoothed, suggestion, least, time.perf_counter() - started)


def _over(smoothed: Sequence[float]) -> bool:
    return len(smoothed) > FEWEST and smoothed[-1] > GIVE_UP * min(smoothed)


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean of the losses at each step, with its bias towards the start at 0 corrected."""
    mean = 0.0
    found = []
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**step))
    return found


def suggest(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Return the suggested rate, and the rate of the least smoothed loss.

    The suggestion is NaN if the curve is flat: its least value is not clearly below the loss of the first steps, whose
    rates are so small that they differ by chance only.

    Args:
        rates: growing.
        losses: of each step, not smoothed; at least `FEWEST`.
    """
    smoothed = smooth(losses)
    skipped = FEWEST // 2  # the mean of a few losses is mostly chance
    least = skipped + int(np.argmin(smoothed[skipped:]))
    start = float(np.mean(losses[:FEWEST]))
    # Batches differ: the deviation is taken from steps that follow each other, between which the rate hardly grows.
    deviation = float(np.std(np.diff(losses[: max(least, FEWEST)]))) / math.sqrt(2)
    # The variances of the first steps' mean and of an exponential mean, as shares of that of single losses.
    chance = 3 * deviation * math.sqrt(1 / FEWEST + (1 - SMOOTHING) / (1 + SMOOTHING))
    if start - smoothed[least] < max(chance, LEAST_FALL * abs(start)):
        return math.nan, rates[least]
    return max(rates[0], _round(rates[least] / BELOW_LEAST)), rates[least]


def draw(sweep: Sweep, path: Path, taken: float = math.nan) -> None:
    """Write a figure of the losses over the rates, up to where they have come back to their start.

    Args:
        sweep: a range test.
        path: of the file; its name ends in .svg or .png.
        taken: the rate that the federation confirmed; NaN: none, so the suggestion is drawn.

    Raises:
        UsageError: the name has another ending.
        StorageError: `disk-full` or `not-writable`.
    """
    rate = taken if math.isfinite(taken) else sweep.suggestion
    low, high = _loss_range(sweep)
    with style():
        figure = new_figure(width_in=6.4, height_in=3.6)
        axes = figure.add_subplot()
        axes.plot(sweep.rates, sweep.losses, color=LIGHT_GREY, linewidth=0.8, label="each step")
        axes.plot(sweep.rates, sweep.smoothed, color=BLUE, label="smoothed")
        if math.isfinite(rate):
            axes.axvline(rate, color=RED, linestyle="--", label=f"suggestion: {rate:.2g}")
        axes.set_xscale("log")
        axes.set_xlim(sweep.rates[0], _last_shown(sweep, high))
        axes.set_ylim(low, high)
        plain_numbers(axes.xaxis)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend()
        content = render(figure, plot_format(path))
    write_atomically(path, content)


def _loss_range(sweep: Sweep) -> tuple[float, float]:
    """Return the losses between which the fall is: from below the least to above the start."""
    start = float(np.mean(sweep.losses[:FEWEST]))
    least = min(sweep.smoothed)
    fall = max(start - least, LEAST_FALL * abs(start))
    return least - 0.3 * fall, start + 0.5 * fall


def _last_shown(sweep: Sweep, high: float) -> float:
    """Return the rate at which the smoothed loss leaves the figure after its least value; the last one if it stays."""
    above = [rate for rate, loss in zip(sweep.rates, sweep.smoothed, strict=True) if loss > high and rate > sweep.least]
    return above[0] if above else sweep.rates[-1]
