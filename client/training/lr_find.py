"""A range test for the learning rate: train a few steps while it grows, and find where the loss falls fastest.

Source: Smith 2017, arXiv:1506.01186, section 3.3; the suggestion is the steepest descent of the smoothed loss.
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
from tsugiki.common.plots import BLUE, LIGHT_GREY, RED, new_figure, plain_numbers, plot_format, render, style
from tsugiki.common.rng import derive_seed, seed_everything
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Encoded

SMOOTHING = 0.9
"""Weight of the smoothed loss so far in the next one."""
GIVE_UP = 4.0
"""Stop once the smoothed loss is this many times the least one: training has diverged, higher rates show nothing."""
FEWEST = 10
"""Steps that are taken before anything is concluded."""


@dataclass(frozen=True)
class Sweep:
    """The outcome of a range test.

    Args:
        rates: learning rates, growing by one factor, shape (steps,).
        losses: of each step's batch.
        smoothed: their exponential mean, with its bias at the start corrected.
        suggestion: the rate at which the smoothed loss falls fastest; NaN if it never falls.
        least: the rate at which the smoothed loss is least.
        seconds: duration of the test.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float
    least: float
    seconds: float


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
    # One site with all rows, in a run without privacy, is training in one place.
    if central:
        one_site = {"clients": 1, "clients_per_site": 1, "partition": "iid", "column": "", "ranks": []}
        changes = {f"simulation.{key}": value for key, value in one_site.items()}
        config = changed(config, {"strategy": {"min_clients": 1}, "privacy": {}, **changes})
    config = with_rates(config, config.model.name)  # the test sets rates of its own; the optimiser starts from numbers
    site: SimulatedSite = simulated_sites(config)[0]
    graft = load_graft(config, config.model.name, config.run.seed)
    graft.write(graft.initial)
    encoded = graft.task.encode(site.train_shard(graft.task), graft.base)
    rates = [float(rate) for rate in np.geomspace(lowest, highest, steps)]
    try:
        return _sweep(graft, encoded, config, rates, watch)
    finally:
        graft.write(graft.initial)


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
    suggestion, least = suggest(rates[: len(kept)], smoothed)
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


def suggest(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Return the rate at which the smoothed loss falls fastest, and the rate at which it is least.

    The slope is over the logarithm of the rate. The first steps, which are mostly chance, and the steps after the least
    loss do not count.
    """
    # The slope is over the logarithm, because the rates grow by one factor.
    least = int(np.argmin(smoothed))
    slopes = np.gradient(np.asarray(smoothed), np.log(np.asarray(rates)))
    looked_at = slopes[FEWEST // 2 : least + 1]
    if not len(looked_at) or looked_at.min() >= 0:
        return math.nan, rates[least]
    return rates[FEWEST // 2 + int(np.argmin(looked_at))], rates[least]


def draw(sweep: Sweep, path: Path) -> None:
    """Write a figure of the losses over the rates, with the suggestion.

    Args:
        sweep: a range test.
        path: of the file; its name ends in .svg or .png.

    Raises:
        UsageError: the name has another ending.
        StorageError: `disk-full` or `not-writable`.
    """
    with style():
        figure = new_figure(width_in=6.4, height_in=3.6)
        axes = figure.add_subplot()
        axes.plot(sweep.rates, sweep.losses, color=LIGHT_GREY, linewidth=0.8, label="each step")
        axes.plot(sweep.rates, sweep.smoothed, color=BLUE, label="smoothed")
        if math.isfinite(sweep.suggestion):
            axes.axvline(sweep.suggestion, color=RED, linestyle="--", label=f"suggestion: {sweep.suggestion:.2g}")
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_ylim(0, 1.1 * max(sweep.smoothed[FEWEST // 2 :]))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend()
        content = render(figure, plot_format(path))
    write_atomically(path, content)
