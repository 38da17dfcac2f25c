"""A whole deployment of ours on loopback: `tsugiki serve` and resident clients, as processes of their own."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.federation import CANARY
from tests.support.processes import BIN, ROOT, end_group, group_alive, quiet_environment
from tsugiki.client.site.split import split
from tsugiki.common.config.files import to_toml
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.server.deploy.superlink_process import free_port

HOSTILE = ROOT / "tests" / "support" / "hostile.py"


def tiny_run(folder: Path, model: str, name: str = "run", sites: int = 2, **sections: dict[str, Any]) -> RunConfig:
    """Return a short run on a tiny model, and write its data; `sections` override."""
    texts = [f"the {word} clause number {n}, {CANARY}" for n in range(6 * sites) for word in ("good", "bad")]
    _write_rows(folder / "train.csv", texts, [1, 0] * 6 * sites)
    _write_rows(folder / "dev.csv", [text.replace(CANARY, "") for text in texts[:8]], [1, 0] * 4)
    base: dict[str, dict[str, Any]] = {
        "run": {"name": name, "rounds": 2, "output_dir": str(folder / "runs")},
        "model": {"name": model, "public_name": "tsugiki-tests/tiny-bert"},
        "task": {"name": "sequence-classification", "max_length": 16},
        "adapter": {"method": "lora"},
        "train": {"learning_rate": 1e-2, "local_steps": 3, "per_device_train_batch_size": 4, "threads": 1},
        "strategy": {"name": "fedavg", "min_clients": sites, "connect_timeout_s": 60.0},
        "evaluation": {"data": str(folder / "dev.csv")},
        "simulation": {"clients": sites, "data": str(folder / "train.csv")},
    }
    if sections.get("task", {}).get("name", "sequence-classification") == "sequence-classification":
        base["task"]["warm_head"] = "off"
    return parse({key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}})


def _write_rows(path: Path, texts: Sequence[str], labels: Sequence[int]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(texts, labels, strict=True))


class Process:
    """A command of ours in a session of its own, with its output in a file."""

    def __init__(
        self, folder: Path, name: str, *arguments: str | Path, program: Sequence[str | Path] = (BIN / "tsugiki",)
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self.listen = str(arguments[arguments.index("--listen") + 1]) if "--listen" in arguments else ""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*map(str, program), *map(str, arguments)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=quiet_environment(folder / "flwr-home"),
                cwd=folder,
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> int:
        """Return the exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text()[-3000:]}") from None

    def text(self) -> str:
        """Return what it has written."""
        return self.log.read_text("utf-8", errors="replace")

    def listens(self) -> bool:
        """Return whether the loopback port that it was to listen on is open."""
        host, _, port = self.listen.rpartition(":")
        with socket.socket() as probe:
            return host == "127.0.0.1" and probe.connect_ex((host, int(port))) == 0

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Wait until its output matches."""
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends:
            if found := re.search(pattern, self.text()):
                return found
            if self.process.poll() is not None and not re.search(pattern, self.text()):
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} within {timeout_s} s:\n{self.text()[-3000:]}")


def write_run(path: Path, config: RunConfig) -> Path:
    """Write the run's file."""
    path.write_text(to_toml(config))
    return path


Start = Callable[..., Process]


@contextmanager
def started() -> Iterator[Start]:
    """Give a function that starts commands; afterwards end them all and see that nothing is left."""
    processes: list[Process] = []

    def start(folder: Path, name: str, *arguments: str | Path, **options: Any) -> Process:
        processes.append(Process(folder, name, *arguments, **options))
        return processes[-1]

    try:
        yield start
    finally:
        for one in processes:
            end_group(one.process)
        assert not [one.log.name for one in processes if group_alive(one.process.pid)]
        assert not superlinks([one.process.pid for one in processes])
        assert not [one.log.name for one in processes if one.listens()]


def superlinks(parents: Sequence[int]) -> list[int]:
    """Return the ids of SuperLinks of ours: each has its parent's id as an argument."""
    words = {str(parent).encode() for parent in parents}
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it ended while we looked
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if words & set(arguments) and b"--fleet-api-address" in arguments:
                found.append(int(entry.name))
    return found


@dataclass(frozen=True)
class Place:
    """Where a process runs: how it is started there, and where it finds the server (empty: where it listens)."""

    program: Sequence[str | Path] = (BIN / "tsugiki",)
    server: str = ""


def hostile(trick: str) -> Place:
    """Return the place of a site that does something wrong (`tests.support.hostile`)."""
    return Place((sys.executable, HOSTILE, trick))


def serve_and_join(
    start: Start,
    folder: Path,
    config: RunConfig,
    extra: Sequence[str | Path] = (),
    client_extra: Sequence[str] = (),
    sites: Sequence[Path] | None = None,
    listen: str = "",
    places: Mapping[str, Place] | None = None,
) -> tuple[Process, list[Process]]:
    """Start a server and a client for each site; return (server, clients).

    Args:
        start: of `started`.
        folder: where everything goes.
        config: the run.
        extra: of `tsugiki serve`.
        client_extra: of `tsugiki client`; {name} is the site's.
        sites: their site.toml; None: those of the simulation.
        listen: where the server listens; empty: a free loopback port.
        places: site, or "server" -> where it runs.
    """
    listen, places = listen or f"127.0.0.1:{free_port()}", places or {}
    file = write_run(folder / "run.toml", config)
    arguments = ["serve", file, "--listen", listen, *extra]
    if config.privacy.mode != "none":  # so few clients have no hope of learning anything
        arguments.append("--yes")
    server = start(folder / "server", "serve", *arguments, program=places.get("server", Place()).program)
    clients = []
    for site in sites or split(config, folder / "sites"):
        place = places.get(site.parent.name, Place())
        arguments = ["client", "--server", place.server or listen, "--site", site]
        arguments += [part.format(name=site.parent.name) for part in client_extra]
        clients.append(start(folder / "clients", site.parent.name, *arguments, program=place.program))
    return server, clients


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl that are of rounds."""
    lines = read_lines(Path(config.run.output_dir) / config.run.name / "metrics.jsonl")
    return [line for line in lines if line["round"]]


def summary(config: RunConfig) -> dict[str, Any]:
    """Return a run's summary.json."""
    found: dict[str, Any] = json.loads((Path(config.run.output_dir) / config.run.name / "summary.json").read_text())
    return found


def make_identity(start: Start, folder: Path, names: Sequence[str], hosts: Sequence[str] = ()) -> tuple[Path, Path]:
    """Make certificates and keys as the documents tell; return (tls, keyring)."""
    place = folder / "identity"
    options = [part for host in hosts for part in ("--host", host)]
    assert start(place, "certs", "certs", "--tls", place / "tls", *options).wait(60) == 0
    for name in names:
        assert start(place, "keys", "keys", "new", place / f"{name}.key").wait(60) == 0
        arguments = ["keys", "register", place / f"{name}.key.pub", "--name", name, "--keys", place / "keys"]
        assert start(place, "keys", *arguments).wait(60) == 0
    return place / "tls", place / "keys"
