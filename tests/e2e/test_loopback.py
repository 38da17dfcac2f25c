"""The same run as a Flower app over gRPC, with stock SuperNodes, ends with the bytes of the in-process engine."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.support.loopback import deployment
from tests.support.tiny import tiny_bert
from tsugiki.client.app import simulated_app
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.common.audit import verify
from tsugiki.common.config.files import to_run_config
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.server.run.simulate import simulate

MODEL = "tsugiki-tests/tiny-bert"


def _config(folder: Path, model: str, name: str) -> RunConfig:
    return parse(
        {
            "run": {"name": name, "rounds": 2, "output_dir": str(folder / "runs")},
            "model": {"name": model},
            "task": {"name": "sequence-classification", "max_length": 16},
            "train": {"learning_rate": 1e-2, "local_steps": 3, "per_device_train_batch_size": 4, "threads": 1},
            "evaluation": {"data": str(folder / "dev.csv")},
            "simulation": {"clients": 2, "data": str(folder / "train.csv")},
        }
    )


def _write(path: Path, texts: list[str], labels: list[int]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(texts, labels, strict=True))


def _site_file(folder: Path, name: str, texts: list[str], labels: list[int], model: str) -> Path:
    """Write what the simulated site of that name has, as a real site's folder."""
    folder.mkdir()
    _write(folder / "train.csv", texts, labels)
    site = folder / "site.toml"
    site.write_text(f'[site]\nname = "{name}"\n[data]\ntrain = "train.csv"\n[models]\n"{model}" = "{model}"\n')
    return site


@pytest.mark.e2e
def test_superlink_and_stock_supernodes_end_with_the_same_adapter_as_the_in_process_engine(tmp_path: Path) -> None:
    """Catches: state that only one engine has, an order that follows arrival, config that is lost on Flower's way."""
    model = str(tiny_bert(tmp_path / "model"))
    texts = [f"the {word} clause number {n}" for n in range(12) for word in ("good", "bad")]
    _write(tmp_path / "train.csv", texts, [1, 0] * 12)
    _write(tmp_path / "dev.csv", texts[:8], [1, 0] * 4)

    here = simulate(_config(tmp_path, model, "in-process"), simulated_app)

    deployed = _config(tmp_path, model, "deployed")
    sites = []
    for simulated in simulated_sites(_config(tmp_path, model, "in-process")):
        rows = [texts[row] for row in simulated.rows], [[1, 0][row % 2] for row in simulated.rows]
        sites.append(_site_file(tmp_path / simulated.name, simulated.name, *rows, model))
    with deployment(tmp_path / "flower", sites) as flower:
        output = flower.run(to_run_config(deployed), timeout_s=240)

    summary_file = tmp_path / "runs" / "deployed" / "summary.json"
    assert summary_file.is_file(), output[-3000:]
    there = json.loads(summary_file.read_text())
    assert there["rounds"] == 2
    assert there["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there["after"] == here.summary["after"]
    events = verify(tmp_path / "runs" / "deployed" / "audit.jsonl")
    assert sorted(event["site"] for event in events if event["event"] == "hello") == ["site-0", "site-1"]
