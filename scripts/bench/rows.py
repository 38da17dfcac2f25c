"""Measure the memory that tokenised rows take, and the CPU time of tokenising them beside the tokenizer alone.

    python scripts/bench/rows.py [--rows 100000] [--repeats 3]

Generated texts of 8 to 40 words, the tokenizer of all-MiniLM, one thread. Kept is what the arrays hold. Resident is how
far the process has grown after the first pass (VmRSS of proc(5)): it includes what the tokenizer returned for a slice,
so it falls with the number of rows. The tokenizer alone is `encode_batch` of `tokenizers` on the same slices, whose
result is thrown away.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from figures import Figure, median, show, spread

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.tasks.text import SLICE_ROWS

WORDS = [
    "the",
    "agreement",
    "shall",
    "be",
    "governed",
    "by",
    "construed",
    "in",
    "accordance",
    "with",
    "laws",
    "of",
    "state",
    "without",
    "regard",
    "to",
    "conflicts",
    "party",
    "parties",
    "notwithstanding",
    "hereunder",
    "indemnification",
    "confidential",
    "information",
    "termination",
    "licensee",
    "royalties",
    "clause",
    "payment",
    "interest",
    "arbitration",
    "jurisdiction",
    "waiver",
    "severability",
    "assignment",
    "notice",
    "amendment",
    "warranties",
    "damages",
]


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(one.split()[1]) for one in lines if one.startswith("VmRSS"))


def write_texts(path: Path, rows: int) -> None:
    """Write a file of generated texts with two classes."""
    rng = np.random.default_rng(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(rows):
            writer.writerow([" ".join(rng.choice(WORDS, int(rng.integers(8, 40)))), row % 2])


def kept_bytes(encoded: Encoded) -> int:
    """Return the bytes of all arrays of tokenised rows."""
    return sum(rows.values.nbytes + rows.offsets.nbytes for rows in encoded.texts.values())


def tokenizer_seconds(graft: Graft, shard: Shard) -> float:
    """Return the CPU seconds of the tokenizer without anything of ours."""
    texts = shard.columns["text"]
    backend = graft.base.tokenizer.backend_tokenizer
    started = time.process_time()
    for start in range(0, len(texts), SLICE_ROWS):
        backend.encode_batch(texts[start : start + SLICE_ROWS])
    return time.process_time() - started


def encode_seconds(graft: Graft, shard: Shard) -> tuple[float, Encoded]:
    """Return the CPU seconds of tokenising, and the rows."""
    started = time.process_time()
    encoded = graft.task.encode(shard, graft.base)
    return time.process_time() - started, encoded


def of_short_run(config: RunConfig) -> tuple[float, int]:
    """Return the CPU seconds of preparing the rows of a run of 2 x 10 steps of 16, and how many it tokenised."""
    settings = {"run.rounds": 2, "train.local_steps": 10, "train.learning_rate": 1e-3, "task.warm_head": "off"}
    short = changed(config, settings)
    run = SiteRun.open(simulated_sites(short)[0], short)
    started = time.process_time()
    encoded = run.train_rows()
    seconds = time.process_time() - started
    return seconds, int((encoded.texts["input_ids"].lengths() > 0).sum())


def measure(rows: int, repeats: int, folder: Path) -> list[Figure]:
    """Return the figures."""
    file = folder / "texts.csv"
    write_texts(file, rows)
    config = parse(
        {
            "task": {"name": "sequence-classification", "max_length": 128},
            "train": {"threads": 1, "device": "cpu"},
            "strategy": {"min_clients": 1},
            "simulation": {"data": str(file), "clients": 1},
        }
    )
    graft = load_graft(config, config.model.name, 1)
    shard = simulated_sites(config)[0].train_shard(graft.task)
    graft.task.encode(shard.take(range(100)), graft.base)  # warms up
    before = resident_bytes()
    seconds, encoded = encode_seconds(graft, shard)
    grown = resident_bytes() - before
    tokens = int(graft.task.lengths(encoded).sum())
    kept = kept_bytes(encoded)
    ours = [seconds]
    alone = [tokenizer_seconds(graft, shard)]
    for _ in range(repeats - 1):
        ours.append(encode_seconds(graft, shard)[0])
        alone.append(tokenizer_seconds(graft, shard))
    ratios = [mine / bare for mine, bare in zip(ours, alone, strict=True)]
    short, touched = of_short_run(config)
    noted = spread(ratios) if len(ratios) > 1 else "n = 1"
    return [
        Figure("kept", kept / tokens, "bytes/token", "<= 8", f"{rows:,} rows, {tokens:,} tokens"),
        Figure("resident growth", grown / tokens, "bytes/token", "", f"{grown / 2**20:.1f} MiB"),
        Figure("tokenising", median(ours), "CPU s", "", f"the tokenizer alone {median(alone):.2f}"),
        Figure("tokenising over the tokenizer alone", median(ratios), "ratio", "", noted),
        Figure("tokenising for 20 steps of 16", short, "CPU s", "", f"{touched:,} rows of {rows:,}"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show("Tokenised rows", measure(options.rows, options.repeats, Path(folder)))


if __name__ == "__main__":
    main()
