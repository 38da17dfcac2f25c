"""Measure how long `tsugiki --help` takes: the median of 10 fresh processes.

python scripts/bench/startup.py
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import Figure, median, show, spread

COMMAND = [str(Path(sys.executable).parent / "tsugiki"), "--help"]


def seconds() -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    seconds()  # fill the file cache
    times = [seconds() for _ in range(10)]
    show("Start-up", [Figure("tsugiki --help", median(times), "s", "<= 0.5", spread(times))])
