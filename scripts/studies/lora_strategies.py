"""How LoRA's factors are averaged, where the sites differ much: accuracy and aggregation error in each round.

    TSUGIKI_DATA=... python scripts/studies/lora_strategies.py [--seeds 1 2 3] [--write docs/studies]

Handwritten digits at 10 sites, split by a Dirichlet distribution with alpha 0.1: most sites have but two or three of
the ten classes. The base is the small convolutional network that scripts/studies/pretrain_cnn.py makes, which has seen
clothes only; LoRA on its last layer, of 10 outputs, so that 10 is the full rank. Accuracy on the 10,000 test images
after every round. The strategies share everything but their name: rows, split, initial values, batches and learning
rate, which were chosen for `fedavg` with seed 7. Error: ||mean(B_i A_i) - B A|| / ||mean(B_i A_i)||.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.server.run.simulate import simulate

SITES, FULL_RANK = 10, 10
EXACT = 1e-5


@dataclass(frozen=True)
class Case:
    """A row of the table: a strategy at a rank; `ranks` are those of the sites, where they differ."""

    name: str
    strategy: str
    rank: int = 4
    ranks: tuple[int, ...] = ()
    exact: bool = False


CASES = (
    Case("fedavg", "fedavg"),
    Case("ffa", "ffa", exact=True),
    Case("rolora", "rolora", exact=True),
    Case("flora", "flora", exact=True),
    Case("svd", "svd"),
    Case("svd, sites of ranks 1, 2 and 4", "svd", ranks=(1, 2, 4)),
    Case("svd at full rank", "svd", FULL_RANK, exact=True),
)


@dataclass(frozen=True)
class Result:
    """One run: accuracy in percent after each round, the first before training, and the error of each round."""

    case: Case
    seed: int
    accuracy: list[float]
    error: list[float]
    bytes_up: int
    bytes_down: int
    seconds: float


def configure(case: Case, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> RunConfig:
    """Return the run of a case. Alpha is twice the rank, so that the update has the same scale at every rank."""
    data = Path(os.environ["TSUGIKI_DATA"]) / "mnist"
    return parse(
        {
            "run": {"name": f"{case.strategy}-{case.rank}-{len(case.ranks)}-{seed}", "rounds": options.rounds}
            | {"seed": seed, "output_dir": str(folder)},
            "model": {"name": str(base)},
            "task": {"name": "image-classification", "num_labels": 10},
            "adapter": {"method": "lora", "rank": case.rank, "alpha": 2.0 * case.rank},
            "train": {"learning_rate": options.learning_rate, "local_steps": options.local_steps, "threads": 1},
            "strategy": {"name": case.strategy, "min_clients": SITES},
            "evaluation": {"data": str(data / "t10k-images-idx3-ubyte.gz"), "batch_size": 256},
            "simulation": {"clients": SITES, "partition": "dirichlet", "dirichlet_alpha": 0.1}
            | {"data": str(data / "train-images-idx3-ubyte.gz"), "ranks": list(case.ranks)},
        }
    )


def run(case: Case, config: RunConfig) -> Result:
    """Return what one run has shown, and print it."""
    started = time.perf_counter()
    outcome = simulate(config, simulated_app)
    lines = read_lines(outcome.folder / "metrics.jsonl")
    result = Result(
        case,
        config.run.seed,
        [100 * line["eval"]["accuracy"] for line in lines],
        [line["aggregation_error"] for line in lines[1:] if "aggregation_error" in line],
        outcome.summary["bytes_up"],
        outcome.summary["bytes_down"],
        time.perf_counter() - started,
    )
    last = {"accuracy": result.accuracy[-1], "error": max(result.error), "seconds": result.seconds}
    print(json.dumps({"case": case.name, "seed": result.seed, **last}), flush=True)
    return result


def table(results: list[Result], rounds: int) -> str:
    """Return the table: for each case accuracy and error of the rounds, in the mean over seeds."""
    shown = sorted({1, 2, 5, rounds // 2, rounds})
    head = ["strategy", "", *(f"round {number}" for number in shown), "MB up, down"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for case in CASES:
        own = [one for one in results if one.case == case]
        if not own:
            continue
        accuracy = [f"{mean([one.accuracy[number] for one in own]):.2f}" for number in shown]
        error = [f"{mean([one.error[number - 1] for one in own]):.2g}" for number in shown]
        bytes_ = f"{own[0].bytes_up / 1e6:.1f}, {own[0].bytes_down / 1e6:.1f}"
        lines.append(f"| {case.name} | accuracy, % | {' | '.join(accuracy)} | {bytes_} |")
        lines.append(f"| | error | {' | '.join(error)} | |")
    return "\n".join(lines)


def judge(results: list[Result], seconds: float) -> list[Figure]:
    """Return the figures with their targets."""
    found = []
    for case in [case for case in CASES if any(one.case == case for one in results)]:
        own = [one for one in results if one.case == case]
        last = [one.accuracy[-1] for one in own]
        note = f"seeds {[one.seed for one in own]}: {[round(value, 2) for value in last]}"
        found.append(Figure(f"accuracy, {case.name}", mean(last), "%", "", note))
        worst = max(max(one.error) for one in own)
        found.append(Figure(f"largest error, {case.name}", worst, "ratio", f"<= {EXACT}" if case.exact else ""))
    found.append(Figure("whole study", seconds / 60, "minutes"))
    return found


def write(results: list[Result], options: argparse.Namespace, seconds: float) -> None:
    """Write the page."""
    command = "python scripts/studies/lora_strategies.py --seeds " + " ".join(map(str, options.seeds))
    command += f" --rounds {options.rounds} --local-steps {options.local_steps} --learning-rate {options.learning_rate}"
    before = mean([one.accuracy[0] for one in results])
    last = [f"- {figure.name}: {figure.value:.4g}. {figure.note}" for figure in judge(results, seconds)[:-1]]
    page = f"""# Averaging LoRA where sites differ

{(__doc__ or "").strip().split(chr(10) * 2, 2)[2]}

`{command}`: {seconds / 60:.0f} minutes, one thread, CPU only.
Means over {len(options.seeds)} seeds; before training the accuracy is {before:.2f} %.

{table(results, options.rounds)}

After the last round:

{chr(10).join(last)}
"""
    (Path(options.write) / "lora_strategies.md").write_text(page, "utf-8")


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES], help="some of the rows")
    parser.add_argument("--base", type=Path, help="a folder from scripts/studies/pretrain_cnn.py; default: make one")
    parser.add_argument("--write", default="", metavar="DIR", help="write the page there")
    options = parser.parse_args()
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds mnist/")
    started, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or Path(folder) / "cnn"
        if options.base is None:
            subprocess.run([sys.executable, ROOT / "scripts" / "studies" / "pretrain_cnn.py", base], check=True)
        for seed in options.seeds:
            for case in [case for case in CASES if case.name in options.cases]:
                results.append(run(case, configure(case, seed, base, Path(folder), options)))
    seconds: float = time.perf_counter() - started
    print(f"\n{table(results, options.rounds)}")
    if options.write:
        write(results, options, seconds)
    show("Averaging LoRA, Dirichlet 0.1", judge(results, seconds))


if __name__ == "__main__":
    main()
