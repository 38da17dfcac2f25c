"""What a run would do, before it is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tsugiki.common.errors import UsageError
from tsugiki.common.files import write_atomically
from tsugiki.server.budget.budget import Size, make_budget, measure, read


def budget(file: Path, overrides: Sequence[str], dimension: int, plot: Path | None, as_json: bool) -> None:
    """Print what a run's privacy plan costs and what others would; train nothing.

    Args:
        file: the run's.
        overrides: of its settings.
        dimension: number of parameters of an update; 0: the base model is loaded to find out.
        plot: where a figure is written; None: nowhere.
        as_json: one JSON object instead of tables.
    """
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {plot} is no picture", "a name that ends in .png or .svg")
    config, mode, assumed = read(file, overrides)
    found = make_budget(config, Size(dimension) if dimension else measure(config), mode, assumed)
    if plot is not None:
        from tsugiki.server.budget.figure import draw

        write_atomically(plot, draw(found, plot.suffix.lower()[1:]))
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=1) + "\n")
    else:
        from tsugiki.server.budget.text import show

        show(found, file, plot)
