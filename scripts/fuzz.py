"""Give every decoder of received bytes hostile inputs, with other seeds in every run, and count what fails.

    python scripts/fuzz.py [--minutes 10] [--target arrays ...]

The targets are those of `tests/support/fuzzing.py`; CI tries each of them for a moment (`tests/test_fuzz.py`). Each
gets an equal share of the time. An input that fails is reduced, and printed with its seed. Exit status 1: one failed.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from hypothesis import HealthCheck, given, seed, settings
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tests.support.fuzzing import TARGETS, Target, probe

BLOCK = 250
"""How many examples are drawn from one seed."""


def main() -> int:
    """Run the targets, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS), help="the targets to run")
    options = parser.parse_args()
    table = Table("target", "executions", "seconds", "failures", box=SIMPLE)
    failures = 0
    for name in options.target:
        started = time.monotonic()
        executions, failed = fuzz(name, TARGETS[name], options.minutes * 60 / len(options.target))
        failures += failed
        table.add_row(name, f"{executions:,}", f"{time.monotonic() - started:.0f}", str(failed))
    Console().print(table)
    return 1 if failures else 0


def fuzz(name: str, target: Target, seconds: float) -> tuple[int, int]:
    """Run a target for some seconds; return how many inputs it got, and how many seeds led to a failure."""
    executions = 0
    failures = 0
    end = time.monotonic() + seconds

    def run(example: Any) -> None:
        nonlocal executions
        executions += 1
        probe(target, example)

    chosen = settings(max_examples=BLOCK, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < end:
        number = secrets.randbits(64)
        try:
            seed(number)(chosen(given(target.examples)(run)))()
        except Exception:  # noqa: BLE001  # any exception is what we are looking for
            failures += 1
            print(f"{name}, seed {number}:")
            traceback.print_exc(limit=-4)
    return executions, failures


if __name__ == "__main__":
    sys.exit(main())
