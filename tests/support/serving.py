"""A whole deployment of ours on loopback: `tsugiki serve` and resident clients, as processes of their own."""

from __future__ import annotations

import csv
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.site import simulated_sites
from common.config import RunConfig, parse
from common.config_file import to_toml
from tests.support.processes import BIN, quiet_environment

CANARY = "patient Jane hf_abc123"


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
    return parse({key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}})


def _write_rows(path: Path, texts: Sequence[str], labels: Sequence[int]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(texts, labels, strict=True))


def site_files(folder: Path, config: RunConfig, extra: str = "") -> list[Path]:
    """Write for each simulated site of a run a folder as a real one has it; return the paths of site.toml."""
    with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    model, files = config.model.name, []
    for site in simulated_sites(config):
        place = folder / "sites" / site.name
        place.mkdir(parents=True, exist_ok=True)
        mine = [rows[row] for row in site.rows]
        _write_rows(place / "train.csv", [row["text"] for row in mine], [int(row["label"]) for row in mine])
        body = f'[site]\nname = "{site.name}"\n[data]\ntrain = "train.csv"\n[models]\n"{model}" = "{model}"\n{extra}'
        (place / "site.toml").write_text(body)
        files.append(place / "site.toml")
    return files


class Process:
    """A command of ours in a session of its own, with its output in a file."""

    def __init__(self, folder: Path, name: str, *arguments: str | Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [BIN / "tsugiki", *map(str, arguments)],
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
