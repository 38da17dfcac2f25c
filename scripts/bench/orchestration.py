"""Measure the seconds of a deployed round beyond training: our resident nodes against Flower's stock SuperNodes.

    python scripts/bench/orchestration.py [--rounds 50] [--stock-rounds 4] [--model-rounds 4]

One SuperLink and four clients on loopback. First with a trivial app and 75,000 floats; then with all-MiniLM loaded and
one step on four rows (a stock SuperNode starts a process, and loads the model, for every message). The server is ours
in every case. A round is measured from its start to the start of the next one; the first and the last are left out.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench"), str(ROOT)]

import numpy as np
import tomli_w
from figures import Figure, mean, median, show
from trivial import FLOATS, trivial_spec

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tests.support.processes import BIN, end_group, quiet_environment
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.wire.spec import AdapterSpec
from tsugiki.server.deploy import bundle
from tsugiki.server.deploy.control import Control, executed
from tsugiki.server.deploy.superlink_process import free_port, superlink
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.superlink import SuperlinkGrid
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.federation import run_federation
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.roster import Roster

CLIENTS = 4


class Clock(Progress):
    """Records the start time of each round."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def round_begins(self, round_: int, rounds: int, cohort: list[str]) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds of each round except the first and the last."""
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]


@contextmanager
def processes(commands: list[list[str]], folder: Path) -> Iterator[None]:
    """Run commands during a `with` block, each in its own session, and end them after it."""
    environment = quiet_environment(folder / "flwr-home", PYTHONPATH=str(ROOT))
    with ExitStack() as stack:
        for number, command in enumerate(commands):
            output = stack.enter_context((folder / f"client-{number}.log").open("wb"))
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            stack.callback(end_group, process)
        yield


def resident_trivial(address: str, clients: int = CLIENTS) -> list[list[str]]:
    """Return the commands that start our nodes with the trivial app."""
    script = str(ROOT / "scripts" / "bench" / "trivial.py")
    return [[sys.executable, script, address, str(number)] for number in range(clients)]


def stock(address: str, configs: list[str]) -> list[list[str]]:
    """Return the commands that start stock SuperNodes."""
    options = ["--insecure", "--superlink", address, "--host", "127.0.0.1"]
    return [
        [str(BIN / "flower-supernode"), *options, "--port", str(free_port()), "--node-config", config]
        for config in configs
    ]


def trivial_bundle() -> bytes:
    """Return a Flower app bundle (FAB) with the trivial ClientApp."""
    from flwr.cli.build import build_fab_from_files

    app = {
        "publisher": "tsugiki",
        "fab-include": ["trivial.py"],
        "components": {"serverapp": "trivial:app", "clientapp": "trivial:app"},
        "config": {},
    }
    project = {"name": "trivial", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []}
    text = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}).encode()
    return build_fab_from_files({"pyproject.toml": text, "trivial.py": ROOT / "scripts" / "bench" / "trivial.py"})[0]


def trivial_rounds(rounds: int, ours: bool, folder: Path) -> list[float]:
    """Return the seconds of each round with the trivial app."""
    folder.mkdir()
    config = parse({"run": {"rounds": rounds + 2}, "strategy": {"min_clients": CLIENTS, "connect_timeout_s": 120.0}})
    address, spec, clock = f"127.0.0.1:{free_port()}", trivial_spec(FLOATS), Clock()
    with superlink(address, None, folder / "superlink") as child:
        control = Control(child.endpoint)
        run_id = control.submit(trivial_bundle(), {})
        commands = resident_trivial(address) if ours else stock(address, [f"partition-id={n}" for n in range(CLIENTS)])
        with executed(child.endpoint, run_id) as grid, processes(commands, folder):
            grid.limit_replies(spec.size_bytes)
            run_trivial(grid, config, spec, clock, folder)
    return clock.seconds()


def run_trivial(grid: SuperlinkGrid, config: RunConfig, spec: AdapterSpec, clock: Progress, folder: Path) -> None:
    """Run the hello and the rounds with the trivial app."""
    audit, stop = AuditLog(folder / "audit.jsonl"), Stop()
    roster = Roster(grid, config, spec, None, audit, stop)
    roster.wait(lambda count: None)
    ctx = RunContext(config, spec, grid, roster, None, False, folder, audit, clock, stop)
    run_rounds(ctx, initial_state(np.zeros(spec.size, np.float32)))


def model_rounds(rounds: int, ours: bool, folder: Path) -> list[float]:
    """Return the seconds of each round with all-MiniLM and one step on four rows."""
    folder.mkdir()
    config = parse(
        {
            "run": {"rounds": rounds + 2, "output_dir": str(folder / "runs")},
            "train": {"local_steps": 1, "per_device_train_batch_size": 4, "threads": 1},
            "strategy": {"min_clients": CLIENTS, "connect_timeout_s": 120.0},
        }
    )
    sites = []
    for number in range(CLIENTS):
        place = folder / f"site-{number}"
        place.mkdir()
        (place / "train.csv").write_text("text,label\n" + "a fine film,1\na dull one,0\n" * 4)
        model = f'"{config.model.name}" = "{config.model.name}"'
        text = f'[site]\nname = "site-{number}"\n[data]\ntrain = "train.csv"\n[models]\n{model}\n'
        (place / "site.toml").write_text(text)
        sites.append(place / "site.toml")
    address, clock = f"127.0.0.1:{free_port()}", Clock()
    resident = [[str(BIN / "tsugiki"), "client", "--server", address, "--insecure", "--site", str(s)] for s in sites]
    with superlink(address, None, folder / "superlink") as child:
        control = Control(child.endpoint)
        run_id = control.submit(bundle.build(), {})
        commands = resident if ours else stock(address, [f'site="{site}"' for site in sites])
        with executed(child.endpoint, run_id) as grid, processes(commands, folder):
            run_federation(grid, config, progress=clock)
    return clock.seconds()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="of our nodes with the trivial app")
    parser.add_argument("--stock-rounds", type=int, default=4, help="of stock SuperNodes with the trivial app")
    parser.add_argument("--model-rounds", type=int, default=4, help="of both with a model")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the clients would outlive us
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = trivial_rounds(options.rounds, True, folder / "ours")
        figures.append(Figure("round, resident nodes, mean", mean(ours), "s", "<= 0.4", f"n = {len(ours)}"))
        figures.append(Figure("round, resident nodes, slowest", max(ours), "s", "<= 1"))
        theirs = trivial_rounds(options.stock_rounds, False, folder / "theirs")
        figures.append(Figure("round, stock SuperNodes, mean", mean(theirs), "s", "", f"n = {len(theirs)}"))
        figures.append(Figure("stock over resident", mean(theirs) / mean(ours), "ratio"))
        warm = model_rounds(options.model_rounds, True, folder / "warm")
        figures.append(
            Figure("round with all-MiniLM, resident nodes, median", median(warm), "s", "", f"n = {len(warm)}")
        )
        cold = model_rounds(options.model_rounds, False, folder / "cold")
        figures.append(
            Figure("round with all-MiniLM, stock SuperNodes, median", median(cold), "s", "", f"n = {len(cold)}")
        )
        figures.append(Figure("stock over resident, with all-MiniLM", median(cold) / median(warm), "ratio"))
    show(f"Orchestration, {CLIENTS} clients on loopback, {FLOATS:,} floats", figures)


if __name__ == "__main__":
    main()
