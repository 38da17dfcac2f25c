"""Five sites over bad lines: 20 rounds, each site cut off at random for one to three round lengths.

    python scripts/consortium.py [--seed 1] [--rounds 20] [--steps 150] [--late-updates next-round]

A server and five clients run as processes on loopback, each client behind a proxy of its own. Time is compressed: a
round takes some 8 s, where hospitals have reported rounds of half an hour and lines that drop every 60 to 90 minutes.
Each site is cut off again and again: it is connected for two to five round lengths, and then cut off for one to three.

What is counted, and the targets of which each is printed with what was found:

- the run finishes, in at most 6 minutes;
- no site trains a round twice, by the sites' own audit logs;
- at most one update in 20 that a site was asked for is in no round.

The last round is left out of the third figure: nothing that is late can count after it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tests.support.proxy import Proxy, proxied
from tests.support.serving import Place, make_identity, metrics, serve_and_join, started, tiny_run
from tests.support.tiny import tiny_bert
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify
from tsugiki.common.config.run import RunConfig
from tsugiki.server.deploy.superlink_process import free_port

SITES = 5
ROUND_S = 8.0
"""About how long a round takes."""
LONGEST_S = 360.0


class BadLine(threading.Thread):
    """Cuts a proxy off at random, until it is stopped.

    Args:
        proxy: the site's line.
        seed: of the pauses.
    """

    def __init__(self, proxy: Proxy, seed: str) -> None:
        super().__init__(daemon=True)
        self.cuts = 0
        self._proxy = proxy
        self._draw = random.Random(seed)  # no secret
        self._over = threading.Event()

    def run(self) -> None:
        """Cut the line off, again and again."""
        while not self._over.wait(self._draw.uniform(2.0, 5.0) * ROUND_S):
            self._proxy.hold()
            self.cuts += 1
            self._over.wait(self._draw.uniform(1.0, 3.0) * ROUND_S)
            self._proxy.release()

    def stop(self) -> None:
        """Leave the line open."""
        self._over.set()
        self.join()
        self._proxy.release()


def run(folder: Path, options: argparse.Namespace) -> tuple[RunConfig, float, int, list[Path]]:
    """Run the federation; return its settings, how long it took in seconds, the cuts, and the files of the sites."""
    strategy: dict[str, Any] = {"min_clients": 2, "start_with": SITES, "round_timeout_s": 120.0}
    if options.late_updates:
        strategy["late_updates"] = options.late_updates
    if options.grace_s >= 0:
        strategy["grace_s"] = options.grace_s
    base = str(tiny_bert(folder / "base"))
    config = tiny_run(
        folder,
        base,
        sites=SITES,
        run={"rounds": options.rounds, "seed": options.seed, "output_dir": str(folder / "runs")},
        train={"local_steps": options.steps},
        strategy=strategy,
    )
    files = split(config, folder / "sites")
    names = [file.parent.name for file in files]
    listen = f"127.0.0.1:{free_port()}"
    with started() as start, ExitStack() as stack:
        lines = {name: stack.enter_context(proxied(int(listen.rpartition(":")[2]))) for name in names}
        tls, keys = make_identity(start, folder, names)
        server_options = ["--tls", tls, "--keys", keys, "--no-export"]
        of_site = ["--ca", str(tls / "ca.crt"), "--key", str(keys.parent / "{name}.key")]
        places = {name: Place(server=f"127.0.0.1:{line.port}") for name, line in lines.items()}
        server, _ = serve_and_join(start, folder, config, server_options, of_site, files, listen, places)
        server.wait_for("round 0,", 300)
        begun = time.monotonic()
        cutters = [BadLine(line, f"{options.seed} {name}") for name, line in lines.items()]
        for cutter in cutters:
            cutter.start()
        status = server.wait(1200)
        seconds = time.monotonic() - begun
        for cutter in cutters:
            cutter.stop()
        print(server.text())
    if status:
        raise SystemExit(f"the run ended with status {status}")
    return config, seconds, sum(cutter.cuts for cutter in cutters), files


def figures_of(config: RunConfig, seconds: float, cuts: int, files: list[Path]) -> list[Figure]:
    """Return what was found, from the run's metrics and the sites' audit logs."""
    lines = metrics(config)
    rounds = config.run.rounds
    asked = {(site, line["round"]) for line in lines for site in line["cohort"] if line["round"] < rounds}
    taken = {(site, line["round"] - one.get("late_by", 0)) for line in lines for site, one in line["accepted"].items()}
    late = sum("late_by" in one for line in lines for one in line["accepted"].values())
    twice = 0
    for file in files:
        events = verify(file.parent / "audit.jsonl")
        trained = Counter(event["round"] for event in events if event["event"] == "trained")
        twice += sum(count - 1 for count in trained.values())
    lost = len(asked - taken) / len(asked)
    return [
        Figure("rounds that were done", float(max(line["round"] for line in lines)), "", f">= {rounds}"),
        Figure("time", seconds, "s", f"<= {LONGEST_S}", f"{cuts} cuts"),
        Figure("rounds that a site trained twice", float(twice), "", "<= 0"),
        Figure("updates that were asked for and lost", lost, "", "<= 0.05", f"of {len(asked)}; {late} came late"),
    ]


def main() -> None:
    """Run the federation and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="of a site in a round")
    parser.add_argument("--late-updates", default="next-round", help='"": the setting is left out')
    parser.add_argument("--grace-s", type=float, default=5.0, help="below 0: the default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show("Five sites over bad lines", figures_of(*run(Path(folder), options)))


if __name__ == "__main__":
    main()
