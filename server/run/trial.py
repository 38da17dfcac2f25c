"""A short federation whose folder is thrown away, to see how its training loss develops."""

from __future__ import annotations

import math
import tempfile
from contextlib import suppress
from pathlib import Path

from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import QuorumNotMet
from tsugiki.common.files import read_lines
from tsugiki.server.run.simulate import SimulatedApp, simulate


def training_losses(config: RunConfig, client: SimulatedApp) -> list[float]:
    """Return the mean training loss of each round of a simulated federation.

    The list ends before the first round without enough accepted updates or with a loss that is not finite: training
    has diverged there.

    Args:
        config: the run; its folder is made elsewhere and removed.
        client: makes the ClientApp of the simulated sites.

    Raises:
        TsugikiError: the run cannot start.
    """
    with tempfile.TemporaryDirectory() as folder:
        trial = changed(config, {"run.output_dir": folder, "run.name": "trial"})
        with suppress(QuorumNotMet):  # the rounds before are in its folder
            simulate(trial, client)
        lines = read_lines(Path(folder) / "trial" / "metrics.jsonl")
    losses = [line["train_loss"] for line in lines if line["round"] and not line.get("voided")]
    stop = next((at for at, loss in enumerate(losses) if loss is None or not math.isfinite(loss)), len(losses))
    return losses[:stop]
