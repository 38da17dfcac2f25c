"""docs/adding-a-strategy.md is followed to the letter: one file, and a federation is averaged by the new strategy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT
from tests.support.tiny import tiny_bert

PAGE = ROOT / "docs" / "adding-a-strategy.md"

RUN = """
import tomllib
from pathlib import Path
import numpy as np
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.common.strategies import WeightedUpdate, strategy_of
from tsugiki.server.run.simulate import simulate

config = parse(tomllib.loads(Path("run.toml").read_text()))
strategy = strategy_of(config.strategy)
ones = np.ones(4, np.float32)
updates = [WeightedUpdate("a", ones, 1), WeightedUpdate("b", -ones, 1), WeightedUpdate("c", 100 * ones, 1)]
step = strategy.combine(type("Spec", (), {"size": 4}), 0 * ones, ones, updates, None)
outcome = simulate(config, simulated_app)
before, after = outcome.summary["before"]["loss"], outcome.summary["after"]["loss"]
print(outcome.summary["strategy"], config.strategy.longest, step.round(2).tolist(), after < before)
"""


def test_the_page_makes_a_strategy_that_trains(tmp_path: Path) -> None:
    """Catches: a list of strategies that has to be edited, a page that has fallen behind the code."""
    blocks = re.findall(r"```(python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "toml", "toml"]
    for package in ("tsugiki", "common", "client", "server"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # a checkout is known by it
    (tmp_path / "common" / "strategies" / "capped.py").write_text(blocks[0][1])
    rows = [f"the {word} clause number {n},{label}" for n in range(12) for word, label in (("good", 1), ("bad", 0))]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    tiny_bert(tmp_path / "model")
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "toy"\nrounds = 2\n[model]\nname = "model"\n'
        "[train]\nlearning_rate = 1e-2\nlocal_steps = 10\nper_device_train_batch_size = 8\nthreads = 1\n"
        '[task]\nwarm_head = "off"\n[simulation]\nclients = 2\ndata = "data.csv"\n[evaluation]\ndata = "data.csv"\n'
        + blocks[1][1]
    )

    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    # (1 - 1 + 1.5) / 3: the third update is scaled down to 1.5 times the median length
    assert done.stdout.strip() == "capped-mean 1.5 [0.5, 0.5, 0.5, 0.5] True"
