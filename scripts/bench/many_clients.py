"""Check with ten clients at once that no round misses a reply, and that the server's memory does not grow.

    python scripts/bench/many_clients.py [--clients 10] [--rounds 20]

One SuperLink and trivial clients with 75,000 floats on loopback. The server's memory is the resident memory (VmRSS of
proc(5)) of this process, which runs the ServerApp, and of the SuperLink, read at the start of each round.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench"), str(ROOT)]

from figures import Figure, show
from orchestration import processes, resident_trivial, run_trivial, trivial_bundle
from trivial import FLOATS, trivial_spec

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.common.config.parse import parse
from tsugiki.common.files import read_lines
from tsugiki.server.deploy.control import Control, executed
from tsugiki.server.deploy.superlink_process import free_port, superlink
from tsugiki.server.run.progress import Progress

FROM_ROUND = 5


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Memory(Progress):
    """Records the server's memory at the start of each round: this process and the SuperLink, in bytes."""

    def __init__(self, superlink_pid: int) -> None:
        self._pids = (os.getpid(), superlink_pid)
        self.bytes: dict[int, tuple[int, int]] = {}

    def round_begins(self, round_: int, rounds: int, cohort: list[str]) -> None:
        """Record the memory."""
        here, there = map(resident_bytes, self._pids)
        self.bytes[round_] = (here, there)


def measure(clients: int, rounds: int, folder: Path) -> list[Figure]:
    """Run the rounds and return the figures."""
    strategy = {"min_clients": clients, "connect_timeout_s": 120.0}
    config = parse({"run": {"rounds": rounds}, "strategy": strategy})
    address, spec = f"127.0.0.1:{free_port()}", trivial_spec(FLOATS)
    with superlink(address, None, folder / "superlink") as child:
        memory = Memory(child.process.pid)
        run_id = Control(child.endpoint).submit(trivial_bundle(), {})
        with executed(child.endpoint, run_id) as grid, processes(resident_trivial(address, clients), folder):
            grid.limit_replies(spec.size_bytes)
            run_trivial(grid, config, spec, memory, folder)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["round"]]
    missed = sum(clients - len(line["accepted"]) for line in lines) + clients * (rounds - len(lines))
    before, after = (sum(memory.bytes[round_]) for round_ in (FROM_ROUND, rounds))
    megabytes = [f"{sum(memory.bytes[round_]) / 2**20:.1f}" for round_ in sorted(memory.bytes)]
    return [
        Figure("replies missed", missed, "replies", "<= 0", f"of {clients * rounds}"),
        Figure("server's memory, last round over fifth", after / before, "ratio", "<= 1.05", " ".join(megabytes)),
        Figure("round, mean", sum(line["seconds"]["wait"] for line in lines) / len(lines), "s"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if options.rounds <= FROM_ROUND:
        parser.error(f"--rounds: more than {FROM_ROUND}, the round that memory is compared with")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the clients would outlive us
    with tempfile.TemporaryDirectory() as name:
        figures = measure(options.clients, options.rounds, Path(name))
    show(f"{options.clients} clients, {options.rounds} rounds, {FLOATS:,} floats", figures)


if __name__ == "__main__":
    main()
