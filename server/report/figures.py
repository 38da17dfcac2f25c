"""The report's figures, as SVG elements for an HTML page: equal values give equal text.

Names of sites and metrics come from other machines. Matplotlib escapes them, `common/plots.py` switches its mathematics
markup off, and `short_label` replaces letters that the font may not have.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsugiki.common.plots import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, RED, SKY, new_figure, render, short_label, style
from tsugiki.server.report.run_files import REPLY_STATES, Curve, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYER_COLOURS = (BLUE, ORANGE, GREEN, SKY, RED, GREY)
STATE_COLOURS = dict(zip(REPLY_STATES, (BLUE, RED, "#c9c9c9"), strict=True))

MOST_LINES = 12
"""With more sites, one band replaces the lines of the sites."""

_LEGEND_LETTERS = 60  # that fit into one row of the legend
_MARKED = 40  # with more rounds, markers would hide the line and bars would touch


def metric_curve(metric: str, values: Curve, best_round: int | None, baselines: Mapping[str, float]) -> str:
    """Draw the monitored metric over rounds, its best round, and baselines as horizontal lines.

    Args:
        metric: the metric's name.
        values: by round.
        best_round: the round to mark; None marks no round.
        baselines: values by label.
    """
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        _line(axes, values, color=BLUE, label="federated", zorder=3)
        if best_round in values:
            best = values[best_round]
            label = f"best: round {best_round}, {best:.4g}"
            axes.plot([best_round], [best], "*", color=RED, markersize=12, linestyle="none", label=label, zorder=4)
        for (name, value), colour, dashes in zip(
            baselines.items(), (GREY, ORANGE, GREEN), (":", "-.", "--"), strict=False
        ):
            axes.axhline(value, color=colour, linestyle=dashes, label=f"{short_label(name)}: {value:.4g}")
        axes.set_ylabel(short_label(metric))
        _finish(figure, axes)
        return _element(figure)


def small_curves(curves: Mapping[str, Curve]) -> str:
    """Draw metrics of different scales side by side, two in a row."""
    with style():
        rows = math.ceil(len(curves) / 2)
        figure = new_figure(height_in=0.5 + 1.6 * rows)
        for index, (name, values) in enumerate(curves.items()):
            axes = figure.add_subplot(rows, 2, index + 1)
            _line(axes, values, color=BLUE)
            axes.set_title(short_label(name), loc="left", fontsize=10)
            _rounds_axis(axes, 4)
        return _element(figure)


def sites_curve(label: str, mean: Curve, sites: Mapping[str, Curve], named: str | None = None) -> str:
    """Draw a value over rounds: the mean over sites as a line, the sites as thin lines or, when many, as a band.

    Args:
        label: of the vertical axis.
        mean: by round.
        sites: by round, for each site.
        named: a site with its own line and legend entry.
    """
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        if len(sites) > MOST_LINES:
            _band(axes, sites)
        else:
            for index, values in enumerate(sites.values()):
                _line(axes, values, color=LIGHT_GREY, linewidth=0.9, label="" if index else "each site", markersize=2)
        _line(axes, mean, color=BLUE, label="mean, weighted by rows", zorder=3)
        if named is not None:
            _line(axes, sites[named], color=RED, linewidth=1.4, label=f"worst: {short_label(named)}", zorder=4)
        axes.set_ylabel(short_label(label))
        _finish(figure, axes)
        return _element(figure)


def _band(axes: Axes, sites: Mapping[str, Curve]) -> None:
    """Fill between the 10th and the 90th percentile of the sites."""
    import numpy as np

    by_round: dict[int, list[float]] = {}
    for values in sites.values():
        for number, value in values.items():
            by_round.setdefault(number, []).append(value)
    finite = {number: [v for v in by_round[number] if math.isfinite(v)] for number in sorted(by_round)}
    rounds = [number for number in finite if finite[number]]
    low = [float(np.percentile(finite[number], 10)) for number in rounds]
    high = [float(np.percentile(finite[number], 90)) for number in rounds]
    axes.fill_between(rounds, low, high, color=SKY, alpha=0.35, linewidth=0, label="four in five sites")
    if len(rounds) == 1:  # a band over one round has no width
        axes.vlines(rounds, low, high, color=SKY, linewidth=6, alpha=0.35)


def stacked(label: str, layers: Mapping[str, Curve], unit: str = "", colours: Mapping[str, str] | None = None) -> str:
    """Draw bars over rounds, the layers on top of each other.

    Args:
        label: of the vertical axis.
        layers: a value by round, for each layer; the lowest first.
        unit: of the values; the axis then has prefixes, as in `3 MB`.
        colours: by layer, in place of `LAYER_COLOURS`.
    """
    from matplotlib.ticker import EngFormatter

    numbers = {number for values in layers.values() for number in values}
    rounds = range(min(numbers), max(numbers) + 1)
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        floor = [0.0] * len(rounds)
        for index, (name, values) in enumerate(layers.items()):
            colour = (colours or {}).get(name, LAYER_COLOURS[index % len(LAYER_COLOURS)])
            heights = [values.get(number, 0.0) for number in rounds]
            top = [below + height for below, height in zip(floor, heights, strict=True)]
            if len(rounds) <= _MARKED:
                axes.bar(rounds, heights, bottom=floor, color=colour, width=0.8, label=short_label(name))
            else:  # one outline instead of a thousand bars
                edges = [number - 0.5 for number in (*rounds, rounds[-1] + 1)]
                axes.stairs(top, edges, baseline=floor, fill=True, color=colour, label=short_label(name))
            floor = top
        axes.set_ylabel(label)
        if unit:
            axes.yaxis.set_major_formatter(EngFormatter(unit))
        _finish(figure, axes)
        return _element(figure)


def reply_map(replies: Mapping[str, Mapping[int, str]]) -> str:
    """Draw a cell for each site and round, coloured by the outcome of the request; white: no request."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    with style():
        figure = new_figure(height_in=1.2 + 0.2 * len(replies))
        axes = figure.add_subplot()
        for state, colour in STATE_COLOURS.items():
            cells = [
                Rectangle((number - 0.45, height - 0.42), 0.9, 0.84)
                for height, states in enumerate(replies.values())
                for number in states
                if states[number] == state
            ]
            axes.add_collection(PatchCollection(cells, facecolor=colour, edgecolor="none"))
        rounds = [number for states in replies.values() for number in states]
        axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
        axes.set_ylim(len(replies) - 0.4, -0.6)
        axes.set_yticks(range(len(replies)), [short_label(site) for site in replies])
        axes.grid(visible=False)
        _finish(figure, axes, [Patch(color=colour, label=state) for state, colour in STATE_COLOURS.items()])
        return _element(figure)


