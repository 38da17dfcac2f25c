"""Greet 10,000 sites in one process and let them do a round of trivial work: seconds, flushes to the disk, memory.

    python scripts/bench/many_sites.py [--sites 10000] [--floats 1000]

The sites answer at once with zeros, so that what is measured is the server and Flower's messages. A fifth of the sites
is measured first, in the same process: seconds for each site must not grow with their number.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench"), str(ROOT)]

import numpy as np
from figures import Figure, show
from trivial import trivial_app, trivial_spec

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.parse import parse
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.roster import Roster

SMALLER = 5
"""By how much the first federation is smaller."""


@dataclass(frozen=True)
class Cost:
    """The cost of a call.

    Args:
        wall_s: seconds on the clock.
        cpu_s: seconds of this process on a CPU.
        flushes: calls of `os.fsync`.
    """

    wall_s: float
    cpu_s: float
    flushes: int


def cost_of(call: Callable[[], object]) -> Cost:
    """Return the cost of a call."""
    flushes = 0
    real = os.fsync

    def counted(descriptor: int) -> None:
        nonlocal flushes
        flushes += 1
        real(descriptor)

    os.fsync = counted
    wall = time.perf_counter()
    cpu = time.process_time()
    try:
        call()
    finally:
        os.fsync = real
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, flushes)


def measure(sites: int, floats: int, folder: Path) -> tuple[Cost, Cost]:
    """Return the cost of all hellos, and of a round with all sites."""
    folder.mkdir()
    spec = trivial_spec(floats)
    config = parse({"run": {"rounds": 1}, "strategy": {"min_clients": sites}})
    audit = AuditLog(folder / "audit.jsonl")
    grid = InProcessGrid(trivial_app(spec), sites)
    roster = Roster(grid, config, spec, None, audit, Stop())
    hellos = cost_of(lambda: roster.wait(lambda count: None))
    ctx = RunContext(config, spec, grid, roster, None, False, folder, audit)
    state = initial_state(np.zeros(floats, np.float32))
    # the line of round 0 is part of it; nothing is evaluated
    round_ = cost_of(lambda: run_rounds(ctx, state))
    return hellos, round_


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--floats", type=int, default=1_000)
    options = parser.parse_args()
    few = options.sites // SMALLER
    with tempfile.TemporaryDirectory() as name:
        measure(few, options.floats, Path(name) / "warm")  # Flower and NumPy load parts of themselves at first use
        few_hellos, few_round = measure(few, options.floats, Path(name) / "few")
        hellos, round_ = measure(options.sites, options.floats, Path(name) / "many")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    grows = f"{options.sites:,} over {few:,} sites"
    figures = [
        Figure("hellos, wall", hellos.wall_s, "s", "<= 10"),
        Figure("hellos, CPU", hellos.cpu_s, "s", "<= 10"),
        Figure("hellos, flushes", hellos.flushes, "", "<= 1"),
        Figure("hellos, CPU for a site", hellos.cpu_s / few_hellos.cpu_s / SMALLER, "ratio", "<= 1.5", grows),
        Figure("round, wall", round_.wall_s, "s", "<= 10"),
        Figure("round, CPU", round_.cpu_s, "s", "<= 10"),
        Figure("round, flushes", round_.flushes, "", "<= 5", "one of them of the line before training"),
        Figure("round, CPU for a site", round_.cpu_s / few_round.cpu_s / SMALLER, "ratio", "<= 1.5", grows),
        Figure("messages", options.sites / round_.cpu_s, "1/CPU s"),
        Figure("memory, peak", memory, "MiB"),
    ]
    show(f"{options.sites:,} sites in one process, {options.floats:,} floats", figures)


if __name__ == "__main__":
    main()
