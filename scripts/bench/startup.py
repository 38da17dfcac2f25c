"""How long `tsugiki --help` and `import tsugiki` take: medians of 10 fresh processes.

python scripts/bench/startup.py
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import Figure, median, show, spread

HELP = [str(Path(sys.executable).parent / "tsugiki"), "--help"]
IMPORT = [sys.executable, "-c", "import sys, tsugiki; assert 'torch' not in sys.modules"]


def seconds(command: list[str]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measured(name: str, command: list[str], target: str) -> Figure:
    """Return the median of ten calls."""
    seconds(command)  # fill the file cache
    times = [seconds(command) for _ in range(10)]
    return Figure(name, median(times), "s", target, spread(times))


if __name__ == "__main__":
    show(
        "Start-up",
        [measured("tsugiki --help", HELP, "<= 0.5"), measured("import tsugiki, without torch", IMPORT, "<= 0.3")],
    )
