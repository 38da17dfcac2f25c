"""Check this program on a GPU: what works there, how fast, in how much memory, and how far results differ.

    python scripts/gpu_check.py [--model FOLDER] [--minutes 8] [--without tests,federation]

It runs the tests that need CUDA; then the program's own local loop on a Llama of 135M parameters (or the checkpoint in
FOLDER) and on one of 1B, both with random weights: LoRA in float32, under bfloat16 autocast, on a bfloat16 base, in 4
bits, and with gradient checkpointing; then a server and two clients that share the GPU. Each part prints when it is
done, and a part for which no time is left is skipped by name. On a machine without CUDA it runs a tiny shape on the
CPU, and skips what needs CUDA. The JSON lines at the end are the record; docs/gpu.md says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.config.files import to_toml
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.device import has_bf16
from tsugiki.common.model.load import grafts, load_graft
from tsugiki.common.wire.spec import Vector, sha256

CUDA_TESTS = ("tests/common/model",)
"""Folders with tests that are marked `cuda`."""

WARM_UP = 3
"""First steps, which are not timed: a GPU chooses its kernels in them."""

SEED = 1


@dataclass(frozen=True)
class Shape:
    """A Llama, and the batches that it is trained on."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int
    tokens: int
    steps: int


TINY = Shape("tiny", 32, 64, 2, 2, 1, 256, 4, 32, 6)
SHAPES = (
    Shape("135M", 576, 1536, 30, 9, 3, 49_152, 16, 512, 13),  # SmolLM2-135M's
    Shape("1B", 2048, 8192, 16, 32, 8, 49_152, 8, 512, 13),  # Llama 3.2 1B's, with a smaller vocabulary
)


@dataclass(frozen=True)
class Mode:
    """A way to hold the base and to compute.

    Args:
        settings: by section.
        bound: largest relative difference of the mean loss from that in float32.
        needs: what it needs beside a CPU: "cuda", "bitsandbytes", "bf16".
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    bound: float
    needs: tuple[str, ...] = ()


MODES = (
    Mode("float32", {}, 0.0),
    Mode("bf16 autocast", {"train": {"precision": "bf16"}}, 0.02, ("bf16",)),
    Mode("bfloat16 base", {"model": {"dtype": "bfloat16"}}, 0.02),
    Mode("nf4", {"model": {"dtype": "bfloat16", "quantization": "nf4"}}, 0.1, ("cuda", "bitsandbytes")),
    Mode("gradient checkpointing", {"model": {"gradient_checkpointing": True}}, 1e-4),
)


@dataclass(frozen=True)
class Outcome:
    """What one training gave: its mean loss, the adapter, and its speed (tokens count with their padding)."""

    loss: float
    vector: Vector
    tokens_per_s: float
    memory_bytes: int


@dataclass
class Record:
    """The figures and skipped parts of a whole check."""

    ends: float
    figures: list[Figure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str, target: str = "", note: str = "") -> None:
        """Keep a figure, and print it at once."""
        self.figures.append(Figure(name, value, unit, target, note))
        print(f"{name}: {value:.6g} {unit} {note}".rstrip(), flush=True)

    def skip(self, name: str, reason: str) -> None:
        """Keep a part that is not run, and print it at once."""
        self.skipped[name] = reason
        print(f"{name}: skipped, {reason}", flush=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part inside a `with` block. An error in it is a figure, so that the other parts still run."""
        print(f"-- {name}", flush=True)
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever fails, the other parts are worth their figures)
            self.add(f"{name}: failed", 1, "", "<= 0", f"{type(error).__name__}: {str(error)[:300]}")

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.ends


