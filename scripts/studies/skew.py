r"""Recipes against skewed sites, beside training in one place: two text tasks, all-MiniLM, Dirichlet 0.1 and 0.5.

    TSUGIKI_DATA=... python scripts/studies/skew.py --choose --out choose.jsonl
    TSUGIKI_DATA=... python scripts/studies/skew.py --seeds 1 2 3 --chosen choose.jsonl --out skew.jsonl

Five sites share the rows by Dirichlet draws of the classes' shares; LoRA of rank 8, everything that a recipe does not
name is the default, learning rates too. Training in one place takes equally many samples, starts with the same head in
closed form, and has a rate of its own: the best of `--rates` on the rows "tune-held", trained on the rows "tune" with
seed 7 (`--choose`; `scripts/learning_cases.py` has the parts). Figures are accuracies on the rows "test", after the
last round. A recipe may be 2 points behind one place.

Each training appends a line of JSON to the file, so that the study can be run in parts; a training that the file has
is not run again. `--read` trains nothing, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, interval, mean, show
from learning_cases import CASES, read_parts, task_section, write_rows

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.server.baselines import centralised
from tsugiki.server.run.simulate import simulate

SITES = 5
CHOOSING_SEED = 7
BEHIND = 2.0
"""Points that the recommended recipe may be behind one place."""

_MOMENTUM = {"name": "fedavgm", "server_momentum": 0.5}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "SGD, fedavgm 0.5": {"train": {"optimizer": "sgd"}, "strategy": _MOMENTUM},
    "random head, SGD, fedavgm 0.5": {
        "train": {"optimizer": "sgd"},
        "strategy": _MOMENTUM,
        "task": {"warm_head": "off"},
    },
    "random head": {"task": {"warm_head": "off"}},
    "losses not adjusted": {"task": {"logit_adjustment": "off"}},
    "fedprox": {"strategy": {"name": "fedprox"}},
    "svd": {"strategy": {"name": "svd"}},
    "flora": {"strategy": {"name": "flora"}},
}
"""What each recipe changes in the default run, by section. All but the random heads begin with a linear probe."""
RECOMMENDED = ("default", "random head, SGD, fedavgm 0.5")
"""What the program advises: nothing, if the run begins with a linear probe, because it adjusts the losses by itself."""
ONE_PLACE = "one place"

Line = dict[str, Any]


def configure(
    task: str, recipe: str, alpha: float, seed: int, files: Mapping[str, Path], options: argparse.Namespace
) -> RunConfig:
    """Return the run of a recipe on the rows of `files["train"]`."""
    change = RECIPES.get(recipe, {})
    rows = [row for part in read_parts(task).values() for row in part]
    tables: dict[str, Any] = {
        "run": {"name": f"{task}-{seed}", "rounds": options.rounds, "seed": seed},
        "task": task_section(task, rows) | change.get("task", {}),
        "train": {"local_steps": options.steps, "threads": 1, "device": "cpu", "precision": options.precision}
        | change.get("train", {}),
        "strategy": change.get("strategy", {}),
        "evaluation": {"data": str(files["held"]), "every_rounds": options.rounds},
        "simulation": {
            "clients": SITES,
            "data": str(files["train"]),
            "partition": "dirichlet",
            "dirichlet_alpha": alpha,
        },
    }
    tables["run"]["output_dir"] = str(files["train"].parent)
    return parse(tables, "skew.py")


def in_one_place(config: RunConfig, rate: float) -> RunConfig:
    """Return the run with all rows in one place, at a rate of its own."""
    return changed(centralised(config, SITES), {"train.learning_rate": rate})


def train(config: RunConfig, about: Line) -> Line:
    """Return the line of one training: accuracy before and after it, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        outcome = simulate(changed(config, {"run.output_dir": folder}), simulated_app)
        lines = read_lines(outcome.folder / "metrics.jsonl")
    found = [100 * line["eval"]["accuracy"] for line in lines if "eval" in line]
    cosine = next((line["update_cosine"] for line in lines if "update_cosine" in line), None)
    label_skew = lines[0].get("warm_head", {}).get("label_skew")
    line = {**about, "rate": outcome.summary["learning_rate"], "before": found[0], "test": found[-1]}
    line |= {"update_cosine": cosine, "label_skew": label_skew, "cpu_s": round(time.process_time() - started, 1)}
    return line


def chosen_rate(task: str, lines: Sequence[Line]) -> float:
    """Return the best rate in one place of those that were tried."""
    tried = {line["tried"]: line["test"] for line in lines if line["task"] == task}
    if not tried:
        raise SystemExit(f"run --choose for {task} first")
    return float(max(tried, key=lambda rate: tried[rate]))


