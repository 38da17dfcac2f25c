"""Does fine-tuning collapse? A naive recipe against the stable one, over seeds, in one place and federated.

    TSUGIKI_DATA=... python scripts/studies/stability.py --model FOLDER [--seeds 1 2 3 4 5] [--write docs/studies]

Japanese hotel reviews, 3 classes. FOLDER is multilingual-e5-small as `transformers` saves it; Houlsby modules of width
48 and a new head are trained. 800 reviews of the train part, the same for all, each seen twice: 200 steps of 8 in one
place, or 10 rounds of 10 steps of 4 at each of 4 IID sites. Reviews are cut after 24 tokens and have no "query: "
before them, with which this model was trained: the task knows no prefix.

Stable, the program's defaults: AdamW with bias correction, warm-up over the first tenth of all steps of the run, linear
decay to zero across rounds, a small learning rate; sites keep Adam's moments between rounds. Naive: a constant rate
without warm-up, Adam without bias correction and begun anew in each round, a large rate. What such a recipe does to a
large model: Mosbach et al. 2021, arXiv:2006.04884. The guard's bound on the length of an update is lifted, so that a
collapse is seen and not refused.

A run counts as collapsed if its accuracy on the test part is at most one point above the share of the largest class, or
its macro-F1 is at most 0.35 (always saying the largest class has 0.25, guessing by the shares 0.33). This rule was
written before any run. The last adapter counts; nothing is chosen on the test part. The classical baseline: TF-IDF on
the tokens of MeCab with UniDic (`fugashi`, `unidic-lite`) and LightGBM, both with their defaults, on the same rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines, write_atomically
from tsugiki.common.plots import BLUE, GREY, RED, new_figure, render, style
from tsugiki.common.rng import generator
from tsugiki.server.baselines import centralised
from tsugiki.server.run.simulate import simulate

SITES, ROUNDS, ROWS, PASSES = 4, 10, 800, 2
BATCH = {"centralised": 8, "federated": 4}
NAMES = {"1": "positive", "0": "neutral", "-1": "negative"}
NAIVE = {"bias_correction": False, "lr_schedule": "constant", "warmup_ratio": 0.0}
STABLE = {"persist_optimizer": True}
"""The rest are the program's defaults. In one place there is one round, and nothing to persist."""
RECIPES, PLACES = ("naive", "stable"), ("centralised", "federated")
LEAST_F1 = 0.35
"""A macro-F1 up to this is near chance."""

Review = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """What one run gave; accuracy in percent, seconds of the processor."""

    recipe: str
    place: str
    seed: int
    accuracy: float
    macro_f1: float
    seconds: float

    def collapsed(self, majority: float) -> bool:
        """Whether the run learned nothing, by the rule at the top; `majority` in percent."""
        return self.accuracy <= majority + 1.0 or self.macro_f1 <= LEAST_F1


def read_reviews(part: str) -> list[Review]:
    """Return class and text of each review of a part: train, dev or test."""
    path = Path(os.environ["TSUGIKI_DATA"]) / "ja_sentiment" / "jrte_pn.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        return [(NAMES[row[1]], row[2]) for row in csv.reader(file, delimiter="\t", quoting=3) if row[-1] == part]


def training_reviews() -> list[Review]:
    """Return the reviews that everything is trained on."""
    reviews = read_reviews("train")
    return [reviews[index] for index in generator(0, "training-reviews").permutation(len(reviews))[:ROWS]]


