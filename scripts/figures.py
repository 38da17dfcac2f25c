"""Report the results of benchmarks and studies: a readable table, then one JSON object for each figure."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from statistics import mean, median, quantiles, stdev


@dataclass(frozen=True)
class Figure:
    """One measured number, with its target if it has one.

    Args:
        name: what was measured.
        value: the number.
        unit: of the value; "ratio" for ratios.
        target: as text, such as "<= 0.5"; empty for none.
        note: spread, seeds, or anything else a reader needs.
    """

    name: str
    value: float
    unit: str = ""
    target: str = ""
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None if there is no target."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def show(title: str, figures: list[Figure]) -> None:
    """Print figures as a table, then as JSON lines."""
    print(f"\n{title} ({platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()})\n")
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        verdict = {True: "holds", False: "MISSED", None: ""}[figure.holds]
        measured = f"{figure.value:>12.4f} {figure.unit:<10} {figure.target:<10}"
        print(f"{figure.name:<{width}}  {measured} {verdict:<7} {figure.note}")
    print()
    for figure in figures:
        print(json.dumps({**asdict(figure), "holds": figure.holds}))


def spread(values: list[float]) -> str:
    """Return the first and third quartile and the number of values, as text."""
    low, _, high = quantiles(values, n=4)
    return f"quartiles {low:.4f} to {high:.4f}, n = {len(values)}"


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % confidence interval (Student's t), NaN for a single value."""
    from scipy.stats import t

    centre = mean(values)
    if len(values) < 2:
        return centre, math.nan, math.nan
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


__all__ = ["Figure", "interval", "mean", "median", "show", "spread"]
