r"""Sweep learning rates of adapter methods, to choose `train.learning_rate = "auto"`.

    TSUGIKI_DATA=... python scripts/studies/default_rates.py --cases sst2 stsb --methods lora --optimizers adamw \\
        --rates 7e-4 2e-3 7e-3 --steps 100 --out rates.jsonl [--stories FOLDER]

One site, batches of 16, four rounds, seed 7, on rows that no report uses (`scripts/learning_cases.py`, parts "tune" and
"tune-held"): the rate decays over the whole run as in any other. Each training appends a line of JSON to the file; the
table at the end is made of all lines in it. `--read` trains nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from learning_cases import CASES, JAPANESE, STORIES, read_parts, task_section, write_rows

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TsugikiError
from tsugiki.common.files import read_lines
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.simulate import simulate

ROUNDS = 4
SEED = 7


def run_file(case: str, folder: Path, bases: dict[str, str], steps: int) -> dict[str, Any]:
    """Return the tables of a run of one site on the rows for tuning."""
    parts = read_parts(case)
    task = task_section(case, parts["tune"])
    if CASES[case].has_classes:
        task["warm_head"] = "off"  # a rate must be good where a head starts at random, too
    held = write_rows(parts["tune-held"], folder / f"{case}-held.jsonl")
    return {
        "run": {"rounds": ROUNDS, "seed": SEED, "output_dir": str(folder)},
        "model": {"name": bases.get(CASES[case].base, CASES[case].base)},
        "task": task,
        "train": {"local_steps": max(1, steps // ROUNDS), "threads": 1, "device": "cpu"},
        "strategy": {"min_clients": 1, "max_update_norm": 1e9},
        "evaluation": {"data": str(held), "every_rounds": 1000},
        "simulation": {"clients": 1, "data": str(write_rows(parts["tune"], folder / f"{case}.jsonl"))},
    }


def configure(raw: dict[str, Any], method: str, optimizer: str, rate: float, head: float, name: str) -> RunConfig:
    """Return the run at one rate; `head` 0: the head's rate is the same."""
    rates: dict[str, Any] = {"optimizer": optimizer, "learning_rate": rate}
    if head:
        rates["head_learning_rate"] = head
    tables = {
        **raw,
        "run": {**raw["run"], "name": name},
        "adapter": {"method": method},
        "train": {**raw["train"], **rates},
    }
    return parse(tables, "default_rates.py")


def measure(config: RunConfig, metric: str) -> tuple[float, float]:
    """Return the metric before training and after the last round; after: not a number if training diverged."""
    try:
        outcome = simulate(config, simulated_app, progress=Progress())
    except TsugikiError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return math.nan, math.nan
    found = [line["eval"][metric] for line in read_lines(outcome.folder / "metrics.jsonl") if "eval" in line]
    return found[0], found[-1]


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each case, method, optimizer and number of steps."""
    keys = ("case", "method", "optimizer", "steps")
    text = ["| case | method | optimizer | steps | metric | before | rate: metric after |", "|---" * 7 + "|"]
    lines = sorted(lines, key=lambda line: (*(line[key] for key in keys), line["rate"], line["head_rate"]))
    for group, found in itertools.groupby(lines, key=lambda line: tuple(line[key] for key in keys)):
        cells = list(found)
        after = ", ".join(f"{_rates(cell)}: {cell['after']:.3f}" for cell in cells)
        text.append(f"| {' | '.join(map(str, group))} | {cells[0]['metric']} | {cells[0]['before']:.3f} | {after} |")
    return "\n".join(text)


def _rates(cell: dict[str, Any]) -> str:
    head = f" (head {cell['head_rate']:g})" if cell["head_rate"] else ""
    return f"{cell['rate']:g}{head}"


def main() -> None:
    """Train at each rate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["sst2", "stsb"], choices=sorted(CASES))
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--rates", type=float, nargs="+", default=[7e-4, 2e-3, 7e-3])
    parser.add_argument("--head-factors", type=float, nargs="+", default=[0.0], help="times the rate; 0: the same rate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("default_rates.jsonl"))
    parser.add_argument("--stories", default="runs/stories260k", help="folder of stories260K")
    parser.add_argument("--japanese", default="", help="folder of multilingual-e5-small, for the case reviews")
    parser.add_argument("--read", action="store_true", help="print the table of the lines that are there")
    options = parser.parse_args()
    bases = {STORIES: options.stories, JAPANESE: options.japanese}
    if not options.read:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for case in options.cases:
                raw = run_file(case, folder, bases, options.steps)
                choices = (options.methods, options.optimizers, options.rates, options.head_factors)
                for number, (method, optimizer, rate, factor) in enumerate(itertools.product(*choices)):
                    config = configure(raw, method, optimizer, rate, rate * factor, f"{case}-{number}")
                    started = time.process_time()
                    before, after = measure(config, CASES[case].metric)
                    line = {
                        "case": case,
                        "method": method,
                        "optimizer": optimizer,
                        "steps": options.steps,
                        "rate": rate,
                        "head_rate": rate * factor,
                        "metric": CASES[case].metric,
                        "before": before,
                        "after": after,
                        "cpu_s": round(time.process_time() - started, 1),
                    }
                    print(json.dumps(line), flush=True)
                    with options.out.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(line) + "\n")
    print(table(read_lines(options.out)))


if __name__ == "__main__":
    main()
