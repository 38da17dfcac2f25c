"""Measure the local loop in real tokens per CPU second, beside other loops on the same model and the same rows.

    TSUGIKI_DATA=... python scripts/bench/training_speed.py [--repeats 3] [--data SST-2 LEDGAR STS-B] [--rows 1600]

all-MiniLM-L6-v2 with LoRA rank 8, one thread. Each loop trains one pass over the same rows, so that all see the same
real tokens; the loops take turns. Padding counts in the seconds alone.

- ours: `tsugiki.client.training.trainer.train` with `train.group_by_length = "auto"`, and once more without groups
- bare: a plain PyTorch loop; every batch is padded to `task.max_length`
- HF Trainer: `transformers.Trainer` with its random sampler, and with `train_sampling_strategy = "group_by_length"`;
  from its first step, without what it prepares
- sentence-transformers (STS-B): `SentenceTransformer.fit`, or where the package `datasets` is missing `old_fit`, the
  library's loop without it; both tokenise while they train
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import numpy as np
from figures import Figure, median, show, spread

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training import trainer
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Encoded

RATE = 1e-3


@dataclass(frozen=True)
class Source:
    """A data set: its file below TSUGIKI_DATA, its settings, and how many rows a pass has by default."""

    file: str
    sections: dict[str, Any]
    batch_size: int
    rows: int


SOURCES = {
    "SST-2": Source(
        "sst2/train.tsv",
        {
            "task": {"name": "sequence-classification", "num_labels": 2, "max_length": 64},
            "data": {"columns": {"text": "sentence"}, "quoting": "none"},
        },
        16,
        1600,
    ),
    "LEDGAR": Source(
        "legal/ledgar_test1000.jsonl",
        {"task": {"name": "sequence-classification", "max_length": 256}},
        8,
        320,
    ),
    "STS-B": Source(
        "stsb/stsb-en-train.csv",
        {
            "task": {"name": "sentence-embedding", "loss": "cosine-similarity", "score_max": 5.0, "max_length": 64},
            "data": {"header": False, "columns": {"sentence1": 0, "sentence2": 1, "score": 2}},
        },
        16,
        800,
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all loops over one data set share.

    Args:
        graft: the model.
        config: with one pass over the rows as a round.
        shard: the rows, as text.
        encoded: the same, tokenised.
        initial: the adapter that every loop starts from.
    """

    graft: Graft
    config: RunConfig
    shard: Shard
    encoded: Encoded
    initial: Any

    @classmethod
    def of(cls, name: str, folder: Path, rows: int) -> Bench:
        """Load a data set and the model."""
        source = SOURCES[name]
        file = folder / source.file
        task = dict(source.sections["task"])
        if name == "LEDGAR":
            task["labels"] = labels_of(file)
        config = parse(
            {
                **source.sections,
                "task": task,
                "train": {
                    "learning_rate": RATE,
                    "per_device_train_batch_size": source.batch_size,
                    "local_epochs": 1,
                    "threads": 1,
                    "device": "cpu",
                },
                "strategy": {"min_clients": 1},
                "simulation": {"data": str(file), "clients": 1, "rows": rows or source.rows},
            }
        )
        graft = load_graft(config, config.model.name, 1)
        shard = simulated_sites(config)[0].train_shard(graft.task)
        return cls(graft, config, shard, graft.task.encode(shard, graft.base), graft.read())

    def real_tokens(self) -> int:
        """Return the tokens of all rows, without padding."""
        return int(self.graft.task.lengths(self.encoded).sum())

    def batches(self) -> list[list[int]]:
        """Return one pass in random order, cut into batches."""
        order = np.random.default_rng(1).permutation(len(self.encoded)).tolist()
        size = self.config.train.per_device_train_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]


def labels_of(file: Path) -> list[str]:
    """Return the classes in a file of JSON lines."""
    import json

    return sorted({json.loads(line)["label"] for line in file.read_text(encoding="utf-8").splitlines()})


# The loops: each trains one pass and returns its CPU seconds.


def ours(bench: Bench, group_by_length: Any) -> float:
    """Train with our loop."""
    config = changed(bench.config, {"train.group_by_length": group_by_length})
    local_round = trainer.LocalRound(1, "site-0", 1, 0.0, 1.0)
    started = time.process_time()
    trainer.train(bench.graft, bench.encoded, config.train, local_round)
    return time.process_time() - started


