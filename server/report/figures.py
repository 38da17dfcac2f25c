"""The report's figures, as SVG elements for an HTML page: equal values give equal text.

Names of sites and metrics come from other machines. Matplotlib escapes them, `common/plots.py` switches off its markup
for mathematics, and `short_label` replaces letters that the font may not have.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tsugiki.common.plots import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE, RED, SKY, new_figure, render, short_label, style
from tsugiki.server.report.run_files import REPLY_STATES, Curve, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYER_COLOURS = (BLUE, ORANGE, GREEN, SKY, RED, GREY)
STATE_COLOURS = dict(zip(REPLY_STATES, (BLUE, RED, "#c9c9c9"), strict=True))

MOST_LINES = 12
"""With more sites, one band replaces their lines."""

_LEGEND_LETTERS = 60  # letters that fit into one row of the legend
_MARKED = 40  # most rounds; with more, markers would hide the line and bars would touch


def metric_curve(
    metric: str,
    values: Curve,
    best_round: int | None,
    baselines: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType({}),
) -> str:
    """Draw the monitored metric over rounds and its best round; baselines as curves or horizontal lines.

    Args:
        metric: the metric's name.
        values: the metric by round.
        best_round: the round to mark; None marks no round.
        baselines: values of the metric by label.
        curves: of some of these baselines, by label: pairs of a round and the value after as many samples as all sites
            together have seen by that round.
    """
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        _line(axes, values, color=BLUE, label="federated", zorder=3)
        if best_round in values:
            best = values[best_round]
            label = f"best: round {best_round}, {best:.4g}"
            axes.plot([best_round], [best], "*", color=RED, markersize=12, linestyle="none", label=label, zorder=4)
        looks = ((GREY, ":"), (ORANGE, "-."), (GREEN, "--"), (SKY, (0, (5, 1))))
        for (name, value), (colour, dashes) in zip(baselines.items(), looks, strict=False):
            label = f"{short_label(name)}: {value:.4g}"
            if name in curves:
                rounds, points = zip(*curves[name], strict=True)
                axes.plot(rounds, points, color=colour, linestyle=dashes, label=label)
            else:
                axes.axhline(value, color=colour, linestyle=dashes, label=label)
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
        label: label of the vertical axis.
        mean: the mean by round.
        sites: the value by round, for each site.
        named: a site that gets its own line and legend entry; None for no site.
    """
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        if len(sites) > MOST_LINES:
            _band(axes, sites)
        else:
            label_once = "each site"  # one entry of the legend for all sites
            for values in sites.values():
                _line(axes, values, color=LIGHT_GREY, linewidth=0.9, label=label_once, markersize=2)
                label_once = ""
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
        for round_number, value in values.items():
            if math.isfinite(value):
                by_round.setdefault(round_number, []).append(value)
    rounds = sorted(by_round)
    low = [float(np.percentile(by_round[round_number], 10)) for round_number in rounds]
    high = [float(np.percentile(by_round[round_number], 90)) for round_number in rounds]
    axes.fill_between(rounds, low, high, color=SKY, alpha=0.35, linewidth=0, label="four in five sites")
    if len(rounds) == 1:  # a band over one round has no width
        axes.vlines(rounds, low, high, color=SKY, linewidth=6, alpha=0.35)


def stacked(label: str, layers: Mapping[str, Curve], unit: str = "", colours: Mapping[str, str] | None = None) -> str:
    """Draw bars over rounds, the layers on top of each other.

    Args:
        label: label of the vertical axis.
        layers: a value by round, for each layer; the lowest layer first.
        unit: unit of the values; the axis then has prefixes, as in `3 MB`.
        colours: colours by layer, in place of `LAYER_COLOURS`.
    """
    from matplotlib.ticker import EngFormatter

    drawn = {round_number for values in layers.values() for round_number in values}
    rounds = range(min(drawn), max(drawn) + 1)
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        floor = [0.0] * len(rounds)
        for index, (name, values) in enumerate(layers.items()):
            colour = (colours or {}).get(name, LAYER_COLOURS[index % len(LAYER_COLOURS)])
            heights = [values.get(round_number, 0.0) for round_number in rounds]
            top = [below + height for below, height in zip(floor, heights, strict=True)]
            if len(rounds) <= _MARKED:
                axes.bar(rounds, heights, bottom=floor, color=colour, width=0.8, label=short_label(name))
            else:  # one outline instead of a thousand bars
                edges = [round_number - 0.5 for round_number in (*rounds, rounds[-1] + 1)]
                axes.stairs(top, edges, baseline=floor, fill=True, color=colour, label=short_label(name))
            floor = top
        axes.set_ylabel(label)
        if unit:
            axes.yaxis.set_major_formatter(EngFormatter(unit))
        _finish(figure, axes)
        return _element(figure)


def reply_map(replies: Mapping[str, Mapping[int, str]]) -> str:
    """Draw a cell for each site and round, coloured by the outcome of the request; white if there was no request."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Patch, Rectangle

    with style():
        figure = new_figure(height_in=1.2 + 0.2 * len(replies))
        axes = figure.add_subplot()
        for state, colour in STATE_COLOURS.items():
            # One collection for each state: a patch for each cell would be slow to draw.
            cells = [
                Rectangle((round_number - 0.45, height - 0.42), 0.9, 0.84)
                for height, states in enumerate(replies.values())
                for round_number, found in states.items()
                if found == state
            ]
            axes.add_collection(PatchCollection(cells, facecolor=colour, edgecolor="none"))
        rounds = [round_number for states in replies.values() for round_number in states]
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
        metric: name of the metric.
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
    # Ids must be unique within the page, so each figure gets a prefix of its own.
    prefix = f"f{hashlib.sha256(svg).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return text.strip()


def _line(axes: Axes, values: Curve, **look: Any) -> None:
    """Draw a value over rounds, with markers while there are few."""
    marker = "o" if len(values) <= _MARKED else ""
    axes.plot(list(values), list(values.values()), marker=marker, **look)


def _finish(figure: Figure, axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Label the rounds and put the legend above the figure, where it hides nothing."""
    _rounds_axis(axes)
    axes.set_xlabel("round")
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(3, max(1, _LEGEND_LETTERS // (longest + 5)))  # the sample of the line takes the room of 5 letters
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _rounds_axis(axes: Axes, intervals: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=intervals, integer=True, min_n_ticks=1))
