"""Commands that check what a run or a site has recorded, and what a run claims."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsugiki.common.files import to_json
from tsugiki.common.options import Json, RunFile, Set

if TYPE_CHECKING:
    from tsugiki.server.budget.privacy_audit import PrivacyAudit
    from tsugiki.server.report.verification import Check

app = typer.Typer()
audit_app = typer.Typer(no_args_is_help=True, help="Check the logs of a run or of a site, or what a run claims.")
app.add_typer(audit_app, name="audit")

AUDITED_APP = "tsugiki.audited-app"
"""Key in the context's `meta` of what makes the sites of an audit: the server does not know the client."""

_VERDICTS = {True: "agree", False: "DIFFER", None: "not compared"}


@audit_app.command(
    epilog="Examples: tsugiki audit verify runs/contracts; tsugiki audit verify /srv/acme; "
    "tsugiki audit verify runs/contracts --with /srv/acme"
)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a run, or of a site.")],
    site: Annotated[
        Path | None, typer.Option("--with", metavar="SITE_FOLDER", help="Also compare a site's records with the run's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check logs for lines that are lost or changed, and an operator's against a site's. Exit status 1: they differ."""
    from tsugiki.server.report.verification import verify_folder

    checks = verify_folder(folder, site)
    if as_json:
        typer.echo(to_json([check.as_json() for check in checks], indent=1))
    else:
        _print(checks)
    if any(check.holds is False for check in checks):
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("what", "first record", "second record", ""):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(check.what, check.first, check.second, _VERDICTS[check.holds])
    Console(markup=False, highlight=False).print(table)


@audit_app.command(
    epilog="Examples: tsugiki audit privacy examples/mnist-private.toml; tsugiki audit privacy run.toml --trials 2000"
)
def privacy(
    ctx: typer.Context,
    file: RunFile,
    trials: Annotated[
        int, typer.Option(metavar="N", min=100, help="Least number of planted clients; more of them find more.")
    ] = 4000,
    seed: Annotated[int, typer.Option(help="Of the auditor's coins. Noise is never seeded.")] = 1,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Attack a simulation of a run: how much of each claimed epsilon is found? Exit status 1: more than is claimed."""
    from tsugiki.common.config.files import read
    from tsugiki.server.budget import privacy_audit
    from tsugiki.server.commands.runs import stop_on_signals

    config = read(file, overrides or [])
    with stop_on_signals() as stop:
        audit = privacy_audit.audit_privacy(
            config, ctx.meta[AUDITED_APP], trials, seed, lambda line: typer.echo(line, err=True), stop
        )
    path = privacy_audit.write_audit(audit, Path(config.run.output_dir) / config.run.name)
    if as_json:
        typer.echo(to_json(audit.as_json(), indent=1))
    else:
        _print_audit(audit, path)
    privacy_audit.check_claims(audit)


def _print_audit(audit: PrivacyAudit, path: Path) -> None:
    from tsugiki.server.run.privacy_words import audit_statement

    for paragraph in audit_statement(audit.as_json()):
        typer.echo(paragraph)
    typer.echo(f"written to {path}")
