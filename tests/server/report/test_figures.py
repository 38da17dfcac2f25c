"""The figures: one inline SVG each, with ids of their own."""

import re

from tsugiki.server.report.figures import plot_comparison, small_curves


def test_the_comparison_is_one_inline_figure():
    """Catches: an XML prologue inside a page, and equal labels for different figures."""
    svg = plot_comparison({"untouched base": 0.5, "federated": 0.8}, "accuracy")
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert "<metadata" not in svg
    assert all(text in svg for text in ("untouched base", "federated", "0.8", "accuracy"))


def test_figures_with_the_same_shapes_have_different_ids():
    """Catches: one prefix for all figures."""
    one, other = (small_curves({name: {0: 1.0, 1: 2.0}}) for name in ("recall", "loss"))
    assert re.findall(r'id="([^"]+)"', one)
    assert not set(re.findall(r'id="([^"]+)"', one)) & set(re.findall(r'id="([^"]+)"', other))
