"""The memory and the time that the logits of a large vocabulary take, in evaluation and in training.

    python scripts/bench/language_model_memory.py [--pairs 9]

A small Llama with the vocabulary of SmolLM2, 49,152 words, reads texts in which every token is predicted, so that
leaving out prompts and padding helps nothing. Each memory is measured in a fresh process: the highest resident memory
beyond the loaded model. "All logits at once" is the plain way: the model's own `forward`, then cross-entropy. Times are
CPU seconds of single training steps on one thread, as ratios of pairs that are measured in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from figures import Figure, median, show, spread

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Encoded

WORDS = 49_152
SHAPES = {"evaluation": (64, 256), "training": (16, 128)}
"""Rows and tokens of a batch."""
MIB = 2**20


def write_model(folder: Path, width: int) -> None:
    """Write a Llama of two blocks whose embeddings are its output layer too."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", *(f"w{number}" for number in range(1, WORDS))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=words[0]).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=WORDS, eos_token_id=0, bos_token_id=None, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def load(folder: Path, rows: int, tokens: int) -> tuple[Graft, Encoded]:
    """Return the model with a LoRA, and texts of so many tokens, the end token included."""
    import torch

    torch.set_num_threads(1)
    task = {"name": "causal-lm", "max_length": tokens}
    graft = load_graft(parse({"model": {"name": str(folder)}, "task": task}), str(folder), 0)
    texts = [" ".join(f"w{1 + (row * 997 + at * 31) % (WORDS - 1)}" for at in range(tokens - 1)) for row in range(rows)]
    return graft, graft.task.encode(Shard({"text": texts}), graft.base)


def evaluate(graft: Graft, encoded: Encoded) -> None:
    """Evaluate all rows in one batch."""
    import torch

    with torch.no_grad():
        graft.task.evaluate(graft.base, encoded, len(encoded))


def evaluate_at_once(graft: Graft, encoded: Encoded) -> None:
    """Evaluate all rows in one batch, the plain way."""
    import torch

    with torch.no_grad():
        plain_loss(graft, encoded)


def train(graft: Graft, encoded: Encoded) -> None:
    """Compute the gradient of the loss."""
    batch = graft.task.batch(encoded, range(len(encoded)), graft.base)
    graft.task.loss(graft.base.network, batch).backward()  # type: ignore[no-untyped-call]  # torch's own


def train_at_once(graft: Graft, encoded: Encoded) -> None:
    """Compute the gradient of the loss, the plain way."""
    plain_loss(graft, encoded).backward()


def plain_loss(graft: Graft, encoded: Encoded) -> Any:
    """Return the loss from all logits of all rows."""
    from torch.nn.functional import cross_entropy

    batch = graft.task.batch(encoded, range(len(encoded)), graft.base)
    labels = batch.pop("labels")
    logits = graft.base.network(**batch, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten())


WORK: dict[str, Callable[[Graft, Encoded], None]] = {
    "evaluation": evaluate,
    "evaluation, all logits at once": evaluate_at_once,
    "training": train,
    "training, all logits at once": train_at_once,
}


def memory_mib(key: str) -> float:
    """Return a memory of this process in MiB, by its name in Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def measure_here(folder: Path, what: str) -> float:
    """Return the MiB beyond the loaded model that the work takes in this process."""
    graft, encoded = load(folder, *SHAPES[what.partition(",")[0]])
    WORK[what](graft, encoded.first(1))  # whatever is loaded or built once
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
    before = memory_mib("VmRSS")
    WORK[what](graft, encoded)
    return memory_mib("VmHWM") - before


def measure(folder: Path, what: str) -> float:
    """Return the same, measured in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--what", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_ratios(folder: Path, pairs: int) -> list[float]:
    """Return the CPU seconds of a training step as a share of those of a plain one, one ratio for each pair."""
    graft, encoded = load(folder, *SHAPES["training"])
    found = []
    for _ in range(pairs + 1):
        seconds = []
        for step in (train, train_at_once):
            started = time.process_time()
            step(graft, encoded)
            seconds.append(time.process_time() - started)
        found.append(seconds[0] / seconds[1])
    return found[1:]  # the first pair warms up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="pairs of training steps that are timed; 0: none")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=list(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.what:
        print(measure_here(options.folder, options.what))
        return
    figures = []
    with tempfile.TemporaryDirectory() as name:
        small, wide = Path(name) / "small", Path(name) / "wide"
        write_model(small, 64)
        for what in WORK:
            rows, tokens = SHAPES[what.partition(",")[0]]
            target = "<= 200" if what == "evaluation" else ""
            note = f"{rows} x {tokens} tokens, {WORDS:,} words, 3M parameters"
            figures.append(Figure(f"{what}: memory beyond the model", measure(small, what), "MiB", target, note))
        if options.pairs:
            write_model(wide, 576)
            ratios = time_ratios(wide, options.pairs)
            figures.append(
                Figure("training step over one with all logits at once", median(ratios), "ratio", "", spread(ratios))
            )
    show("Language models: the output layer", figures)


if __name__ == "__main__":
    main()
