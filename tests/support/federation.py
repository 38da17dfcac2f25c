"""A small federation over a tiny BERT.

Every training row carries `CANARY`, so that any test can ask whether something private got out.
"""

from __future__ import annotations

import atexit
import csv
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context

from tests.support.tiny import tiny_bert
from tsugiki.client.app import make_app, simulated_app
from tsugiki.client.site.site import read_site
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.settings import HeadedSettings
from tsugiki.server.run.federation import Outcome
from tsugiki.server.run.simulate import SimulatedApp, simulate

CANARY = "Patient Jane hf_abc123"
CANARIES = ("Patient Jane", "patient jane", "hf_abc123")


@functools.cache
def model_folder() -> str:
    """Return the folder of the tiny model, written once for each test process."""
    folder = tempfile.mkdtemp(prefix="tsugiki-test-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(tiny_bert(Path(folder)))


def write_rows(path: Path, count: int = 24, **extra: Callable[[int], str]) -> Path:
    """Write rows of two classes, told apart by one word, each with the canary; `extra` adds columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", *extra])
        for row in range(count):
            word = ("good", "bad")[row % 2]
            text = f"the {word} clause number {row // 2}, {CANARY}"
            writer.writerow([text, 1 - row % 2, *(value(row) for value in extra.values())])
    return path


def merged(base: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Return a configuration with the settings of `changes` over those of `base`, section by section."""
    return parse({name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}})


def tiny_config(folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """Return a run of two sites and two rounds over the tiny model; writes its data into `folder` where they lack.

    Args:
        folder: holds train.csv, dev.csv and runs/.
        sections: settings that differ, as train={"local_steps": 1}.
    """
    if not (folder / "train.csv").exists():
        write_rows(folder / "train.csv")
        write_rows(folder / "dev.csv", 8)
    base = {
        "run": {"name": "tiny", "rounds": 2, "output_dir": str(folder / "runs")},
        "model": {"name": model_folder(), "public_name": "tsugiki-tests/tiny-bert"},
        "task": {"name": "sequence-classification", "max_length": 16},
        "adapter": {"method": "lora", "rank": 2},
        "train": {"learning_rate": 1e-2, "local_steps": 2, "per_device_train_batch_size": 4, "threads": 1},
        "evaluation": {"data": str(folder / "dev.csv")},
        "simulation": {"clients": 2, "data": str(folder / "train.csv")},
    }
    config = merged(base, sections)
    # a round of its own before the first: only tests that are about it have it
    if isinstance(config.task, HeadedSettings) and "warm_head" not in sections.get("task", {}):
        return changed(config, {"task.warm_head": "off"})
    return config


def distributed_config(folder: Path, clients: int, least: int, rounds: int = 1, **privacy: Any) -> RunConfig:
    """Return a tiny run under distributed noise and, unless `privacy` says otherwise, secure aggregation.

    Args:
        folder: as in `tiny_config`; made if it is not there.
        clients: simulated sites of one client each.
        least: of them in a round.
        rounds: of the run.
        privacy: settings of the section that differ.
    """
    folder.mkdir(exist_ok=True)
    write_rows(folder / "train.csv", clients * 4)
    write_rows(folder / "dev.csv", 8)
    settings = {"mode": "distributed", "secure_aggregation": True, "noise_multiplier": 0.5, "delta": 1e-3}
    return tiny_config(
        folder,
        run={"rounds": rounds},
        privacy=settings | privacy,
        strategy={"min_clients": least, "round_timeout_s": 60.0},
        simulation={"clients": clients},
    )


def run_tiny(config: RunConfig, client: SimulatedApp = simulated_app, **options: Any) -> Outcome:
    """Run the tiny federation; options go to `tsugiki.server.run.simulate.simulate`."""
    return simulate(config, client, **options)


def site_folder(folder: Path, name: str, train: str = "train.csv") -> Path:
    """Write a real site's folder: eight rows and a site.toml; return the site.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.csv", 8)
    site = folder / "site.toml"
    site.write_text(
        f'[site]\nname = "{name}"\n[data]\ntrain = "{train}"\n[models]\n"{model_folder()}" = "{model_folder()}"\n'
    )
    return site


def app_of_sites(files: list[Path]) -> SimulatedApp:
    """Return what makes the ClientApp of real sites, each node by its own site.toml."""

    def locate(context: Context) -> Any:
        return read_site(files[int(context.node_config["partition-id"])])

    return lambda config, only="": (make_app(locate), len(files))


def leaks(folder: Path, *texts: str) -> list[str]:
    """Return where a canary is found: files under `folder` by name, and given texts by number."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(canary.encode() in path.read_bytes() for canary in CANARIES):
            found.append(str(path.relative_to(folder)))
    return found + [f"text {n}" for n, text in enumerate(texts) if any(canary in text for canary in CANARIES)]


def server_log(caplog: pytest.LogCaptureFixture) -> str:
    """Return what was logged, but for the client's own log, which stays at the site."""
    caplog.handler.setFormatter(None)
    return "\n".join(caplog.handler.format(record) for record in caplog.records if record.name != "tsugiki.client")


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass at every look at the server's clock: its waits end at once, and always alike."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), sleep=lambda pause: None)
    monkeypatch.setattr("tsugiki.server.engines.grid.time", clock)
    monkeypatch.setattr("tsugiki.server.run.roster.time", clock)
