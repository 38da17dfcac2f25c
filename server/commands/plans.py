"""Commands to plan a run before it starts: its privacy budget, the adapter methods, this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsugiki.common.errors import UsageError
from tsugiki.common.files import to_json
from tsugiki.common.options import Json, Plot, RunFile, Set

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
    from tsugiki.server.doctor import Finding
    from tsugiki.server.methods import Combination, Compatibility

app = typer.Typer()


@app.command(epilog="Example: tsugiki budget federation.toml --set privacy.mode=distributed --plot budget.svg")
def budget(
    file: RunFile,
    dimension: Annotated[int, typer.Option(metavar="D", min=0, help="Parameters of an update; 0: the model says.")] = 0,
    plot: Plot = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Plan privacy, and train nothing: the noise for a budget, what each adversary sees, what is left to learn."""
    from tsugiki.common.files import write_atomically
    from tsugiki.common.plots import plot_format
    from tsugiki.server.budget.budget import Size, make_budget, measure, read
    from tsugiki.server.budget.figure import draw
    from tsugiki.server.budget.words import show

    if plot is not None:
        plot_format(plot)  # refuses a wrong name before the work
    config, mode, assumed = read(file, overrides or [])
    size = Size(dimension) if dimension else measure(config)
    found = make_budget(config, size, mode, assumed)
    if plot is not None:
        write_atomically(plot, draw(found, plot_format(plot)))
    if as_json:
        typer.echo(to_json(found.as_json(), indent=1))
    else:
        show(found, file, plot)


@app.command(
    epilog="Examples: tsugiki methods; tsugiki methods --model HuggingFaceTB/SmolLM2-135M; tsugiki methods run.toml"
)
def methods(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A run's TOML file; its settings count.")
    ] = None,
    model: Annotated[str, typer.Option(help="The base; by default the run's, or all-MiniLM.")] = "",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """List which adapter methods go with which tasks on a base, with sizes, and why the others do not."""
    from rich.console import Console

    from tsugiki.server.methods import compatibility

    config = _read_with_model(file, model, overrides or [])
    with Console(stderr=True).status("looking at each task") as status:
        found = compatibility(config, lambda task: status.update(f"{task} with each method"))
    if as_json:
        typer.echo(to_json(found.as_json(), indent=1))
    else:
        _print_menu(found)


def _read_with_model(file: Path | None, model: str, overrides: list[str]) -> RunConfig:
    """Return the run of a file, or the default run, on the given base model."""
    from tsugiki.common.config.files import read
    from tsugiki.common.config.parse import parse

    if file is not None:
        named = [f"model.name={model}"] if model else []
        return read(file, [*overrides, *named])
    if overrides:
        raise UsageError("--set is given without a file", "a run's TOML file", "give FILE, or --model alone")
    return parse({"model": {"name": model}} if model else {})


def _print_menu(found: Compatibility) -> None:
    """Print a table of methods and tasks, with the parameters of adapter and head and the bytes of a round each way."""
    from rich import filesize
    from rich.console import Console
    from rich.table import Table

    from tsugiki.common.adapters import ADAPTERS
    from tsugiki.server.methods import reasons

    numbers = reasons(found.pairs)
    table = Table(title=f"{found.base}: numbers of the adapter + head, and bytes of a round, each way")
    table.add_column("method")
    for task in found.pairs:
        table.add_column(task, justify="right")
    for method in ADAPTERS.names():
        table.add_row(method, *(_cell(row[method], numbers) for row in found.pairs.values()))
    # A narrow terminal would break the cells' numbers: let the table run over instead.
    console = Console(width=max(Console().width, 24 * len(found.pairs)))
    console.print(table)
    for reason, number in numbers.items():
        console.print(f"({number}) {reason}", highlight=False, markup=False, soft_wrap=True)
    frozen = filesize.decimal(found.base_bytes)
    trained = filesize.decimal(found.trained_bytes)
    console.print(
        f"Memory at a site: {frozen} of frozen weights, at most {trained} for what is trained "
        "(numbers, gradients, Adam's moments), and activations, by batch and length.",
        highlight=False,
        soft_wrap=True,
    )


def _cell(pair: Combination, numbers: Mapping[str, int]) -> str:
    from rich import filesize

    if pair.reason:
        return f"({numbers[pair.reason]})"
    parameters = f"{pair.adapter:,}"
    if pair.head:
        parameters += f" + {pair.head:,}"
    return f"{parameters}\n{filesize.decimal(pair.size_bytes)}"


@app.command(epilog="Example: tsugiki doctor --json")
def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, devices, what is missing, and what to do about it."""
    from tsugiki.server.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(to_json([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.echo(_finding_line(finding))
    if any(finding.needed and not finding.fine for finding in findings):
        raise typer.Exit(1)


def _finding_line(finding: Finding) -> str:
    """Return a finding on one line: its mark, what was found, and advice if something is wrong."""
    if finding.fine:
        return f"ok   {finding.name}: {finding.found}"
    mark = "FAIL" if finding.needed else "-   "
    line = f"{mark} {finding.name}: {finding.found}"
    if finding.do:
        line += f"  -> {finding.do}"
    return line