def bare(bench: Bench) -> float:
    """Train with a plain loop, and every batch padded to the task's limit."""
    import torch

    graft = bench.graft
    limit = bench.config.task.max_length
    fill = {"input_ids": graft.base.tokenizer.pad_token_id}
    parameters = graft.parameters
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    graft.base.network.train()
    started = time.process_time()
    for rows in bench.batches():
        batch = graft.task.batch(bench.encoded, rows, graft.base)
        for name, value in batch.items():
            if value.ndim == 2:
                missing = (0, limit - value.shape[1])
                batch[name] = torch.nn.functional.pad(value, missing, value=fill.get(name.rpartition(".")[2], 0))
        graft.task.loss(graft.base.network, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.process_time() - started
    graft.base.network.eval()
    return seconds


class Rows(list[dict[str, Any]]):
    """A data set of dictionaries, as transformers' Trainer reads it."""


def hf_rows(bench: Bench) -> Rows:
    """Return the rows as lists of tokens; `input_ids` has the length of the whole row, by which HF groups."""
    texts = {name: rows.lists() for name, rows in bench.encoded.texts.items()}
    rows = Rows()
    for number in range(len(bench.encoded)):
        row: dict[str, Any] = {name: values[number] for name, values in texts.items()}
        row.setdefault("input_ids", [token for values in texts.values() for token in values[number]])
        row["labels"] = bench.encoded.targets[number].item()
        row["number"] = number
        rows.append(row)
    return rows


def hf_trainer(bench: Bench, strategy: str) -> float:
    """Train with transformers' Trainer, which makes its batches itself."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    task = bench.graft.task
    network = bench.graft.base.network
    tokenizer = bench.graft.base.tokenizer

    class Loss(torch.nn.Module):
        """The model with the task's loss, as Trainer calls it."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, **batch: Any) -> dict[str, Any]:
            return {"loss": task.loss(self.network, batch)}

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
        """CPU time from the first step to the end."""

        started = 0.0
        seconds = 0.0

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            """Start."""
            self.started = time.process_time()

        def on_train_end(self, *arguments: Any, **more: Any) -> None:
            """Stop."""
            self.seconds = time.process_time() - self.started

    padded = DataCollatorWithPadding(tokenizer)

    def collate(rows: Sequence[dict[str, Any]]) -> Any:
        # A pair of texts is two inputs, which no collator of transformers pads: it gets the task's own batch.
        if "sentence1" in rows[0]:
            return task.batch(bench.encoded, [row["number"] for row in rows], bench.graft.base)
        return padded([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=bench.config.train.per_device_train_batch_size,
            learning_rate=RATE,
            warmup_steps=0.1,
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy=strategy,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        Trainer(
            Loss(),
            arguments,
            data_collator=collate,
            train_dataset=hf_rows(bench),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    network.eval()
    return clock.seconds


def sentence_transformers(bench: Bench) -> float:
    """Train with the loop of sentence-transformers."""
    from sentence_transformers import InputExample
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from torch.utils.data import DataLoader

    network = bench.graft.base.network
    columns = bench.shard.columns
    pairs = zip(columns["sentence1"], columns["sentence2"], columns["score"], strict=True)
    rows: Any = [InputExample(texts=[first, second], label=score / 5) for first, second, score in pairs]
    loader = DataLoader(rows, shuffle=True, batch_size=bench.config.train.per_device_train_batch_size)
    train = network.fit if find_spec("datasets") else network.old_fit
    started = time.process_time()
    train(
        train_objectives=[(loader, CosineSimilarityLoss(network))],
        epochs=1,
        warmup_steps=len(loader) // 10,
        optimizer_params={"lr": RATE},
        weight_decay=0.0,
        max_grad_norm=1.0,
        show_progress_bar=False,
    )
    seconds = time.process_time() - started
    network.eval()
    return seconds


def loops(name: str) -> dict[str, Callable[[Bench], float]]:
    """Return the loops to compare on a data set, by name."""
    found: dict[str, Callable[[Bench], float]] = {
        "ours": lambda bench: ours(bench, "auto"),
        "ours, no groups": lambda bench: ours(bench, False),
        "bare, fixed padding": bare,
        "HF Trainer": lambda bench: hf_trainer(bench, "random"),
        "HF Trainer, grouped": lambda bench: hf_trainer(bench, "group_by_length"),
    }
    if name == "STS-B":
        found["sentence-transformers"] = sentence_transformers
    return found


def measure(name: str, folder: Path, rows: int, repeats: int, slow: bool) -> list[Figure]:
    """Return the figures of one data set."""
    import torch

    torch.set_num_threads(1)
    compared = loops(name)
    if not slow:
        del compared["bare, fixed padding"]
    few = Bench.of(name, folder, 32)
    for loop in compared.values():  # warms up
        few.graft.write(few.initial)
        loop(few)
    bench = Bench.of(name, folder, rows)
    tokens = bench.real_tokens()
    rates: dict[str, list[float]] = {loop: [] for loop in compared}
    for repeat in range(repeats):
        # In turns, and each time in another order: the machine's speed drifts.
        for loop in np.random.default_rng(repeat).permutation(list(compared)).tolist():
            bench.graft.write(bench.initial)
            rates[loop].append(tokens / compared[loop](bench))
            print(f"{name}, {loop}: {rates[loop][-1]:.0f} real tokens per CPU second", flush=True)
    best = max((loop for loop in rates if not loop.startswith("ours")), key=lambda loop: median(rates[loop]))
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates[best], strict=True)]
    notes = {loop: spread(found) if len(found) > 1 else "n = 1" for loop, found in rates.items()}
    speeds = [Figure(f"{name}: {loop}", median(rates[loop]), "tokens/s", "", notes[loop]) for loop in rates]
    over = "; ".join(f"{ratio:.3f}" for ratio in ratios)
    return [*speeds, Figure(f"{name}: ours over the best other ({best})", median(ratios), "ratio", ">= 1.0", over)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rows", type=int, default=0, help="rows of a pass; 0: as many as the data set's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="leave the loop with fixed padding out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(os.environ["TSUGIKI_DATA"])
    figures = []
    for name in options.data:
        figures += measure(name, folder, options.rows, options.repeats, not options.fast)
    show("Training speed, real tokens per CPU second", figures)


if __name__ == "__main__":
    main()