def run_task(task: str, folder: Path, options: argparse.Namespace) -> None:
    """Run the trainings of a task that the file of results lacks."""
    parts = read_parts(task)
    train_part = "tune" if options.choose else "train"
    held_part = "tune-held" if options.choose else "test"
    files = {
        "train": write_rows(parts[train_part], folder / f"{task}-{train_part}.jsonl"),
        "held": write_rows(parts[held_part], folder / f"{task}-{held_part}.jsonl"),
    }

    def done(about: Line) -> bool:
        known = read_lines(options.out) if options.out.exists() else []
        return any(about.items() <= line.items() for line in known)

    def keep(config: RunConfig, about: Line) -> None:
        line = train(config, about)
        print(json.dumps(line), flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    if options.choose:
        for rate in options.rates:
            about = {"task": task, "kind": "choose", "seed": CHOOSING_SEED, "tried": rate}
            if not done(about):
                keep(in_one_place(configure(task, "", 0.5, CHOOSING_SEED, files, options), rate), about)
        return
    rate = chosen_rate(task, read_lines(options.chosen))
    for seed in options.seeds:
        about = {"task": task, "recipe": ONE_PLACE, "seed": seed}
        if not done(about):
            keep(in_one_place(configure(task, "", 0.5, seed, files, options), rate), about)
        for recipe in options.recipes:
            for alpha in options.alphas:
                about = {"task": task, "recipe": recipe, "alpha": alpha, "seed": seed}
                if not done(about):
                    keep(configure(task, recipe, alpha, seed, files, options), about)


def table(lines: Sequence[Line], alphas: Sequence[float]) -> str:
    """Return a table for docs/skew.md: accuracy in percent, mean and 95 % interval over the seeds."""
    tasks = sorted({line["task"] for line in lines})
    columns = [(task, alpha) for task in tasks for alpha in alphas]
    head = ["recipe", *(f"{task}, {alpha:g}" for task, alpha in columns)]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for recipe in (ONE_PLACE, *RECIPES):
        cells = []
        for task, alpha in columns:
            own = [line["test"] for line in _of(lines, task, recipe, alpha)]
            cells.append("not run")
            if own:
                centre, low, high = interval(own)
                cells[-1] = f"{centre:.1f} ({low:.1f} to {high:.1f})"
        text.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(text)


def _of(lines: Sequence[Line], task: str, recipe: str, alpha: float) -> list[Line]:
    """Return the lines of a recipe, by seed. One place has the same rows whatever alpha is."""
    found = [line for line in lines if (line["task"], line.get("recipe")) == (task, recipe)]
    return sorted((line for line in found if line.get("alpha", alpha) == alpha), key=lambda line: line["seed"])


def figures_of(lines: Sequence[Line], alphas: Sequence[float]) -> list[Figure]:
    """Return how far each recipe is behind one place, paired by seed."""
    figures = []
    for task in sorted({line["task"] for line in lines}):
        place = {line["seed"]: line["test"] for line in _of(lines, task, ONE_PLACE, 0.0)}
        for alpha in alphas:
            for recipe in RECIPES:
                own = {line["seed"]: line["test"] for line in _of(lines, task, recipe, alpha)}
                behind = [place[seed] - value for seed, value in own.items() if seed in place]
                if not behind:
                    continue
                centre, low, high = interval(behind)
                target = f"<= {BEHIND}" if recipe in RECOMMENDED else ""
                note = f"95 % {low:.2f} to {high:.2f}; accuracy {mean(list(own.values())):.2f} %"
                figures.append(Figure(f"{task}, Dirichlet {alpha:g}: {recipe}, behind", centre, "points", target, note))
    return figures


def main() -> None:
    """Run what the file lacks, and print the tables of all its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    classes = sorted(name for name, case in CASES.items() if case.has_classes)
    parser.add_argument("--tasks", nargs="+", default=["titles", "sst2"], choices=classes)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of a site in a round")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument(
        "--choose", action="store_true", help="try --rates in one place, on other rows and another seed"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[7e-4, 2e-3, 7e-3])
    parser.add_argument("--chosen", type=Path, default=Path("choose.jsonl"), help="what --choose wrote")
    parser.add_argument("--out", type=Path, default=Path("skew.jsonl"))
    parser.add_argument("--read", action="store_true", help="print the tables of the lines that are there")
    options = parser.parse_args()
    if not options.read:
        with tempfile.TemporaryDirectory() as folder:
            for task in options.tasks:
                run_task(task, Path(folder), options)
    if options.choose:
        return
    lines = read_lines(options.out)
    print(f"\n{table(lines, options.alphas)}\n")
    show("Skewed sites, against one place", figures_of(lines, options.alphas))


if __name__ == "__main__":
    main()
