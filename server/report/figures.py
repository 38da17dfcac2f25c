"""The report's figures: from plain values to SVG, the same bytes for the same values.

Names of sites and metrics come from other machines: matplotlib escapes what it writes, its mathematics markup is
switched off, and what the figures' font may not have is replaced.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsugiki.server.report.run_files import REPLY_STATES, Curve, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8a8a8a", "#56b4e9"
"""Okabe and Ito's colours, told apart by colour-blind readers."""

LAYER_COLOURS = (BLUE, ORANGE, GREEN, SKY, RED, GREY)
STATE_COLOURS = dict(zip(REPLY_STATES, (BLUE, RED, "#c9c9c9"), strict=True))

MOST_LINES = 12
"""With more sites, a band is drawn instead of a line each."""

_LEGEND_LETTERS = 60  # fit beside each other
_WIDTH = 4.6  # inches: narrow, so that the text is not tiny where a telephone shrinks the figure
_MARKED = 40  # with more rounds, markers would hide the line and bars would touch

_STYLE: dict[str, Any] = {
    "figure.figsize": (_WIDTH, 3.0),
    "figure.constrained_layout.use": True,
    "font.size": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#777777",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tsugiki",
}


def metric_curve(
    metric: str, values: Curve, best_round: int | None, baselines: Mapping[str, float], format_: str = "svg"
) -> bytes:
    """Draw the monitored metric over rounds, its best round, and baselines as horizontal lines.

    Args:
        metric: its name.
        values: by round.
        best_round: is marked; None: no round is.
        baselines: values by label.
        format_: `svg` or `png`.
    """
    with _style():
        figure, axes = _figure()
        _line(axes, values, color=BLUE, label="federated", zorder=3)
        if best_round in values:
            best = values[best_round]
            label = f"best: round {best_round}, {best:.4g}"
            axes.plot([best_round], [best], "*", color=RED, markersize=12, linestyle="none", label=label, zorder=4)
        for (name, value), colour, dashes in zip(
            baselines.items(), (GREY, ORANGE, GREEN), (":", "-.", "--"), strict=False
        ):
            axes.axhline(value, color=colour, linestyle=dashes, label=f"{_label(name)}: {value:.4g}")
        axes.set_ylabel(_label(metric))
        _finish(figure, axes)
        return _render(figure, format_)


def small_curves(curves: Mapping[str, Curve]) -> bytes:
    """Draw metrics of different scales side by side, two in a line."""
    from matplotlib.figure import Figure

    with _style():
        lines = math.ceil(len(curves) / 2)
        figure = Figure(figsize=(_WIDTH, 0.5 + 1.6 * lines))
        for index, (name, values) in enumerate(curves.items()):
            axes = figure.add_subplot(lines, 2, index + 1)
            _line(axes, values, color=BLUE)
            axes.set_title(_label(name), loc="left", fontsize=10)
            _rounds_axis(axes, 4)
        return _render(figure)


def sites_curve(label: str, mean: Curve, sites: Mapping[str, Curve], named: str | None = None) -> bytes:
    """Draw a value over rounds: the mean over sites as a line, the sites as thin lines or, when many, as a band.

    Args:
        label: of the vertical axis.
        mean: by round.
        sites: by round, for each site.
        named: a site that gets a line and a legend entry of its own.
    """
    with _style():
        figure, axes = _figure()
        if len(sites) > MOST_LINES:
            _band(axes, sites)
        else:
            for index, values in enumerate(sites.values()):
                _line(axes, values, color="#b5b5b5", linewidth=0.9, label="" if index else "each site", markersize=2)
        _line(axes, mean, color=BLUE, label="mean, weighted by rows", zorder=3)
        if named is not None:
            _line(axes, sites[named], color=RED, linewidth=1.4, label=f"worst: {_label(named)}", zorder=4)
        axes.set_ylabel(_label(label))
        _finish(figure, axes)
        return _render(figure)


def _band(axes: Axes, sites: Mapping[str, Curve]) -> None:
    """Fill between the 10th and the 90th percentile of the sites."""
    import numpy as np

    by_round: dict[int, list[float]] = {}
    for values in sites.values():
        for number, value in values.items():
            by_round.setdefault(number, []).append(value)
    finite = {number: [v for v in by_round[number] if math.isfinite(v)] for number in sorted(by_round)}
    rounds = [number for number in finite if finite[number]]
    low, high = ([float(np.percentile(finite[number], share)) for number in rounds] for share in (10, 90))
    axes.fill_between(rounds, low, high, color=SKY, alpha=0.35, linewidth=0, label="four in five sites")
    if len(rounds) == 1:  # a band over one round has no width
        axes.vlines(rounds, low, high, color=SKY, linewidth=6, alpha=0.35)


