"""Commands for the runs that there are: list them, show one, stop one, remove one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsugiki.common.errors import DeployError, StorageError, UsageError
from tsugiki.common.files import to_json
from tsugiki.common.options import Json, RunFolder

if TYPE_CHECKING:
    from tsugiki.server.report.listing import Listed

STOP_TIMEOUT_S = 120.0
"""How long `tsugiki runs stop` waits for the run's end. A round under secure aggregation ends its step first."""
LOOK_S = 0.2

app = typer.Typer()
runs_app = typer.Typer(invoke_without_command=True, help="List the runs in a folder, or show, stop or remove one.")
app.add_typer(runs_app, name="runs")


@runs_app.callback()
def list_all(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The folder of runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder: state, rounds, best metric, when, and sites."""
    from tsugiki.server.report.listing import list_runs

    if ctx.invoked_subcommand is not None:
        return
    runs = list_runs(folder)
    if as_json:
        typer.echo(to_json([run.as_json() for run in runs], indent=1))
    else:
        _print(runs)


def _print(runs: list[Listed]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("run", "state", "rounds", "best", "begun", "last event", "sites"):
        table.add_column(name, overflow="fold")
    for run in runs:
        table.add_row(run.name, run.state, _rounds(run), _best(run), _time(run.begun), _time(run.last), _sites(run))
    Console(markup=False, highlight=False).print(table)


def _rounds(run: Listed) -> str:
    return f"{run.rounds} of {run.planned_rounds}"


def _best(run: Listed) -> str:
    return "" if run.best is None else f"{run.monitor} {run.best:.4f} (round {run.best_round})"


def _time(text: str) -> str:
    return text[:16].replace("T", " ")


def _sites(run: Listed) -> str:
    return ", ".join(run.sites or {})


@runs_app.command(epilog="Example: tsugiki runs show runs/june")
def show(run: RunFolder, as_json: Json = False) -> None:
    """Show one run: what is listed of it, and in how many rounds each site was."""
    from tsugiki.server.report.listing import look_at

    found = look_at(run)
    if as_json:
        typer.echo(to_json(found.as_json(), indent=1))
        return
    lines = {
        "run": found.name,
        "state": found.state,
        "rounds": _rounds(found),
        "best": _best(found),
        "begun": found.begun,
        "last event": found.last,
    }
    for name, value in lines.items():
        typer.echo(f"{name}: {value}")
    for site, rounds in (found.sites or {}).items():
        typer.echo(f"  {site}: in {rounds} rounds")


@runs_app.command(epilog="Example: tsugiki runs stop runs/june")
def stop(run: RunFolder) -> None:
    """Stop a running run at the next chance, so that it can go on later, and wait until it has ended."""
    from tsugiki.server.report.listing import look_at
    from tsugiki.server.run.storage import ask_to_stop, is_running

    look_at(run)
    if not is_running(run):
        raise UsageError(f"the run in {run} is not running", "a running one", "`tsugiki runs`, which lists them")
    ask_to_stop(run)
    ends = time.monotonic() + STOP_TIMEOUT_S
    while is_running(run):
        if time.monotonic() > ends:
            raise DeployError(f"the run in {run} is still running after {STOP_TIMEOUT_S:g} s", "its end", "wait longer")
        time.sleep(LOOK_S)
    found = look_at(run)
    typer.echo(f"{found.name} has stopped after {_rounds(found)} rounds; --resume {run} goes on")


@runs_app.command(epilog="Example: tsugiki runs rm runs/june")
def rm(run: RunFolder, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove a run's folder, with its adapters and logs. Its clients' privacy ledger, which is beside it, stays."""
    from tsugiki.server.report.listing import look_at
    from tsugiki.server.run.storage import is_running, remove

    found = look_at(run)
    if is_running(run):
        raise StorageError(
            f"the run in {run} is running", "one that is not", f"`tsugiki runs stop {run}`", code="locked"
        )
    if not yes:
        typer.confirm(f"remove {run} ({found.state}, {_rounds(found)} rounds) with its adapters and logs?", abort=True)
    remove(run)
