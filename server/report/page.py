"""One self-contained page about a run, `report.html`: it has no scripts and loads nothing from elsewhere.

Names, reasons and details come from other machines. This module and `tables.py` turn them into plain data; the
template, `report.html.j2`, escapes each value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import jinja2

from tsugiki.common.config.run import SITES
from tsugiki.common.files import write_atomically
from tsugiki.server.report import figures, tables
from tsugiki.server.report.run_files import (
    Run,
    baseline_curves,
    baseline_metrics,
    bytes_by_round,
    central_curves,
    count_replies,
    curve,
    curves_by_site,
    drawable,
    judged_line,
    mean_curve,
    read_run,
    replies_by_site,
    seconds_by_round,
    worst_site,
)
from tsugiki.server.run.privacy_words import audit_statement, rows_statement, statement

MOST_MAPPED_SITES = 30
MOST_MAPPED_ROUNDS = 60
"""With more sites or rounds, the figure counts replies by round instead of showing each of them."""

MOST_SMALL_CURVES = 8


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Args:
        title: text above the figure.
        svg: the figure as an SVG element, the only markup among the page's data.
        caption: text below the figure.
    """

    title: str
    svg: str
    caption: str


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Equal files give equal bytes.

    Raises:
        StorageError: `run-missing`, the run has not begun; `run-corrupt`, `disk-full` or
            `not-writable`.
    """
    path = folder / "report.html"
    write_atomically(path, page(read_run(folder)).encode("utf-8"))
    return path


def page(run: Run) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = tables.cell_text
    return environment.get_template("report.html.j2").render(
        name=run.name,
        story=tables.story(run),
        privacy=_privacy_words(run),
        figures=[*_metric_figures(run), *_privacy_figures(run), *_round_figures(run), *_site_figures(run)],
        sections=tables.sections(run),
    )


def _baselines(run: Run) -> dict[str, float]:
    """Return the monitored metric of each baseline that has it."""
    values = {name: found.get(run.monitor) for name, found in baseline_metrics(run).items()}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(drawable(value))}


def _metric_figures(run: Run) -> list[Figure]:
    """Return the figures of the central evaluation."""
    drawn = []
    curves = central_curves(run)
    baselines = _baselines(run)
    if run.monitor in curves:
        caption = (
            "Measured by the server on the operator's held-out rows; round 0 is before training. The star is the round "
            "whose adapter was kept as best."
        )
        if baselines:
            caption += (
                " Horizontal lines are the baselines of this run; the centralised one is drawn as a curve, against as "
                "many samples as all sites together."
            )
        # Popped, so that the monitored metric is not drawn again among the others.
        ways = baseline_curves(run, run.monitor)
        svg = figures.metric_curve(run.monitor, curves.pop(run.monitor), run.best_round, baselines, ways)
        drawn.append(Figure(f"{run.monitor}, by which the best round was chosen", svg, caption))
    if run.best_round is not None and baselines:
        rows = tables.compared(run)
        values = {name: found[run.monitor] for name, found in rows.items() if run.monitor in found}
        caption = (
            f"The same {run.monitor}, side by side: the federated adapter at its best round against the baselines."
        )
        drawn.append(Figure("Federated against the baselines", figures.plot_comparison(values, run.monitor), caption))
    if curves:
        shown = dict(list(curves.items())[:MOST_SMALL_CURVES])
        caption = "The other metrics of the same evaluation, each on its own scale."
        if len(curves) > len(shown):
            caption += f" {len(curves) - len(shown)} more are in metrics.jsonl."
        drawn.append(Figure("Other metrics", figures.small_curves(shown), caption))
    return drawn


def _privacy_words(run: Run) -> list[str]:
    words = statement(run.summary.get("privacy", {})) + rows_statement(run.summary.get("rows_privacy", {}))
    return words + audit_statement(run.audit)


def _privacy_figures(run: Run) -> list[Figure]:
    """Return the figure of the epsilon spent by each round, and of the noise in each step."""
    lines = [(line["round"], line["privacy"]) for line in run.completed if line.get("privacy")]
    curves = {
        f"epsilon, {adversary}": curve((round_number, entry["epsilon"].get(adversary)) for round_number, entry in lines)
        for adversary in ("release", "outsiders", "sums", "uploads")
    }
    curves["norm of the mean"] = curve((round_number, entry["mean_norm"]) for round_number, entry in lines)
    curves["norm of its noise"] = curve((round_number, entry["noise_norm"]) for round_number, entry in lines)
    drawn = {name: values for name, values in curves.items() if values}
    if not drawn:
        return []
    caption = (
        "Epsilon of each ledger after each round, by whom it is against, and the length of the noisy mean update "
        "beside that of the noise alone: where the two are alike, a round was mostly noise."
    )
    return [Figure("What privacy cost", figures.small_curves(drawn), caption)]


def _round_figures(run: Run) -> list[Figure]:
    """Return the figures of the training loss, the aggregation error, and the seconds and bytes of each round."""
    drawn = []
    mean = curve((line["round"], line.get("train_loss")) for line in run.completed)
    if mean:
        caption = (
            "The mean loss over each site's local steps, as the sites report it, weighted by their rows. It is a "
            "training loss: it may fall while the curve above does not rise."
        )
        svg = figures.sites_curve("training loss", mean, curves_by_site(run.completed, "accepted", "loss"))
        drawn.append(Figure("Training loss", svg, caption))
    errors = curve((line["round"], line.get("aggregation_error")) for line in run.completed)
    if errors:
        caption = (
            "How far the server's choice of the LoRA factors is from the mean of what the sites have learned, "
            "||mean(B A) - B A|| / ||mean(B A)||. A mean of the factors has one; strategy svd has less, and ffa, "
            "rolora and flora, if strategy.merged_rank suffices, have none but rounding."
        )
        drawn.append(Figure("Aggregation error", figures.small_curves({"aggregation error": errors}), caption))
    cosines = curve((line["round"], line.get("update_cosine")) for line in run.completed)
    if cosines:
        caption = (
            "The mean cosine over all pairs of updates: 1 if all sites move in the same direction, 0 if their "
            "directions have nothing in common. A low one in round 1 is a sign of sites whose data differ."
        )
        drawn.append(Figure("How much the updates agree", figures.small_curves({"mean cosine": cosines}), caption))
    seconds = seconds_by_round(run)
    if seconds:
        caption = (
            "The server's clock. Waiting covers the sites' training and the transfer both ways; in a simulation in one "
            "process the sites train one after another. Voided attempts are counted in their round."
        )
        drawn.append(Figure("Where the time went", figures.stacked("seconds", seconds), caption))
    if run.attempts:
        caption = "Adapters sent to all sites (down) and updates received from them (up). Voided attempts are included."
        svg = figures.stacked("bytes a round", bytes_by_round(run), "B")
        drawn.append(Figure("Bytes exchanged", svg, caption))
    return drawn


def _site_figures(run: Run) -> list[Figure]:
    """Return the figures of the sites' replies, and of the model's quality at each site."""
    drawn = []
    replies = replies_by_site(run)
    rounds = {round_number for states in replies.values() for round_number in states}
    # Many sites or rounds would make the cells too small to see.
    if rounds and len(replies) <= MOST_MAPPED_SITES and len(rounds) <= MOST_MAPPED_ROUNDS:
        caption = (
            "One cell for each request. Rejected: a reply came and the guard refused it, or the site answered with an "
            "error. White: the site was not asked. Of a round that was tried again, the last attempt is shown."
        )
        drawn.append(Figure("Replies by site", figures.reply_map(replies), caption))
    elif rounds:
        caption = (
            "How many sites were asked in each round, and what became of the requests. See the table for each site."
        )
        svg = figures.stacked("sites", count_replies(replies), colours=figures.STATE_COLOURS)
        drawn.append(Figure("Replies by round", svg, caption))
    judged = judged_line(run)
    worst = worst_site(judged["sites_eval"], run.metric, run.lower_is_better) if judged else None
    if judged and worst:
        site, metric, value = worst
        mean = mean_curve(run, metric)
        sites = curves_by_site(run.completed, "sites_eval", metric)
        caption = (
            f"Measured by each site on its own evaluation rows. Worst after round {judged['round']}: {site}, "
            f"{metric} {value:.4g}. A good mean can hide a site that the model does not serve."
        )
        if run.monitor.startswith(SITES):
            caption += (
                f" By this mean the best round, {run.best_round}, was chosen; where other sites evaluated, rounds were "
                "compared over those that evaluated both."
            )
        drawn.append(Figure(f"{metric} at the sites", figures.sites_curve(metric, mean, sites, site), caption))
    return drawn
