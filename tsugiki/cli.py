"""The command line of Tsugiki, with the commands of both sides.

Each command is declared beside its work: in `server/commands/` and in `client/commands.py`. Those modules import
nothing heavy at their top, so that `tsugiki --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from tsugiki.client import commands as site_commands
from tsugiki.common import __version__
from tsugiki.common.errors import TsugikiError
from tsugiki.server.commands import config, keys, logs, manage, plans, results, runs

if TYPE_CHECKING:
    import click
    from flwr.clientapp import ClientApp

    from tsugiki.common.config.run import RunConfig
    from tsugiki.common.privacy.canaries import Auditor

_HELP_ORDER = [
    "demo",
    "simulate",
    "serve",
    "client",
    "runs",
    "certs",
    "compare",
    "budget",
    "lr-find",
    "methods",
    "export",
    "predict",
    "report",
    "audit",
    "doctor",
    "config",
    "keys",
    "site",
]
"""The order of `tsugiki --help`. Other commands follow."""


class _InHelpOrder(TyperGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the help."""
        names = super().list_commands(ctx)
        known = [name for name in _HELP_ORDER if name in names]
        return known + [name for name in names if name not in known]


app = typer.Typer(
    name="tsugiki",
    cls=_InHelpOrder,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of a frozen base model with small adapters. Data stays where it is; only adapter "
    "updates travel.\n\nStart with [bold]tsugiki demo[/bold], then [bold]tsugiki config init[/bold].",
)
for commands in (runs, manage, results, logs, plans, config, keys, site_commands):
    app.add_typer(commands.app)


def _simulated_app(config: RunConfig, only: str = "", /) -> tuple[ClientApp, int]:
    """Make the ClientApp of simulated sites; see `tsugiki.client.app.simulated_app`."""
    from tsugiki.client.app import simulated_app

    return simulated_app(config, only)


def _audited_app(config: RunConfig, auditor: Auditor, /) -> tuple[ClientApp, int]:
    """Make the ClientApp of simulated sites with canaries; see `tsugiki.client.app.audited_app`."""
    from tsugiki.client.app import audited_app

    return audited_app(config, auditor)


def _training_losses(config: RunConfig, /) -> list[float]:
    """Run a short simulated federation; see `tsugiki.server.run.trial.training_losses`."""
    from tsugiki.server.run.trial import training_losses

    return training_losses(config, _simulated_app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _start(ctx: typer.Context, version: Version = False) -> None:
    # The server does not know the client, so the commands that simulate sites get its app from here.
    ctx.obj = _simulated_app
    ctx.meta[site_commands.TRAINING_LOSSES] = _training_losses
    ctx.meta[logs.AUDITED_APP] = _audited_app


def main() -> None:
    """Run the command line. Errors become one message and an exit status."""
    # Only Tsugiki's own errors: any other exception is a bug, and keeps its traceback.
    try:
        app()
    except TsugikiError as error:
        print(f"tsugiki: {error.code}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(error.exit_status)
