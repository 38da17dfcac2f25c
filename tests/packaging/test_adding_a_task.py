"""docs/adding-a-task.md is followed to the letter: one file, and a federation trains on the new task."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.tiny import tiny_bert

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-a-task.md"

RUN = """
import sys, tomllib
from pathlib import Path
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.common.tasks import TASKS
from tsugiki.server.run.simulate import simulate

assert "text-regression" in TASKS.names()
raw = tomllib.loads(Path("run.toml").read_text())
outcome = simulate(parse(raw), simulated_app)
before, after = outcome.summary["before"]["mse"], outcome.summary["after"]["mse"]
print(outcome.summary["monitor"], outcome.summary["head_parameters"], after < before)
"""


def test_the_page_makes_a_task_that_trains(tmp_path: Path) -> None:
    """Catches: a list of tasks that has to be edited, a page that has fallen behind the code."""
    blocks = re.findall(r"```(python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "toml"]
    for package in ("tsugiki", "common", "client", "server"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)  # a checkout is known by it
    (tmp_path / "common" / "tasks" / "text_regression.py").write_text(blocks[0][1])
    rows = [f"the {word} clause number {n},{score}" for n in range(12) for word, score in (("good", 1.0), ("bad", 0.0))]
    (tmp_path / "data.csv").write_text("\n".join(["text,score", *rows]) + "\n")
    tiny_bert(tmp_path / "model")
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "toy"\nrounds = 3\n[model]\nname = "model"\n'
        "[train]\nlearning_rate = 1e-2\nlocal_steps = 10\nper_device_train_batch_size = 8\nthreads = 1\n"
        '[simulation]\nclients = 2\ndata = "data.csv"\n[evaluation]\ndata = "data.csv"\n' + blocks[1][1]
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
    assert done.stdout.split() == ["mse", "33", "True"]
