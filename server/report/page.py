"""One self-contained page about a run, `report.html`: no scripts, nothing loaded from elsewhere.

Names, reasons and details come from other machines, so every piece of text is escaped where it enters the page.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from tsugiki.common.errors import UsageError
from tsugiki.common.files import write_atomically
from tsugiki.server.report import figures, tables
from tsugiki.server.report.run_files import (
    Run,
    baseline_metrics,
    bytes_by_round,
    central_curves,
    count_replies,
    curve,
    curves_by_site,
    drawable,
    judged_line,
    read_run,
    replies_by_site,
    seconds_by_round,
    weighted_mean,
    worst_site,
)
from tsugiki.server.run.privacy_words import rows_statement, statement

MOST_MAPPED_SITES, MOST_MAPPED_ROUNDS = 30, 60
"""With more, replies are counted by round instead of shown one by one."""

MOST_SMALL_CURVES = 8

_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--ink:#1c1f23;--soft:#5b636d;--rule:#dadde1;--card:#fff}
@media (prefers-color-scheme:dark){:root{--page:#16191d;--ink:#e6e8ea;--soft:#a2abb5;--rule:#363c43;--card:#1d2126}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:66rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem;padding-top:.9rem;border-top:1px solid var(--rule)}
p{max-width:46rem;margin:.5rem 0}
.lede{font-size:1.1rem}
.figures{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.8rem;min-width:0}
figure h3{font-size:1rem;margin:0 0 .5rem}
figure .plot{background:#fff;border-radius:.3rem;padding:.3rem}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:system-ui,sans-serif!important}
figcaption{color:var(--soft);font-size:.88rem;margin-top:.5rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
td{unicode-bidi:isolate}
th{color:var(--soft);font-weight:600;white-space:nowrap}
.number{text-align:right}
td.text{min-width:6rem;overflow-wrap:anywhere}
details{margin:.8rem 0}
summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.8rem}
pre{font-size:.82rem}
@media print{:root{color-scheme:light;--page:#fff;--ink:#000;--soft:#444;--rule:#ccc;--card:#fff}
body{font-size:10pt}main{max-width:none;padding:0}figure,tr{break-inside:avoid}h2{break-after:avoid}
.scroll{overflow:visible}table{font-size:8pt}th{white-space:normal}th,td{padding-right:.5rem}
.figures{grid-template-columns:1fr 1fr}pre{white-space:pre-wrap}}
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path; equal files give equal bytes.

    Raises:
        StorageError: `run-missing` without metrics.jsonl or summary.json; `run-corrupt`, `disk-full` or `not-writable`.
    """
    path = folder / "report.html"
    write_atomically(path, page(read_run(folder)).encode("utf-8"))
    return path


def save_curve_png(folder: Path, target: Path) -> None:
    """Draw the monitored metric of a run, with its baselines, as a PNG.

    Raises:
        StorageError: see `write_report`.
        UsageError: the run has no central evaluation.
    """
    run = read_run(folder)
    values = central_curves(run).get(run.monitor)
    if not values:
        raise UsageError(f"the run {folder} has no central evaluation", "a run with evaluation.data")
    write_atomically(target, figures.metric_curve(run.monitor, values, run.best_round, _baselines(run), "png"))


