"""The style of all figures, and their rendering: equal values give equal bytes.

Matplotlib is slow to import, so each function imports it when it is called.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsugiki.common.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, and two shades of grey.
BLUE = "#0072b2"
ORANGE = "#e69f00"
GREEN = "#009e73"
RED = "#d55e00"
SKY = "#56b4e9"
GREY = "#8a8a8a"
LIGHT_GREY = "#b5b5b5"

WIDTH_IN = 4.6
"""Narrow, so that the text stays readable where a telephone shrinks the figure."""

HEIGHT_IN = 3.0

_FEW_DECADES = 500.0
"""A logarithmic axis that spans a smaller factor has labels at 2 and 5, too."""

_STYLE: dict[str, Any] = {
    "figure.figsize": (WIDTH_IN, HEIGHT_IN),
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
    "text.parse_math": False,  # a `$` in a name is a letter, not mathematics
    "svg.fonttype": "none",
    "svg.hashsalt": "tsugiki",  # else the ids in an SVG are random
}

_STAMPS: dict[Format, tuple[str, ...]] = {"svg": ("Creator", "Date", "Format", "Type"), "png": ("Software",)}
"""Metadata that matplotlib writes into a file unless it is switched off; dates and versions would change the bytes."""


def plot_format(path: Path) -> Format:
    """Return the format that the name of a `--plot` file asks for; capitals do not matter.

    Raises:
        UsageError: the name ends in neither .png nor .svg.
    """
    match path.suffix.lower():
        case ".svg":
            return "svg"
        case ".png":
            return "png"
    raise UsageError(f"--plot {path} is no picture", "a name that ends in .png or .svg", "choose another name")


def style() -> AbstractContextManager[None]:
    """Return a context in which neither the user's matplotlibrc nor earlier settings change a figure."""
    from matplotlib import style as matplotlib_style

    context: AbstractContextManager[None] = matplotlib_style.context(["default", _STYLE])
    return context


def new_figure(width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN) -> Figure:
    """Return an empty figure. Matplotlib's global state does not hold it, so nobody has to close it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in))


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers. Call it after drawing, when the axis has its limits.

    Matplotlib's own labels of such an axis are mathematics, which the style switches off.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    subdivisions = (1, 2, 5) if high / low < _FEW_DECADES else (1,)
    axis.set_major_locator(LogLocator(subs=subdivisions))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_locator(NullLocator())


def short_label(text: str) -> str:
    """Return a name that fits into a figure: printable ASCII, at most 28 letters."""
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
    return plain if len(plain) <= 28 else plain[:25] + "..."


def render(figure: Figure, format_: Format = "svg") -> bytes:
    """Return the figure as a file's bytes, without dates and versions. Call it in the context of `style`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format_, dpi=200, metadata=dict.fromkeys(_STAMPS[format_]))
    return buffer.getvalue()
