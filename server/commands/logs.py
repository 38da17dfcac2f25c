"""Commands that check what a run or a site has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsugiki.common.files import to_json
from tsugiki.common.options import Json

if TYPE_CHECKING:
    from tsugiki.server.report.verification import Check

app = typer.Typer()
audit_app = typer.Typer(no_args_is_help=True, help="Check the logs of a run or of a site.")
app.add_typer(audit_app, name="audit")

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