def page(run: Run) -> str:
    """Return the page."""
    drawn = [*_metric_figures(run), *_privacy_figures(run), *_round_figures(run), *_site_figures(run)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
            f"<title>{escape(run.name)}: federated run</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(run.name)}</h1>",
            *(f'<p class="lede">{escape(sentence)}</p>' for sentence in tables.story(run)),
            "<h2>Privacy</h2>",
            *(f"<p>{escape(paragraph)}</p>" for paragraph in _privacy_words(run)),
            *([f'<h2>Figures</h2>\n<div class="figures">\n{"".join(drawn)}</div>'] if drawn else []),
            *tables.sections(run),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _figure(title: str, svg: bytes | str, caption: str) -> str:
    drawn = svg if isinstance(svg, str) else figures.inline(svg)
    return (
        f'<figure><h3>{escape(title)}</h3><div class="plot" role="img" aria-label="{escape(title)}">\n{drawn}\n</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _baselines(run: Run) -> dict[str, float]:
    """Return the monitored metric of each baseline that has it."""
    having = {name: found[run.monitor] for name, found in baseline_metrics(run).items() if run.monitor in found}
    return {name: value for name, value in having.items() if math.isfinite(drawable(value))}


def _metric_figures(run: Run) -> list[str]:
    """Return what the central evaluation measured."""
    curves, drawn, lines = central_curves(run), [], _baselines(run)
    if run.monitor in curves:
        caption = (
            "Measured by the server on the operator's held-out rows; round 0 is before training. The star is the round "
            "whose adapter was kept as best." + (" Horizontal lines are the baselines of this run." if lines else "")
        )
        svg = figures.metric_curve(run.monitor, curves.pop(run.monitor), run.best_round, lines)
        drawn.append(_figure(f"{run.monitor}, by which the best round was chosen", svg, caption))
    if run.best_round is not None and lines:
        rows = tables.compared(run)
        values = {name: found[run.monitor] for name, found in rows.items() if run.monitor in found}
        caption = (
            f"The same {run.monitor}, side by side: the federated adapter at its best round against the baselines."
        )
        drawn.append(_figure("Federated against the baselines", figures.plot_comparison(values, run.monitor), caption))
    if curves:
        shown = dict(list(curves.items())[:MOST_SMALL_CURVES])
        caption = "The other metrics of the same evaluation, each on its own scale." + (
            f" {len(curves) - len(shown)} more are in metrics.jsonl." if len(curves) > len(shown) else ""
        )
        drawn.append(_figure("Other metrics", figures.small_curves(shown), caption))
    return drawn


def _privacy_words(run: Run) -> list[str]:
    return statement(run.summary.get("privacy", {})) + rows_statement(run.summary.get("rows_privacy", {}))


def _privacy_figures(run: Run) -> list[str]:
    """Return what privacy has cost so far, and how much of each step was noise."""
    lines = [(line["round"], line["privacy"]) for line in run.completed if line.get("privacy")]
    curves = {
        f"epsilon, {who}": curve((number, entry["epsilon"].get(who)) for number, entry in lines)
        for who in ("release", "sums", "uploads")
    }
    curves["norm of the mean"] = curve((number, entry["mean_norm"]) for number, entry in lines)
    curves["norm of its noise"] = curve((number, entry["noise_norm"]) for number, entry in lines)
    drawn = {name: values for name, values in curves.items() if values}
    if not drawn:
        return []
    caption = (
        "Epsilon of each ledger after each round, by whom it is against, and the length of the noisy mean update "
        "beside that of the noise alone: where the two are alike, a round was mostly noise."
    )
    return [_figure("What privacy cost", figures.small_curves(drawn), caption)]


def _round_figures(run: Run) -> list[str]:
    """Return what the rounds cost and how the loss went."""
    drawn = []
    mean = curve((line["round"], line.get("train_loss")) for line in run.completed)
    if mean:
        caption = (
            "The mean loss over each site's local steps, as the sites report it, weighted by their rows. It is a "
            "training loss: it may fall while the curve above does not rise."
        )
        svg = figures.sites_curve("training loss", mean, curves_by_site(run.completed, "accepted", "loss"))
        drawn.append(_figure("Training loss", svg, caption))
    errors = curve((line["round"], line.get("aggregation_error")) for line in run.completed)
    if errors:
        caption = (
            "How far the server's choice of the LoRA factors is from the mean of what the sites have learned, "
            "||mean(B A) - B A|| / ||mean(B A)||. A mean of the factors has one; strategy svd has less, and ffa, "
            "rolora and flora, if strategy.merged_rank suffices, have none but rounding."
        )
        drawn.append(_figure("Aggregation error", figures.small_curves({"aggregation error": errors}), caption))
    seconds = seconds_by_round(run)
    if seconds:
        caption = (
            "The server's clock. Waiting covers the sites' training and the transfer both ways; in a simulation in one "
            "process the sites train one after another. Voided attempts are counted in their round."
        )
        drawn.append(_figure("Where the time went", figures.stacked("seconds", seconds), caption))
    if run.attempts:
        caption = "Adapters sent to all sites (down) and updates received from them (up). Voided attempts are included."
        svg = figures.stacked("bytes a round", bytes_by_round(run), "B")
        drawn.append(_figure("Bytes exchanged", svg, caption))
    return drawn


def _site_figures(run: Run) -> list[str]:
    """Return how the sites answered, and how the model serves each of them."""
    drawn, replies = [], replies_by_site(run)
    rounds = {number for states in replies.values() for number in states}
    if rounds and len(replies) <= MOST_MAPPED_SITES and len(rounds) <= MOST_MAPPED_ROUNDS:
        caption = (
            "One cell for each request. Rejected: a reply came and the guard refused it, or the site answered with an "
            "error. White: the site was not asked. Of a round that was tried again, the last attempt is shown."
        )
        drawn.append(_figure("Replies by site", figures.reply_map(replies), caption))
    elif rounds:
        caption = (
            "How many sites were asked in each round, and what became of the requests. See the table for each site."
        )
        svg = figures.stacked("sites", count_replies(replies), colours=figures.STATE_COLOURS)
        drawn.append(_figure("Replies by round", svg, caption))
    judged = judged_line(run)
    worst = worst_site(judged["sites_eval"], run.monitor, run.lower_is_better) if judged else None
    if judged and worst:
        site, metric, value = worst
        mean = curve((line["round"], weighted_mean(line.get("sites_eval", {}), metric)) for line in run.completed)
        sites = curves_by_site(run.completed, "sites_eval", metric)
        caption = (
            f"Measured by each site on its own evaluation rows. Worst after round {judged['round']}: {site}, "
            f"{metric} {value:.4g}. A good mean can hide a site that the model does not serve."
        )
        drawn.append(_figure(f"{metric} at the sites", figures.sites_curve(metric, mean, sites, site), caption))
    return drawn
