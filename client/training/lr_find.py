"""A range test for the learning rate: train a little while it grows, and see where the loss falls fastest.

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
from tsugiki.client.training.trainer import Plan, batches, make_optimizer, uncorrected
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TrainingError, UsageError
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.rng import derive_seed, seed_everything
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Encoded

SMOOTHING = 0.9
"""Share of the loss so far in the next smoothed one."""
GIVE_UP = 4.0
"""A smoothed loss so many times the least one has diverged: higher rates show nothing more."""
FEWEST = 10
"""Steps before which nothing is judged."""


@dataclass(frozen=True)
class Sweep:
    """What a range test saw.

    Args:
        rates: learning rates, growing by one factor, shape (steps,).
        losses: of each step's batch.
        smoothed: their exponential mean, its start corrected.
        suggestion: the rate at which the smoothed loss falls fastest; NaN where it never falls.
        least: the rate at which the smoothed loss is least.
        seconds: it took.
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
        config: the run. Of [train] optimiser, batch size and clipping are used; gradients are not accumulated, and
            bfloat16, the proximal term and DP-SGD are left out.
        lowest: of the rates.
        highest: of the rates.
        steps: at most.
        central: train on all rows of the simulation's file.
        watch: told after each step how many are done.

    Raises:
        UsageError: the range is empty, or the task's loss tells nothing of it.
        ConfigError: the run has no file of rows.
        DataError, ModelError: rows or model cannot be loaded.
        TrainingError: `diverged`, the loss is not finite from the start.
    """
    if not 0 < lowest < highest:
        raise UsageError(
            f"{lowest:g} to {highest:g} is no range of rates", "a range above 0", "`tsugiki lr-find --help`"
        )
    if TASKS.get(config.task.name).signed_loss:
        what = (
            f"a range test says nothing of {config.task.name}: its loss may be below 0, and varies with what is drawn"
        )
        raise UsageError(what, "a task whose loss says how far it has come", "short runs with different rates")
    if central:
        raw = config.model_dump(mode="json") | {"strategy": {"min_clients": 1}, "privacy": {}}
        raw["simulation"] |= {"clients": 1, "clients_per_site": 1, "partition": "iid", "column": "", "ranks": []}
        config = parse(raw)
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

    started, settings, seed = time.perf_counter(), config.train, config.run.seed
    torch.set_num_threads(settings.threads)
    seed_everything(derive_seed(seed, "lr-find"))
    optimizer = make_optimizer(graft, settings)
    stream = batches(len(encoded), settings, Plan(seed, "lr-find", 1, 0.0, 1.0), len(rates))
    losses: list[float] = []
    graft.base.network.train()
    try:
        for step, rate in enumerate(rates, 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 if settings.bias_correction else uncorrected(optimizer, group))
            batch = graft.task.batch(encoded, next(stream), graft.base)
            loss = graft.task.loss(graft.base.network, {name: value.to(graft.device) for name, value in batch.items()})
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
    """Return the exponential mean of the losses so far, at each step; its bias toward a start at 0 is taken off."""
    mean, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**step))
    return found


def suggest(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Return the rate of steepest descent of the smoothed loss over the logarithm of the rate, and that of its least.

    The first steps, which are mostly chance, and those after the least loss are not looked at.
    """
    least = int(np.argmin(smoothed))
    slopes = np.gradient(np.asarray(smoothed), np.log(np.asarray(rates)))
    looked_at = slopes[FEWEST // 2 : least + 1]
    if not len(looked_at) or looked_at.min() >= 0:
        return math.nan, rates[least]
    return rates[FEWEST // 2 + int(np.argmin(looked_at))], rates[least]


def check_plot(path: Path) -> None:
    """Raise a UsageError if a plot cannot have such a name; the test may take minutes, so this is asked before."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {path} is no picture", "a name that ends in .svg or .png")


def draw(sweep: Sweep, path: Path) -> None:
    """Write the losses over the rates, with the suggestion, as .svg or .png.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(sweep.rates, sweep.losses, color="#c8c8c8", linewidth=0.8, label="each step")
    axes.plot(sweep.rates, sweep.smoothed, color="#1f6fb4", label="smoothed")
    if math.isfinite(sweep.suggestion):
        axes.axvline(sweep.suggestion, color="#a33b3b", linestyle="--", label=f"suggestion: {sweep.suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1 * max(sweep.smoothed[FEWEST // 2 :]))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot write {path}: {why}", "a file in a writable folder", "check the folder") from error
