"""Commands that use a run, finished or not: export its adapter, predict with it, write its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tsugiki.common.options import Json, RunFolder

app = typer.Typer()

Which = Annotated[Literal["best", "last"], typer.Option("--which", help="Which round's adapter.")]


@app.command(epilog="Example: tsugiki export runs/sst2 --merged")
def export(
    run: RunFolder,
    target: Annotated[Path | None, typer.Option(help="Where to; by default a folder inside the run's.")] = None,
    which: Which = "best",
    merged: Annotated[bool, typer.Option(help="Write a whole model with the adapter in its weights.")] = False,
) -> None:
    """Write a run's adapter in a form that others load, and prove in a fresh process that it works."""
    from tsugiki.server.export.export import export as write_export

    _say_unfinished(run)
    typer.echo(write_export(run, target, which=which, merged=merged))


@app.command(
    epilog='Examples: tsugiki predict runs/sst2 "A fine film."; tsugiki predict runs/reviews --file new.csv --json; '
    'tsugiki predict runs/nextword "How do I" --without-adapter; '
    'tsugiki predict --adapter runs/tone/adapter --adapter runs/topic/adapter "A fine film."'
)
def predict(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN] [TEXT]...", help="The run's folder; rows of one text each, or pictures' files."),
    ] = None,
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", metavar="DIR", help="An export, instead of RUN; repeat.")
    ] = None,
    model: Annotated[str, typer.Option(help="With --adapter: the base, if not under its public name.")] = "",
    file: Annotated[Path | None, typer.Option(help="A file of rows instead, in the run's own data format.")] = None,
    columns: Annotated[
        str, typer.Option(help='With --adapter: how the columns of --file are called, as "text=sentence".')
    ] = "",
    which: Which = "best",
    without_adapter: Annotated[bool, typer.Option("--without-adapter", help="Ask the bare base, to compare.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=8192, help="Of a continuation or an answer.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="0: the likeliest token at each step; else tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Ask a run's model, or exported adapters on one base: for labels, scores, cosines, or how a text goes on."""
    from tsugiki.common.tasks.base import Generation
    from tsugiki.server.predict import ask, show

    if words and not adapters:
        _say_unfinished(Path(words[0]))
    found = ask(
        words or [],
        adapters or [],
        model,
        file,
        Generation(max_new_tokens, temperature, seed),
        which=which,
        adapter=not without_adapter,
        columns=columns,
    )
    typer.echo(show(found, as_json), nl=False)


@app.command(epilog="Example: tsugiki report runs/sst2")
def report(run: RunFolder) -> None:
    """Write report.html: curves, bytes, seconds, and who was rejected why. It needs no network to read."""
    from tsugiki.server.report.page import write_report

    _say_unfinished(run)
    typer.echo(write_report(run))


def _say_unfinished(run: Path) -> None:
    """Say on standard error that a run has not ended, so that its figures and its adapter are those so far."""
    from tsugiki.server.run.so_far import describe_unfinished, summary_of

    if (run / "config.toml").is_file() and not (run / "summary.json").exists():
        typer.echo(describe_unfinished(summary_of(run)), err=True)
