"""A whole federation on one machine: the same apps as deployed, on an engine that needs no network."""

from __future__ import annotations

from typing import Protocol

from flwr.clientapp import ClientApp

from tsugiki.common.config.run import RunConfig
from tsugiki.server.engines.grid import RunGrid, Stop
from tsugiki.server.engines.in_process import Fault, InProcessGrid
from tsugiki.server.run.federation import Outcome, run_federation
from tsugiki.server.run.progress import Progress


class SimulatedApp(Protocol):
    """Makes the ClientApp of simulated sites. The command line passes it: the server does not know the client."""

    def __call__(self, config: RunConfig, only: str = "", /) -> tuple[ClientApp, int]:
        """Return the ClientApp and its number of nodes: all sites, or the one of that name alone."""


def simulate(
    config: RunConfig,
    client: SimulatedApp,
    *,
    resume: bool = False,
    previous: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
    fault: Fault | None = None,
    accept_hopeless: bool = True,
) -> Outcome:
    """Run a simulated federation on the engine that the configuration names.

    Args:
        config: the run.
        client: makes the ClientApp of the simulated sites.
        resume: go on from the last checkpoint.
        previous: with `resume`, from the one before it.
        progress: shows what happens.
        stop: set to end the run at the next chance.
        fault: tests interfere with replies here; in-process only.
        accept_hopeless: start a run also if nothing can be learned under its privacy plan.

    Raises:
        TsugikiError: the run cannot start or go on.
    """
    app, nodes = client(config)
    stop = stop or Stop()

    def federate(grid: RunGrid) -> Outcome:
        return run_federation(
            grid,
            config,
            resume=resume,
            previous=previous,
            progress=progress,
            stop=stop,
            simulated=True,
            accept_hopeless=accept_hopeless,
        )

    if config.simulation.engine == "in-process":
        return federate(InProcessGrid(app, nodes, fault))

    from tsugiki.server.engines import ray

    # the runtime returns nothing: the outcome comes back through a list
    outcomes: list[Outcome] = []
    try:
        ray.run(
            app,
            nodes,
            config.train.threads,
            1.0 if config.train.device == "cuda" else 0.0,
            lambda grid: outcomes.append(federate(grid)),
        )
    except BaseException:
        stop.request()  # else the thread that runs the federation goes on waiting for nodes that are gone
        raise
    return outcomes[0]
