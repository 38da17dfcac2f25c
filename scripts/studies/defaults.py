r"""The untouched default file against the best of a sweep over learning rates, and against logistic regression.

    TSUGIKI_DATA=... python scripts/studies/defaults.py --task sst2 --seeds 1 2 3 --rates 7e-4 2e-3 7e-3 \
        --rounds 10 --steps 50 --out defaults.jsonl [--stories FOLDER] [--japanese FOLDER]

Four IID sites. The run file names the base, the task and the data, and nothing else; `--rounds` and `--steps` shorten
all trainings alike. The sweep changes `train.learning_rate` alone. Which rate is best is chosen on the rows "dev" of
`scripts/learning_cases.py`, by the mean over the seeds, and every figure is of the rows "test", after the last round.
Where there are classes, a logistic regression (scikit-learn, or L-BFGS of torch where that is not installed) on the
untouched base's mean-pooled outputs is trained on the same rows; its regularisation is chosen on "dev". Neither the
tasks' rows nor their seeds chose the defaults (`scripts/studies/default_rates.py`: seed 7, the rows "tune").

Each training appends a line of JSON to the file, so that the study can be run in parts; a training that the file has
is not run again. `--read` trains nothing, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from figures import Figure, interval, mean, show
from learning_cases import CASES, JAPANESE, STORIES, Row, read_parts, task_section, write_rows

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TsugikiError
from tsugiki.common.files import read_lines
from tsugiki.common.model.find import find
from tsugiki.common.model.load import load_graft
from tsugiki.server.run.evaluate import make_evaluator
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.simulate import simulate

SITES = 4
REGULARISATION = (0.1, 1.0, 10.0, 100.0)
"""Inverse weights of the L2 penalty that the logistic regression chooses from."""

Line = dict[str, Any]


class Study:
    """The trainings of one task.

    Args:
        task: a name of `CASES`.
        folder: for rows and runs.
        options: of the command line.
    """

    def __init__(self, task: str, folder: Path, options: argparse.Namespace) -> None:
        self.task = task
        self.case = CASES[task]
        self.folder = folder
        self.options = options
        self.rows = read_parts(task)
        self.files = {part: write_rows(rows, folder / f"{task}-{part}.jsonl") for part, rows in self.rows.items()}

    @property
    def base(self) -> str:
        """The source of the base."""
        given = {STORIES: self.options.stories, JAPANESE: self.options.japanese}
        found = given.get(self.case.base, self.case.base)
        if not found:
            raise SystemExit(f"{self.task} needs --japanese FOLDER")
        return str(found)

    def configure(self, seed: int, rate: float, name: str) -> RunConfig:
        """Return the default run of a seed; `rate` 0: untouched."""
        train: dict[str, Any] = {"threads": self.options.threads, "device": "cpu"}
        run: dict[str, Any] = {"name": name, "seed": seed, "output_dir": str(self.folder)}
        if self.options.steps:
            train["local_steps"] = self.options.steps
        if self.options.rounds:
            run["rounds"] = self.options.rounds
        if rate:
            train["learning_rate"] = rate
        tables = {
            "run": run,
            "model": {"name": self.base},
            "task": task_section(self.task, [*self.rows["train"], *self.rows["dev"], *self.rows["test"]]),
            "train": train,
            "evaluation": {"data": str(self.files["test"]), "every_rounds": 100_000},
            "simulation": {"clients": SITES, "data": str(self.files["train"])},
        }
        return parse(tables, "defaults.py")

    def train(self, seed: int, rate: float) -> Line:
        """Return the line of one federation: the metric on "test" and on "dev"; not numbers if training diverged."""
        config = self.configure(seed, rate, f"{self.task}-{seed}-{rate:g}")
        started = time.process_time()
        line: Line = {"task": self.task, "kind": "sweep" if rate else "default", "seed": seed, "rate": rate}
        line |= {"rounds": config.run.rounds, "steps": config.train.local_steps}
        try:
            outcome = simulate(config, simulated_app, progress=Progress())
        except TsugikiError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return {**line, "before": math.nan, "test": math.nan, "dev": math.nan}
        found = [one["eval"][self.case.metric] for one in read_lines(outcome.folder / "metrics.jsonl") if "eval" in one]
        on_dev = changed(config, {"evaluation.data": str(self.files["dev"])})
        evaluate = make_evaluator(load_graft(config, config.model.name, seed), on_dev)
        assert evaluate is not None  # noqa: S101  # there is a file
        dev = evaluate(outcome.state.vector)[self.case.metric]
        line |= {"before": found[0], "test": found[-1], "dev": dev, "taken": outcome.summary["learning_rate"]}
        return {**line, "cpu_s": round(time.process_time() - started, 1)}

    def probe(self) -> Line:
        """Return the line of the logistic regression on frozen, mean-pooled outputs."""
        started = time.process_time()
        features = {part: self.embed(self.rows[part]) for part in ("train", "dev", "test")}
        names = sorted({row["label"] for rows in self.rows.values() for row in rows})
        labels = {part: np.array([names.index(row["label"]) for row in self.rows[part]]) for part in features}
        best: tuple[float, float] = (-1.0, 0.0)
        for strength in REGULARISATION:
            predict = regression(features["train"], labels["train"], strength)
            scores = [float((predict(features[part]) == labels[part]).mean()) for part in ("dev", "test")]
            best = max(best, (scores[0], scores[1]))
        line = {"task": self.task, "kind": "regression", "seed": 0, "rate": 0.0, "dev": best[0], "test": best[1]}
        return {**line, "cpu_s": round(time.process_time() - started, 1)}

    def embed(self, rows: Sequence[Row]) -> Any:
        """Return mean-pooled outputs of the untouched base; of a pair u, v: u, v, |u - v| and u * v."""
        first = _embed(self.base, [row["text"] for row in rows])
        if "text_pair" not in rows[0]:
            return first
        second = _embed(self.base, [row["text_pair"] for row in rows])
        return np.concatenate([first, second, np.abs(first - second), first * second], axis=1)


def _embed(source: str, texts: Sequence[str]) -> Any:
    """Return the mean of the last hidden states over each text's tokens, at length 1, shape (texts, width)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = find(source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer(
            [texts[index] for index in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        found[chosen] = means.numpy()
    return found


def regression(features: Any, labels: Any, strength: float) -> Any:
    """Return what predicts classes by a logistic regression with the inverse penalty `strength`."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return _regression_of_torch(features, labels, strength)
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(features, labels)
    return fitted.predict


def _regression_of_torch(features: Any, labels: Any, strength: float) -> Any:
    import torch

    inputs = torch.from_numpy(features)
    targets = torch.from_numpy(labels)
    layer = torch.nn.Linear(inputs.shape[1], int(targets.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        # scikit-learn's objective: the sum of the losses, and |W|^2 / (2 C)
        loss = torch.nn.functional.cross_entropy(layer(inputs), targets, reduction="sum")
        loss = loss + layer.weight.square().sum() / (2 * strength)
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda values: layer(torch.from_numpy(values)).argmax(1).numpy()


def figures_of(task: str, lines: Sequence[Line]) -> list[Figure]:
    """Return the figures of a task: the default, the best of the sweep, how far apart they are, the regression."""
    case = CASES[task]
    default = {line["seed"]: line for line in lines if line["kind"] == "default"}
    rates = sorted({line["rate"] for line in lines if line["kind"] == "sweep"})
    sweep = {
        rate: {one["seed"]: one for one in lines if one["kind"] == "sweep" and one["rate"] == rate} for rate in rates
    }
    if not default:
        return []
    unit = "%" if case.higher_is_better else ""
    scale = 100 if case.higher_is_better else 1
    values = [scale * line["test"] for line in default.values()]
    centre, low, high = interval(values)
    taken = sorted({line.get("taken", math.nan) for line in default.values()})
    note = (
        f"95 % interval {low:.2f} to {high:.2f}, seeds {sorted(default)}, rate {', '.join(f'{one:g}' for one in taken)}"
    )
    figures = [Figure(f"{task}: untouched default, {case.metric}", centre, unit, "", note)]
    whole = {rate: found for rate, found in sweep.items() if set(found) >= set(default)}
    if whole:
        figures += _against_sweep(task, default, whole, scale)
    for line in (one for one in lines if one["kind"] == "regression"):
        bound = f">= {scale * line['test']:.2f}" if task in ("ledgar", "reviews") else ""
        name = f"{task}: default, beside the regression's {scale * line['test']:.2f}"
        figures.append(Figure(name, centre, unit, bound, "logistic regression on frozen embeddings"))
    return figures


def _against_sweep(
    task: str, default: dict[int, Line], sweep: dict[float, dict[int, Line]], scale: int
) -> list[Figure]:
    """Return the best rate's figure, and the default's distance to it, paired by seed."""
    sign = 1 if CASES[task].higher_is_better else -1

    def dev(rate: float) -> float:
        value = sign * mean([sweep[rate][seed]["dev"] for seed in default])
        return value if math.isfinite(value) else -math.inf

    best = max(sweep, key=dev)
    after = {seed: sweep[best][seed]["test"] for seed in default}
    behind = [sign * scale * (after[seed] - line["test"]) for seed, line in default.items()]
    target = "<= 1.0"
    unit = "points"
    if sign < 0:  # a loss: in percent of the improvement
        behind = [100 * (line["test"] - after[seed]) / (line["before"] - after[seed]) for seed, line in default.items()]
        target = "<= 2.0"
        unit = "% of gain"
    centre, low, high = interval(behind)
    tried = ", ".join(
        f"{rate:g}: {scale * mean([one['test'] for one in found.values()]):.2f}" for rate, found in sweep.items()
    )
    return [
        Figure(f"{task}: best of the sweep", scale * mean(list(after.values())), "", "", f"rate {best:g} of {tried}"),
        Figure(f"{task}: default behind it", centre, unit, target, f"95 % interval {low:.2f} to {high:.2f}"),
    ]


def main() -> None:
    """Run what the file lacks, and print the figures of all its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=sorted(CASES), choices=sorted(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-4, 7e-4, 2e-3, 7e-3, 2e-2])
    parser.add_argument("--rounds", type=int, default=0, help="0: the default")
    parser.add_argument("--steps", type=int, default=0, help="of a site in a round; 0: the default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument("--stories", default="runs/stories260k", help="folder of stories260K")
    parser.add_argument("--japanese", default="", help="folder of multilingual-e5-small, for the task reviews")
    parser.add_argument("--no-regression", action="store_true")
    parser.add_argument("--read", action="store_true", help="print the figures of the lines that are there")
    options = parser.parse_args()
    if not options.read:
        with tempfile.TemporaryDirectory() as folder:
            for task in options.task:
                run_task(Study(task, Path(folder), options))
    lines = read_lines(options.out)
    figures = [
        figure for task in options.task for figure in figures_of(task, [one for one in lines if one["task"] == task])
    ]
    show("defaults against a sweep, 4 IID sites", figures)


def run_task(study: Study) -> None:
    """Run the trainings of a task that the file of results lacks."""
    out = study.options.out
    known = read_lines(out) if out.exists() else []
    done = {(one["task"], one["kind"], one["seed"], one["rate"]) for one in known}

    def keep(line: Line) -> None:
        print(json.dumps(line), flush=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    if study.case.has_classes and not study.options.no_regression and (study.task, "regression", 0, 0.0) not in done:
        keep(study.probe())
    for seed in study.options.seeds:
        if (study.task, "default", seed, 0.0) not in done:
            keep(study.train(seed, 0.0))
        default = next(
            one for one in read_lines(out) if (one["task"], one["kind"], one["seed"]) == (study.task, "default", seed)
        )
        for rate in study.options.rates:
            if (study.task, "sweep", seed, rate) in done:
                continue
            # a run at the rate that the default took ends with the default's bytes
            same = rate == default.get("taken")
            keep({**default, "kind": "sweep", "rate": rate} if same else study.train(seed, rate))


if __name__ == "__main__":
    main()
