"""Does training on batches by length cost accuracy? Runs with and without `train.group_by_length`, seed by seed.

    TSUGIKI_DATA=... python scripts/studies/group_by_length.py [--seeds 1 2 3] [--rounds 5] [--steps 20]

all-MiniLM-L6-v2, LoRA rank 8, 4 IID sites, batches of 16; SST-2, SNLI (trained on its validation part, because its
train part is not among the data) and STS-B. Both runs of a seed have the same rows, initial values and schedule. The
last adapter counts, on rows that nothing was chosen on: 800 of the test part (--held-out).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.server.run.simulate import simulate

TASKS: dict[str, dict[str, Any]] = {
    "SST-2": {
        "files": ("sst2/train.tsv", "sst2/test.tsv"),
        "task": {"name": "sequence-classification", "num_labels": 2, "max_length": 64},
        "data": {"columns": {"text": "sentence"}, "quoting": "none"},
        "metric": "accuracy",
        "rate": 2e-3,
    },
    "SNLI": {
        "files": ("snli/validation.tsv", "snli/test.tsv"),
        "task": {"name": "sequence-classification", "num_labels": 3, "max_length": 64, "pair": True},
        "data": {"columns": {"text": "premise", "text_pair": "hypothesis"}},
        "metric": "accuracy",
        "rate": 2e-3,
    },
    "STS-B": {
        "files": ("stsb/stsb-en-train.csv", "stsb/stsb-en-test.csv"),
        "task": {"name": "sentence-embedding", "loss": "cosine-similarity", "score_max": 5.0, "max_length": 64},
        "data": {"header": False, "columns": {"sentence1": 0, "sentence2": 1, "score": 2}},
        "metric": "pearson",
        "rate": 1e-3,
    },
}


def first_lines(source: Path, count: int, header: bool, target: Path) -> Path:
    """Write the first rows of a file to another one; 0: all rows."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    if count:
        lines = lines[: count + header]
    target.write_text("".join(lines), encoding="utf-8")
    return target


def configure(name: str, seed: int, grouped: bool, folder: Path, options: argparse.Namespace) -> RunConfig:
    """Return one run."""
    settings = TASKS[name]
    data = Path(os.environ["TSUGIKI_DATA"])
    train, test = settings["files"]
    held_out = first_lines(
        data / test, options.held_out, settings["data"].get("header", True), folder / f"{name}-{Path(test).name}"
    )
    return parse(
        {
            "run": {
                "name": f"{name.lower()}-{seed}-{'grouped' if grouped else 'random'}",
                "rounds": options.rounds,
                "seed": seed,
                "output_dir": str(folder / "runs"),
            },
            "task": settings["task"],
            "data": settings["data"],
            "train": {
                "learning_rate": settings["rate"],
                "local_steps": options.steps,
                "group_by_length": grouped,
                "threads": 1,
                "device": "cpu",
            },
            "strategy": {"min_clients": 4},
            "evaluation": {"data": str(held_out), "every_rounds": options.rounds},
            "simulation": {"clients": 4, "data": str(data / train), "rows": options.rows},
        }
    )


def run(name: str, seed: int, grouped: bool, folder: Path, options: argparse.Namespace) -> float:
    """Return the metric of a run's last adapter."""
    config = configure(name, seed, grouped, folder, options)
    outcome = simulate(config, simulated_app)
    return float(read_lines(outcome.folder / "metrics.jsonl")[-1]["eval"][TASKS[name]["metric"]])


def study(name: str, folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Return the figures of one task: both means, and the paired difference."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in options.seeds:
        for grouped in (True, False):
            value = run(name, seed, grouped, folder, options)
            found[grouped].append(value)
            print(f"{name} seed {seed} grouped={grouped}: {value:.4f}", flush=True)
    differences = [100 * (mine - other) for mine, other in zip(found[True], found[False], strict=True)]
    centre, low, high = interval(differences)
    metric = TASKS[name]["metric"]
    each = ", ".join(f"{difference:+.2f}" for difference in differences)
    return [
        Figure(f"{name}: {metric}, by length", mean(found[True])),
        Figure(f"{name}: {metric}, at random", mean(found[False])),
        Figure(f"{name}: difference", centre, "points", "", f"95 % {low:+.2f} to {high:+.2f}; by seed {each}"),
    ]


def main() -> None:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of a site in a round")
    parser.add_argument("--rows", type=int, default=0, help="training rows, drawn by the seed; 0: all")
    parser.add_argument("--held-out", type=int, default=800, help="rows of the test part; 0: all")
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.tasks:
            figures += study(name, Path(folder), options)
    show("Batches by length, against batches at random", figures)


if __name__ == "__main__":
    main()
