"""Flower's ServerApp."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from tsugiki.common.config.files import from_run_config
from tsugiki.server.run.federation import run_federation
from tsugiki.server.run.progress import choose

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation as a Flower app, with Flower's run config as its configuration."""
    from tsugiki.server.engines.superlink import run_grid

    run_federation(run_grid(grid), from_run_config(context.run_config), progress=choose())
