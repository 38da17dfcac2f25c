from pathlib import Path

import matplotlib
import pytest

from tsugiki.common.errors import UsageError
from tsugiki.common.plots import new_figure, plot_format, render, short_label, style


@pytest.mark.parametrize(
    ("name", "expected"), [("a.svg", "svg"), ("a.SVG", "svg"), ("a.png", "png"), ("a.b.Png", "png")]
)
def test_the_name_of_a_file_gives_its_format(name, expected):
    """Catches: an ending in capitals that one command accepts and another refuses."""
    assert plot_format(Path(name)) == expected


@pytest.mark.parametrize("name", ["a.gif", "a", "svg", ".png", "a.svg.gz"])
def test_another_ending_is_refused(name):
    """Catches: an ending that matplotlib fails on after the work; a PDF written under the name of a picture."""
    with pytest.raises(UsageError, match=f"--plot {name}"):
        plot_format(Path(name))


def drawn(format_, name="line"):
    """Return a small figure with a clip path, whose id matplotlib makes up."""
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        axes.plot([1, 2], [1, 2], label=name)
        axes.legend()
        return render(figure, format_)


@pytest.mark.parametrize(("format_", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_equal_values_give_equal_bytes_whatever_matplotlib_is_set_to(format_, start):
    """Catches: a date, a version or a random id in a figure; one that follows the user's matplotlibrc."""
    first = drawn(format_)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": "other"}):
        assert drawn(format_) == first
        assert matplotlib.rcParams["font.size"] == 30
    assert first.startswith(start)
    assert matplotlib.__version__.encode() not in first


def test_a_name_is_text_not_mathematics_and_not_markup():
    """Catches: a name from elsewhere that breaks the figure, or becomes an element of it."""
    svg = drawn("svg", "<script>$\\broken$").decode()
    assert "&lt;script&gt;$\\broken$" in svg
    assert "<script" not in svg


def test_labels_are_short_and_printable():
    """Catches: a glyph that the font lacks; a name that leaves no room for the curve."""
    assert short_label("a\u202eb\u5200") == "a?b?"
    assert short_label("x" * 28) == "x" * 28
    assert short_label("x" * 29) == "x" * 25 + "..."
