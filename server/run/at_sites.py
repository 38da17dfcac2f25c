"""What sites measure on their own evaluation rows: the mean over them, the worst of them, and how rounds compare.

Sites come and go, and each has rows of its own: a mean over other sites is another quantity. So two rounds are compared
over the sites that evaluated both, with the same weights, and a round is never best because a bad site was absent. If
fewer than half of the sites that evaluated the best round evaluated the other one too, the two are not compared: the
best round stays, and early stopping does not count the other. Round 0 alone gives way to such a round: it is untrained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tsugiki.common.config.run import SITES
from tsugiki.server.run.resume import comparable

Line = Mapping[str, Any]
"""A round's line in metrics.jsonl. Its `sites_eval` has the metrics and `rows` of each site."""


def values_of(line: Line, metric: str) -> dict[str, float]:
    """Return a metric of each site that sent it, by site name."""
    return {site: found[metric] for site, found in line.get("sites_eval", {}).items() if found.get(metric) is not None}


def in_common(now: Collection[str], best: Collection[str]) -> list[str]:
    """Return the sites over which a round is compared with the best one; empty if these are too few.

    Args:
        now: the sites that evaluated the round.
        best: those that evaluated the best round so far.
    """
    common = sorted(set(now) & set(best))
    return common if 2 * len(common) >= len(best) else []


def mean(values: Mapping[str, float], weights: Mapping[str, float], sites: Collection[str] | None = None) -> float:
    """Return the weighted mean over sites.

    Args:
        values: by site; at least one.
        weights: of the sites, above 0.
        sites: those to take, of `values`; None: all.
    """
    taken = values if sites is None else sites
    total = math.fsum(weights[site] for site in taken)
    return math.fsum(values[site] * weights[site] for site in taken) / total


def weights_in(line: Line) -> dict[str, float]:
    """Return the weight of each site that evaluated a round; a line of an earlier version has their rows alone."""
    weights: dict[str, float] | None = line.get("sites_eval_weights")
    if weights is not None:
        return dict(weights)
    return {site: found["rows"] for site, found in line.get("sites_eval", {}).items()}


def means_of(
    line: Line, sites: Collection[str] | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the mean of each metric over the sites that sent it, by its name.

    Args:
        line: of the round.
        sites: over which alone the means are; None: over all.
        weights: of the sites; None: those of the line.
    """
    weights = weights_in(line) if weights is None else weights
    names = dict.fromkeys(name for found in line.get("sites_eval", {}).values() for name in found if name != "rows")
    means = {}
    for name in names:
        values = values_of(line, name)
        having = [site for site in values if sites is None or site in sites]
        if having:
            means[name] = mean(values, weights, having)
    return means


def worst(values: Mapping[str, float], lower_is_better: bool) -> str:
    """Return the site with the worst value of a metric; of several, the first by name.

    Args:
        values: by site; at least one.
        lower_is_better: whether the largest value is the worst.
    """
    return (max if lower_is_better else min)(sorted(values), key=values.__getitem__)


def summed_up(line: Line, metric: str, lower_is_better: bool) -> dict[str, Any]:
    """Return for a round's line the mean of each metric, `sites_mean`, and the worst site, `sites_worst`.

    Args:
        line: with its `sites_eval`.
        metric: of which the worst site is named, if any site sent it.
        lower_is_better: whether the largest value of it is the worst.
    """
    values = values_of(line, metric)
    means = means_of(line)
    found: dict[str, Any] = {"sites_mean": means} if means else {}
    if values:
        site = worst(values, lower_is_better)
        found["sites_worst"] = {"site": site, "metric": metric, "value": values[site]}
    return found


def compared_with(best: Mapping[str, float], best_round: int, line: Line, metric: str) -> dict[str, Any]:
    """Return for a round's line over which sites it is compared with the best round, `sites_compared`.

    It has the best round as `round`, the names as `sites`, none if they are too few to compare, and the number of sites
    that evaluated the best round as `of`. Nothing is returned if the same sites evaluated both.

    Args:
        best: the metric of the best round, by site; empty: there is none yet.
        best_round: its number.
        line: of the round, with its `sites_eval`.
        metric: its name.
    """
    now = values_of(line, metric)
    if not best or now.keys() == best.keys():
        return {}
    return {"sites_compared": {"round": best_round, "sites": in_common(now, best), "of": len(best)}}


def results(lines: Sequence[Line], best_round: int, metric: str, lower_is_better: bool) -> dict[str, Any]:
    """Return what was evaluated before training and of the best adapter, for summary.json.

    `before`, of the round `before_round`, and `after` have the metrics on the operator's rows by name, and means over
    sites under the same names with `sites_` before them. These means are over the sites that evaluated both rounds, if
    there are any, with their weights in the best round. `at_sites` has the names of these sites as `compared`, those of
    all that evaluated the best adapter as `evaluated`, and the worst of them.

    Args:
        lines: of the run's rounds, without voided attempts.
        best_round: the round that left the best adapter.
        metric: of which the worst site is named.
        lower_is_better: whether the largest value of it is the worst.
    """
    measured = [line for line in comparable(lines) if "eval" in line or line.get("sites_eval")]
    best = next((line for line in measured if line["round"] == best_round), {})
    first = measured[0] if measured else {}
    found = {
        "before": first.get("eval"),
        "before_round": first.get("round"),
        "after": best.get("eval"),
        "at_sites": None,
    }
    if not best.get("sites_eval"):
        return found
    compared = sorted(first.get("sites_eval", {}).keys() & best["sites_eval"].keys())
    before = means_of(first, compared, weights_in(best)) if compared else {}
    after = means_of(best, compared or None)
    if before:
        found["before"] = (found["before"] or {}) | _named(before)
    found["after"] = (found["after"] or {}) | _named(after)
    found["at_sites"] = {
        "compared": compared,
        "evaluated": sorted(best["sites_eval"]),
        "worst": summed_up(best, metric, lower_is_better).get("sites_worst"),
    }
    return found


def _named(means: Mapping[str, float]) -> dict[str, float]:
    """Return the means under the names that they have beside metrics of other rows."""
    return {f"{SITES}{name}": value for name, value in means.items()}