def stacked(label: str, layers: Mapping[str, Curve], unit: str = "", colours: Mapping[str, str] | None = None) -> bytes:
    """Draw bars over rounds, the layers on top of each other.

    Args:
        label: of the vertical axis.
        layers: a value by round, for each layer; the lowest first.
        unit: with it, the axis is written with prefixes, as `3 MB`.
        colours: by layer, instead of the usual ones.
    """
    from matplotlib.ticker import EngFormatter

    numbers = {number for values in layers.values() for number in values}
    rounds = range(min(numbers), max(numbers) + 1)
    with _style():
        figure, axes = _figure()
        floor = [0.0] * len(rounds)
        for index, (name, values) in enumerate(layers.items()):
            colour = (colours or {}).get(name, LAYER_COLOURS[index % len(LAYER_COLOURS)])
            heights = [values.get(number, 0.0) for number in rounds]
            top = [below + height for below, height in zip(floor, heights, strict=True)]
            if len(rounds) <= _MARKED:
                axes.bar(rounds, heights, bottom=floor, color=colour, width=0.8, label=_label(name))
            else:  # one outline instead of a thousand bars
                edges = [number - 0.5 for number in (*rounds, rounds[-1] + 1)]
                axes.stairs(top, edges, baseline=floor, fill=True, color=colour, label=_label(name))
            floor = top
        axes.set_ylabel(label)
        if unit:
            axes.yaxis.set_major_formatter(EngFormatter(unit))
        _finish(figure, axes)
        return _render(figure)


def reply_map(replies: Mapping[str, Mapping[int, str]]) -> bytes:
    """Draw a cell for each site and round, coloured by what became of the request; white: not asked."""
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    with _style():
        figure = Figure(figsize=(_WIDTH, 1.2 + 0.2 * len(replies)))
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
        axes.set_yticks(range(len(replies)), [_label(site) for site in replies])
        axes.grid(visible=False)
        _finish(figure, axes, [Patch(color=colour, label=state) for state, colour in STATE_COLOURS.items()])
        return _render(figure)


def plot_comparison(rows: Mapping[str, float], metric: str) -> str:
    """Draw a bar for each way of training, as an SVG to be put into a page.

    Args:
        rows: values of the metric by label, as "untouched base", "federated"; the federated one is emphasised.
        metric: its name.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(_WIDTH, 0.8 + 0.36 * len(rows)))
        axes = figure.add_subplot()
        colours = [BLUE if label.startswith("federated") else "#b5b5b5" for label in rows]
        bars = axes.barh(range(len(rows)), [drawable(value) for value in rows.values()], color=colours, height=0.65)
        axes.bar_label(bars, [f"{value:.4g}" for value in rows.values()], padding=3)
        axes.set_yticks(range(len(rows)), [_label(label) for label in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(_label(metric))
        return inline(_render(figure))


def inline(svg: bytes) -> str:
    """Return an SVG as an element for an HTML page, with ids that no other figure on the page has."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    prefix = f"f{hashlib.sha256(svg).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return text.strip()


def _style() -> Any:
    """Return a context in which neither the user's matplotlibrc nor anything set before changes a figure."""
    from matplotlib import style

    return style.context(["default", _STYLE])


def _figure() -> tuple[Figure, Axes]:
    """Return a figure that no global state knows, so that none has to be closed."""
    from matplotlib.figure import Figure

    figure = Figure()
    return figure, figure.add_subplot()


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


def _label(text: str) -> str:
    """Return a name that fits into a figure: printable ASCII, and not long."""
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
    return plain if len(plain) <= 28 else plain[:25] + "..."


def _render(figure: Figure, format_: str = "svg") -> bytes:
    """Return the figure without anything that differs between two equal runs."""
    buffer = io.BytesIO()
    unstamped = {"svg": ("Creator", "Date", "Format", "Type"), "png": ("Software",)}[format_]
    figure.savefig(buffer, format=format_, dpi=200, metadata=dict.fromkeys(unstamped))
    return buffer.getvalue()
