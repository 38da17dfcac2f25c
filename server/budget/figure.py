"""The privacy budget as a figure: the signal-to-noise bound over clients, and epsilon over rounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsugiki.common.plots import BLUE, GREEN, GREY, ORANGE, RED, Format, new_figure, plain_numbers, render, style
from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.mechanisms import Adversary
from tsugiki.common.privacy.plan import Plan
from tsugiki.server.budget.alternatives import as_private_as, everything_seen, noise_on_mean, without_slack

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tsugiki.server.budget.budget import Budget

Points = dict[int, float]

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Different dashes keep lines visible that cover each other."""

_MODES = {"central": (BLUE, _DASHES[0]), "distributed": (ORANGE, _DASHES[1]), "local": (GREEN, _DASHES[0])}
_VIEWS: dict[Adversary, tuple[str, str]] = {
    "release": (BLUE, "models"),
    "outsiders": (GREEN, "models, to outsiders"),
    "sums": (ORANGE, "server, secure aggregation"),
    "uploads": (RED, "server, each upload"),
}
_POINTS = 25
_SAMPLED_POINTS = 8  # an epsilon under sampling takes a tenth of a second


def draw(budget: Budget, format_: Format) -> bytes:
    """Return a figure as bytes: the bound over the number of clients, and epsilon over the number of rounds."""
    with style():
        figure = new_figure(width_in=9.2, height_in=4.4)
        left, right = figure.subplots(1, 2)
        _draw_bounds(left, budget)
        _draw_epsilons(right, budget)
        return render(figure, format_)


def bounds(budget: Budget) -> dict[str, Points]:
    """Return the signal-to-noise bound for each mode and number of clients, if all clients take part."""
    found: dict[str, Points] = {}
    most = max(10_000, 4 * budget.clients)
    for row in budget.table:
        if row.clients == budget.clients and row.noise_multiplier is not None:
            plan = replace(budget.base, noise_multiplier=row.noise_multiplier)
            # Each curve is as private as the table's row for the run's own clients.
            own = without_slack(plan, row.mode, row.clients)
            counts = _geometric(min(10, budget.clients), most, _POINTS)
            plans = {n: as_private_as(own, without_slack(plan, row.mode, n)) for n in counts}
            found[row.mode] = {n: noise_on_mean(other, n).bound for n, other in plans.items() if other is not None}
    return found


def epsilons(plan: Plan) -> dict[Adversary, Points]:
    """Return the epsilon for each adversary and number of rounds, if the plan has noise against the adversary."""
    points = _SAMPLED_POINTS if plan.sampling_probability < 1 else _POINTS
    rounds = {*_geometric(1, max(10, 2 * plan.rounds), points), plan.rounds}
    found: dict[Adversary, Points] = {}
    for adversary, release in everything_seen(plan).items():
        if release.noise_multiplier > 0:
            found[adversary] = {count: epsilon({release: count}, plan.delta) for count in sorted(rounds)}
    return found


def _geometric(first: int, last: int, points: int) -> list[int]:
    """Return whole numbers from first to last at equal ratios, without repetitions."""
    ratio = (last / first) ** (1 / (points - 1))
    return list(dict.fromkeys(round(first * ratio**index) for index in range(points)))


def _draw_bounds(axes: Axes, budget: Budget) -> None:
    for mode, points in bounds(budget).items():
        colour, dashes = _MODES.get(mode, (GREY, "-"))
        axes.plot(list(points), list(points.values()), color=colour, linestyle=dashes, label=mode)
    axes.axhline(1.0, color=GREY, linestyle=":", label="noise as long as the longest mean")
    if budget.assessment is None:  # the run has no plan of its own whose bound could be marked
        label = f"this run: n = {budget.clients:,}"
        axes.axvline(budget.clients, color=GREY, linestyle="-.", linewidth=1.2, label=label)
    elif math.isfinite(bound := budget.assessment.noise[-1].bound):
        label = f"this plan: n = {budget.clients:,}, {bound:.3g}"
        axes.plot([budget.clients], [bound], "*", color=RED, markersize=12, linestyle="none", label=label, zorder=4)
    title = f"epsilon {budget.target_epsilon:.4g}, {budget.base.rounds:,} rounds, {budget.size.total:,} parameters"
    axes.set_title(title, loc="left", fontsize=10)
    _finish(axes, "clients in a round (n)", "signal / noise, at most")


def _draw_epsilons(axes: Axes, budget: Budget) -> None:
    plan = _shown(budget)
    for (adversary, points), dashes in zip(epsilons(plan).items(), _DASHES, strict=False):
        colour, label = _VIEWS[adversary]
        axes.plot(list(points), list(points.values()), color=colour, linestyle=dashes, label=label)
    # An infinite epsilon has no curve: the legend alone mentions it.
    for adversary, release in everything_seen(plan).items():
        if release.noise_multiplier <= 0:
            axes.plot([], [], linestyle="none", label=f"{_VIEWS[adversary][1]}: no limit")
    axes.axhline(budget.target_epsilon, color=GREY, linestyle=":", label=f"epsilon {budget.target_epsilon:.4g}")
    axes.axvline(plan.rounds, color=GREY, linestyle="-.", linewidth=1.2, label=f"this run: T = {plan.rounds:,}")
    title = f"mode {plan.mode}, z = {plan.noise_multiplier:g}, delta = {plan.delta:g}"
    axes.set_title(title, loc="left", fontsize=10)
    _finish(axes, "rounds (T)", "epsilon after T rounds")


def _shown(budget: Budget) -> Plan:
    """Return the run's plan or, if that has no noise, the table's plan in mode distributed."""
    if budget.assessment is not None and budget.base.noise_multiplier > 0:
        return budget.assessment.plan
    for row in budget.table:
        if row.mode == "distributed" and row.clients == budget.clients and row.noise_multiplier is not None:
            plan = without_slack(budget.base, row.mode, row.clients)
            return replace(plan, noise_multiplier=row.noise_multiplier)
    return budget.base


def _finish(axes: Axes, horizontal: str, vertical: str) -> None:
    """Make both axes logarithmic, and put the legend below."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2, borderaxespad=0)