def plot_comparison(rows: Mapping[str, float], metric: str) -> str:
    """Draw a bar for each way of training.

    Args:
        rows: values of the metric by label, such as "untouched base"; labels that begin with "federated" are in blue.
        metric: the metric's name.
    """
    with style():
        figure = new_figure(height_in=0.8 + 0.36 * len(rows))
        axes = figure.add_subplot()
        colours = [BLUE if label.startswith("federated") else LIGHT_GREY for label in rows]
        bars = axes.barh(range(len(rows)), [drawable(value) for value in rows.values()], color=colours, height=0.65)
        axes.bar_label(bars, [f"{value:.4g}" for value in rows.values()], padding=3)
        axes.set_yticks(range(len(rows)), [short_label(label) for label in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(short_label(metric))
        return _element(figure)


def _element(figure: Figure) -> str:
    """Return the figure as an SVG element for an HTML page, with ids that no other figure on the page has."""
    svg = render(figure)
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]  # without the XML prologue
    prefix = f"f{hashlib.sha256(svg).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return text.strip()


def _line(axes: Axes, values: Curve, **look: Any) -> None:
    """Draw a value over rounds, with markers while there are few."""
    axes.plot(list(values), list(values.values()), marker="o" if len(values) <= _MARKED else "", **look)


def _finish(figure: Figure, axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Label the rounds and put the legend above the figure, where it hides nothing."""
    _rounds_axis(axes)
    axes.set_xlabel("round")
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(3, max(1, _LEGEND_LETTERS // (longest + 5)))  # 5 letters' room for the sample of the line
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _rounds_axis(axes: Axes, intervals: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=intervals, integer=True, min_n_ticks=1))