def write_reviews(reviews: list[Review], path: Path) -> str:
    """Write what the program reads; return where."""
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for label, text in reviews]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def configure(
    recipe: str, place: str, seed: int, files: dict[str, str], folder: Path, options: argparse.Namespace
) -> RunConfig:
    """Return one run, which sees every row `PASSES` times."""
    rates = options.naive_learning_rates if recipe == "naive" else options.stable_learning_rates
    config = parse(
        {
            "run": {"name": f"run-{time.time_ns()}", "rounds": ROUNDS, "seed": seed, "output_dir": str(folder)},
            "model": {"name": str(options.model.absolute())},
            "task": {
                "name": "sequence-classification",
                "labels": sorted(NAMES.values()),
                "max_length": 24,
                "pooling": "model",
                "train_pooler": False,
            },
            "adapter": {"method": "houlsby"},
            "train": {
                "learning_rate": rates[PLACES.index(place)],
                "per_device_train_batch_size": BATCH[place],
                "local_steps": ROWS * PASSES // (SITES * ROUNDS * BATCH[place]),
                "threads": 1,
                **(NAIVE if recipe == "naive" else STABLE),
            },
            "strategy": {"min_clients": SITES, "round_timeout_s": 36000.0, "max_update_norm": 1e9},
            "evaluation": {"data": files["test"], "every_rounds": 1000},
            "simulation": {"clients": SITES, "data": files["train"]},
        }
    )
    if place == "federated":
        return config
    evaluation = config.evaluation.model_dump(mode="json")
    return changed(centralised(config, SITES), {"evaluation": evaluation})  # it evaluates nothing by itself


def run(recipe: str, place: str, seed: int, files: dict[str, str], folder: Path, options: argparse.Namespace) -> Result:
    """Return what the last adapter of one run says of the test part."""
    started = time.process_time()
    outcome = simulate(configure(recipe, place, seed, files, folder, options), simulated_app)
    last = read_lines(outcome.folder / "metrics.jsonl")[-1]["eval"]
    seconds = time.process_time() - started
    result = Result(recipe, place, seed, 100 * last["accuracy"], last["macro_f1"], seconds)
    print(json.dumps(vars(result)), flush=True)
    return result


def classical(train: list[Review], test: list[Review]) -> Result:
    """Return what TF-IDF and LightGBM, with their defaults, make of the same rows; they have no use for a seed."""
    from fugashi import Tagger
    from lightgbm import LGBMClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import accuracy_score, f1_score

    started = time.process_time()
    tagger = Tagger()
    tfidf = TfidfVectorizer(tokenizer=lambda text: [word.surface for word in tagger(text)], token_pattern=None)
    model = LGBMClassifier(n_jobs=1, verbose=-1)
    model.fit(tfidf.fit_transform([text for _, text in train]).toarray(), [label for label, _ in train])
    predicted = model.predict(tfidf.transform([text for _, text in test]).toarray())
    truth = [label for label, _ in test]
    accuracy, f1 = accuracy_score(truth, predicted), f1_score(truth, predicted, average="macro")
    return Result("TF-IDF + LightGBM", "centralised", 0, 100 * accuracy, f1, time.process_time() - started)


def of(results: list[Result], recipe: str, place: str) -> list[Result]:
    """Return the runs of one cell."""
    return [one for one in results if (one.recipe, one.place) == (recipe, place)]