def main() -> int:
    """Run the check, and return the exit status: 0 if every target holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder with a 135M Llama, in place of random weights")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after this time")
    parser.add_argument("--without", default="", help="parts to leave out: tests, federation")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    without = set(arguments.without.split(","))
    record = Record(time.monotonic() + 60 * arguments.minutes)
    describe_machine(device)
    if "tests" in without:
        record.skip("CUDA tests", "left out by --without")
    elif device == "cpu":
        record.skip("CUDA tests", "no CUDA here")
    else:
        run_tests(record)
    peak = matmul_peak(record, device)
    with tempfile.TemporaryDirectory(prefix="tsugiki-gpu-") as name:
        shapes = SHAPES if device == "cuda" else (TINY,)
        bases = {shape.name: Path(name) / shape.name for shape in shapes}
        if arguments.model:
            bases[shapes[0].name] = Path(arguments.model)
        for shape in shapes:
            check_shape(record, shape, bases[shape.name], device, peak)
        if "federation" in without:
            record.skip("two clients on one device", "left out by --without")
        elif record.over:
            record.skip("two clients on one device", "no time is left")
        else:
            with record.part("two clients on one device"):
                two_clients(record, Path(name), bases[shapes[0].name], shapes[0], device)
    show(f"GPU check on {device}", record.figures)
    for part, reason in record.skipped.items():
        print(json.dumps({"name": part, "skipped": reason}))
    return int(any(figure.holds is False for figure in record.figures))


def describe_machine(device: str) -> None:
    """Print what a reader needs to compare two records."""
    import torch

    card = platform.processor() or platform.machine()
    if device == "cuda":
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    print(f"{device}: {card}; torch {torch.__version__}, Python {platform.python_version()}", flush=True)


def run_tests(record: Record) -> None:
    """Run the tests that are marked `cuda`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-rs", *CUDA_TESTS]
    left_s = max(1.0, record.ends - time.monotonic())
    with record.part("CUDA tests"):
        done = subprocess.run(command, cwd=ROOT, timeout=left_s, check=False)
        record.add("CUDA tests: exit status", done.returncode, "", "<= 0")


def matmul_peak(record: Record, device: str) -> float:
    """Return the measured FLOP a second of a large bfloat16 matrix product, in TFLOP/s; 0 without bfloat16."""
    import torch

    if not has_bf16(device):
        record.skip("matmul peak", f"no bfloat16 on this {device}")
        return 0.0
    side = 8192 if device == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        synchronise(device)
        started = time.perf_counter()
        left @ right
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    peak = 2 * side**3 / best / 1e12
    record.add("matmul peak, bfloat16", peak, "TFLOP/s")
    return peak


