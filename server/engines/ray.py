"""The Ray engine: Flower's own simulation runtime, for many cores and GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from tsugiki.common.errors import UsageError
from tsugiki.server.engines.grid import RunGrid, StockGrid


def run(client_app: ClientApp, nodes: int, threads: int, gpus: float, main: Callable[[RunGrid], None]) -> None:
    """Run `main` as a ServerApp on Flower's simulation runtime.

    Args:
        client_app: is pickled for Ray's workers, so everything that it refers to must be picklable.
        nodes: number of simulated nodes.
        threads: CPU cores for each worker.
        gpus: share of a GPU for each worker.
        main: is called with the grid. Its exceptions are raised here.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401  (only asked for here so that the message says what to install)
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise UsageError(
            "the Ray engine needs Ray", hint="pip install 'tsugiki[ray]', or --engine in-process"
        ) from error

    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def _main(grid: Grid, context: Context) -> None:
        try:
            main(StockGrid(grid))
        except BaseException as error:  # noqa: BLE001  # handed to the caller below; Flower would wrap it
            failures.append(error)

    # the run reports its own progress and errors
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app,
        client_app,
        nodes,
        backend_config={
            "client_resources": {"num_cpus": threads, "num_gpus": gpus},
            "init_args": {"include_dashboard": False, "log_to_driver": False},
        },
    )
    if failures:
        raise failures[0]
