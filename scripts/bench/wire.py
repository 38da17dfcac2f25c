"""Count the bytes on the wire from outside the program: compare them with its report, and search them for private text.

    python scripts/bench/wire.py [--rounds 5]

`tsugiki serve` and two `tsugiki client` on loopback without TLS, all-MiniLM with a LoRA of 1 MB; the first site is
connected through a proxy that counts and keeps every byte. Before the second site connects, the first one's idle
polling is measured; it is subtracted. Every private row holds a sentence that is searched for in the kept bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from figures import Figure, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tests.support.proxy import Proxy, proxied
from tests.support.serving import metrics, started, write_run
from tsugiki.client.site.split import split
from tsugiki.common.config.files import read
from tsugiki.common.config.run import RunConfig
from tsugiki.server.demo.demo import write_files
from tsugiki.server.deploy.superlink_process import free_port

CANARY = "the heron reads old letters"
SITES = ("clinic", "logistics")
IDLE_S = 15.0


def prepare(folder: Path, rounds: int) -> tuple[RunConfig, list[Path]]:
    """Return the run and the `site.toml` of each site; all rows hold the canary."""
    file, _ = write_files(folder / "runs", 1)
    changes = ["adapter.rank=28", "train.threads=1", "train.local_steps=1", f"run.rounds={rounds}"]
    changes += ["strategy.min_clients=2", "strategy.connect_timeout_s=300", "run.name=wire", "evaluation.data="]
    config = read(file, changes)
    sites = [path for path in split(config, folder / "sites") if path.parent.name in SITES]
    for site in sites:
        rows = [json.loads(line) for line in (site.parent / "train.jsonl").read_text("utf-8").splitlines()]
        marked = [{name: f"{CANARY}. {text}" for name, text in row.items()} for row in rows]
        (site.parent / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in marked), "utf-8")
    return config, sites


def passed(line: Proxy) -> int:
    """Return the bytes that have passed the proxy, both ways."""
    return line.passed["up"] + line.passed["down"]


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Run the federation and return the figures."""
    config, sites = prepare(folder, rounds)
    address = f"127.0.0.1:{free_port()}"
    with proxied(int(address.split(":")[1]), listening=True) as line, started() as start:
        file = write_run(folder / "run.toml", config)
        server = start(folder / "server", "serve", "serve", file, "--listen", address, "--insecure", "--no-export")
        near = f"127.0.0.1:{line.port}"
        start(folder / "a", "client", "client", "--server", near, "--insecure", "--site", sites[0])
        server.wait_for("1 of 2 nodes", 120)
        time.sleep(10)  # polling slows down to its idle pace
        begun, before = time.monotonic(), passed(line)
        time.sleep(IDLE_S)
        per_s = (passed(line) - before) / (time.monotonic() - begun)
        begun, before = time.monotonic(), passed(line)
        start(folder / "b", "client", "client", "--server", address, "--insecure", "--site", sites[1])
        if server.wait(400) != 0:
            raise SystemExit(server.text())
        crossed = passed(line) - before - per_s * (time.monotonic() - begun)
    name = sites[0].parent.name
    lines = metrics(config)
    reported = sum(one["accepted"][name]["bytes_up"] + one["bytes_down"] / len(one["cohort"]) for one in lines)
    heard = bytes(line.heard["up"]) + bytes(line.heard["down"])
    found = sum(heard.count(word.encode()) for word in (CANARY, CANARY.title(), "heron", "clause"))
    each = lines[0]["accepted"][name]["bytes_up"]
    return [
        Figure("bytes on the wire over those reported", crossed / reported, "ratio", "<= 1.1", f"{rounds} rounds"),
        Figure("adapter, reported, one way", each, "bytes"),
        Figure("idle polling, subtracted", per_s, "bytes/s"),
        Figure("private sentences in the traffic", found, "found", "<= 0", f"{len(heard):,} bytes looked through"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), options.rounds)
    show("The wire, one of two sites, without TLS", figures)


if __name__ == "__main__":
    main()