def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked to do."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def write_base(folder: Path, shape: Shape, device: str) -> None:
    """Write a Llama with random weights in bfloat16, and a tokenizer of plain words, unless the folder is there."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if folder.exists():
        return
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{number}" for number in range(shape.vocabulary - 4))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106  (no password)
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)


def rows_of(shape: Shape) -> list[str]:
    """Return texts that fill a sequence: a few words in a random order, so that there is something to learn."""
    draw = random.Random(SEED)
    words = [f"w{number}" for number in range(32)]
    return [" ".join(draw.choices(words, k=shape.tokens)) for _ in range(4 * shape.batch)]


def config_of(shape: Shape, base: Path, device: str, settings: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Return the run of a mode."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(base)},
        "task": {"name": "causal-lm", "max_length": shape.tokens},
        "adapter": {"rank": 8},
        "train": {
            "device": device,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "per_device_train_batch_size": shape.batch,
            "local_steps": shape.steps,
            "threads": 1,
        },
    }
    for section, values in settings.items():
        sections[section] = {**sections.get(section, {}), **values}
    return parse(sections)


def check_shape(record: Record, shape: Shape, base: Path, device: str, peak: float) -> None:
    """Train in every mode, and compare losses and repetitions."""
    reference: Outcome | None = None
    with record.part(f"{shape.name}: base"):
        write_base(base, shape, device)
    for mode in MODES:
        name = f"{shape.name}, {mode.name}"
        if reason := missing(mode, device) or ("no time is left" if record.over else ""):
            record.skip(name, reason)
            continue
        with record.part(name):
            config = config_of(shape, base, device, mode.settings)
            found = trained(config, shape, device)
            report(record, name, shape, found, peak)
            if reference is None:
                reference = found
            else:
                apart = abs(found.loss - reference.loss) / reference.loss
                record.add(f"{name}: loss beside float32", apart, "ratio", f"<= {mode.bound:g}")
            if mode.name in ("float32", "bf16 autocast"):
                again = trained(config, shape, device)
                repeat(record, f"{name}: the same run twice", found.vector, again.vector)


def missing(mode: Mode, device: str) -> str:
    """Return what this machine lacks for a mode; empty if nothing."""
    there = {
        "cuda": device == "cuda",
        "bf16": has_bf16(device),
        "bitsandbytes": importlib.util.find_spec("bitsandbytes") is not None,
    }
    lacking = [need for need in mode.needs if not there[need]]
    return f"needs {', '.join(lacking)}" if lacking else ""


def trained(config: RunConfig, shape: Shape, device: str) -> Outcome:
    """Train one round with the program's own loop, from the base's initial adapter."""
    import torch

    grafts.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    graft = load_graft(config, config.model.name, SEED)
    graft.write(graft.initial)
    encoded = graft.task.encode(Shard({"text": rows_of(shape)}), graft.base)
    times: list[float] = []

    def watch(step: int, steps: int, losses: Any) -> None:
        synchronise(device)
        times.append(time.perf_counter())

    done = train(graft, encoded, config.train, LocalRound(SEED, "site-0", 1, 0.0, 1.0), watch)
    timed = len(times) - WARM_UP
    tokens = timed * shape.batch * shape.tokens
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Outcome(done.loss, graft.read(), tokens / (times[-1] - times[WARM_UP - 1]), memory)


def report(record: Record, name: str, shape: Shape, found: Outcome, peak: float) -> None:
    """Keep speed, memory and loss of a training."""
    record.add(f"{name}: speed", found.tokens_per_s, "tokens/s")
    if peak:
        share = flops_of_token(shape) * found.tokens_per_s / 1e12 / peak
        record.add(f"{name}: share of the matmul peak", share, "ratio")
    if found.memory_bytes:
        record.add(f"{name}: peak memory", found.memory_bytes / 2**30, "GiB")
    record.add(f"{name}: loss", found.loss, "nats")


def flops_of_token(shape: Shape) -> float:
    """Return the useful operations of a training step for each token.

    Two for each weight that is multiplied, forward, and two backward for the gradient of the input: a frozen weight has
    no gradient of its own. Attention scores are left out, and so is what gradient checkpointing computes twice.
    """
    width = shape.hidden // shape.heads
    attention = 2 * shape.hidden * shape.hidden + 2 * shape.hidden * width * shape.key_value_heads
    weights = shape.layers * (attention + 3 * shape.hidden * shape.inner) + shape.vocabulary * shape.hidden
    return 4.0 * weights


def repeat(record: Record, name: str, first: Vector, second: Vector) -> None:
    """Keep how far two adapters of the same run are apart; 0 for equal bytes."""
    record.add(name, float(abs(first - second).max()), "largest difference", note=bytes_words(first, second))


def bytes_words(first: Vector, second: Vector) -> str:
    """Return whether two adapters have equal bytes, in words."""
    return "equal bytes" if sha256(first) == sha256(second) else "other bytes"


def two_clients(record: Record, folder: Path, base: Path, shape: Shape, device: str) -> None:
    """Run a server and two clients, three processes on one device, and compare with the same run in one process."""
    write_base(base, shape, device)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows_of(shape)))
    settings = {
        "run": {"name": "deployed", "rounds": 2, "output_dir": str(folder / "runs")},
        "strategy": {"min_clients": 2},
        "simulation": {"clients": 2, "data": str(data)},
    }
    file = folder / "federation.toml"
    file.write_text(to_toml(config_of(shape, base, device, settings)))
    tsugiki_here = [sys.executable, "-m", "tsugiki"]
    left_s = max(60.0, record.ends - time.monotonic())
    subprocess.run([*tsugiki_here, "site", "split", str(file), str(folder / "sites")], check=True, timeout=left_s)
    port = free_port()
    serve = [*tsugiki_here, "serve", str(file), "--insecure", "--listen", f"127.0.0.1:{port}"]
    started = time.perf_counter()
    clients = []
    server = subprocess.Popen(serve)
    try:
        for number in range(2):
            site = folder / "sites" / f"site-{number}" / "site.toml"
            join = ["client", "--server", f"127.0.0.1:{port}", "--insecure", "--site", str(site)]
            clients.append(subprocess.Popen([*tsugiki_here, *join]))
        status = server.wait(timeout=left_s)
    finally:
        for process in (server, *clients):
            process.terminate()
            process.wait()
    record.add("two clients on one device: exit status", status, "", "<= 0")
    record.add("two clients on one device: seconds", time.perf_counter() - started, "s", note="with starting up")
    alone = [*tsugiki_here, "simulate", str(file), "--set", "run.name=alone"]
    subprocess.run(alone, check=True, timeout=left_s)
    hashes = {name: adapter_sha256(folder / "runs" / name) for name in ("deployed", "alone")}
    same = hashes["deployed"] == hashes["alone"]
    # Equal bytes are expected on a CPU; on a GPU the figure says what is the case.
    target = "<= 0" if device == "cpu" else ""
    record.add("two clients on one device: differs from one process", int(not same), "", target)


def adapter_sha256(run: Path) -> str:
    """Return the hash of a finished run's last adapter."""
    return str(json.loads((run / "summary.json").read_text())["adapter_sha256"])


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