def table(results: list[Result], baseline: Result, majority: float) -> str:
    """Return the table in Markdown."""
    lines = [
        "| recipe | trained | mean accuracy | standard deviation | worst seed | macro-F1 | collapsed | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        for place in PLACES:
            cell = of(results, recipe, place)
            values = [one.accuracy for one in cell]
            lost = sum(one.collapsed(majority) for one in cell)
            spread = stdev(values) if len(values) > 1 else 0.0
            numbers = (
                f"{mean(values):.2f} | {spread:.2f} | {min(values):.2f} | {mean(one.macro_f1 for one in cell):.3f}"
            )
            seconds = mean(one.seconds for one in cell)
            lines.append(f"| {recipe} | {place} | {numbers} | {lost} of {len(cell)} | {seconds:.0f} |")
    numbers = f"{baseline.accuracy:.2f} | | {baseline.accuracy:.2f} | {baseline.macro_f1:.3f}"
    lines.append(f"| {baseline.recipe} | {baseline.place} | {numbers} | | {baseline.seconds:.0f} |")
    lines.append(f"| the largest class | | {majority:.2f} | | | | | |")
    return "\n".join(lines)


def judge(results: list[Result], baseline: Result, majority: float) -> list[Figure]:
    """Return the figures with their targets."""
    figures = [Figure("accuracy of TF-IDF + LightGBM", baseline.accuracy, "%", "", f"largest class {majority:.2f}")]
    for recipe in RECIPES:
        for place in PLACES:
            cell = of(results, recipe, place)
            values = [one.accuracy for one in cell]
            wanted = recipe == "stable"
            note = f"seeds {[one.seed for one in cell]}: {[round(value, 2) for value in values]}"
            name = f"{recipe}, {place}"
            figures.append(Figure(f"{name}: accuracy", mean(values), "%", "", note))
            lost = sum(one.collapsed(majority) for one in cell)
            figures.append(Figure(f"{name}: collapsed runs", lost, "", "<= 0" if wanted else "", f"of {len(cell)}"))
            if wanted:
                gain, low, high = interval([value - baseline.accuracy for value in values])
                note = f"95 % interval {low:.2f} to {high:.2f}; worst seed {min(values) - baseline.accuracy:.2f}"
                figures.append(Figure(f"{name}: gain on the classical baseline", gain, "points", ">= 0", note))
    return figures


def draw(results: list[Result], baseline: Result, majority: float, path: Path) -> None:
    """Write the figure: a dot for each seed."""
    with style():
        plot = new_figure(width_in=7, height_in=3.4)
        panel = plot.add_subplot()
        cells = [(recipe, place) for recipe in RECIPES for place in PLACES]
        for index, (recipe, place) in enumerate(cells):
            values = [one.accuracy for one in of(results, recipe, place)]
            offsets = [index + 0.06 * (place - (len(values) - 1) / 2) for place in range(len(values))]
            panel.scatter(offsets, values, s=24, color={"naive": RED, "stable": BLUE}[recipe])
        panel.axhline(baseline.accuracy, color=GREY, linestyle="--", linewidth=1, label="TF-IDF + LightGBM")
        panel.axhline(majority, color=GREY, linestyle=":", linewidth=1, label="always the largest class")
        panel.set_xticks(range(len(cells)), [f"{recipe},\n{place}" for recipe, place in cells])
        panel.set_ylabel("accuracy on the test part, %")
        panel.grid(visible=False, axis="x")
        panel.legend(loc="best")
        content = render(plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def write(page_table: str, options: argparse.Namespace, seconds: float, folder: Path) -> None:
    """Write the page."""
    command = "python scripts/studies/stability.py --model FOLDER --seeds " + " ".join(map(str, options.seeds))
    for name in RECIPES:
        command += f" --{name}-learning-rates " + " ".join(f"{r:g}" for r in getattr(options, f"{name}_learning_rates"))
    page = f"""# Training that does not collapse

{__doc__.strip().split(chr(10) * 2, 2)[2]}

`{command}`: {seconds / 60:.0f} minutes on one core, CPU only.

Accuracy in percent on the 553 reviews of the test part:

{page_table}

![Accuracy of each seed](stability.svg)
"""
    (folder / "stability.md").write_text(page, "utf-8")


def main() -> None:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of multilingual-e5-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    for recipe, rates in (("naive", [5e-3, 5e-3]), ("stable", [1e-3, 2e-3])):
        told = "in one place and federated"
        parser.add_argument(f"--{recipe}-learning-rates", type=float, nargs=2, default=rates, help=told)
    parser.add_argument("--part", choices=["dev", "test"], default="test", help="to evaluate on; dev to choose")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the page and the figure there")
    options = parser.parse_args()
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds ja_sentiment/")
    started = time.perf_counter()
    train, test = training_reviews(), read_reviews(options.part)
    majority = 100 * Counter(label for label, _ in test).most_common(1)[0][1] / len(test)
    baseline = classical(train, test)
    print(json.dumps(vars(baseline)), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "train": write_reviews(train, folder / "train.jsonl"),
            "test": write_reviews(test, folder / "test.jsonl"),
        }
        cells = [
            (seed, recipe, place) for seed in options.seeds for recipe in options.recipes for place in options.places
        ]
        results = [run(recipe, place, seed, files, folder, options) for seed, recipe, place in cells]
    if set(options.recipes) != set(RECIPES) or set(options.places) != set(PLACES):
        return
    page_table = table(results, baseline, majority)
    print(f"\n{page_table}")
    if options.write:
        draw(results, baseline, majority, options.write / "stability.svg")
        write(page_table, options, time.perf_counter() - started, options.write)
    show("Japanese reviews, naive and stable", judge(results, baseline, majority))


if __name__ == "__main__":
    main()
