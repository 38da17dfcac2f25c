"""How many clients differential privacy takes: MNIST over 100, 1,000 and 10,000 of them, by who adds the noise.

    TSUGIKI_DATA=... python scripts/studies/mnist_populations.py [--seeds 1 2 3] [--write docs/studies]

A small network (two convolutions, one fully connected layer) has seen 900 pictures of clothes and no digit. LoRA of
rank 8 on its last layer learns the digits of the 60,000 training images, split evenly and at random over the clients,
who are simulated behind ten gateways. Without privacy; and with client-level privacy at epsilon 2 and 8, delta 1e-5,
over all rounds: `central`, the server adds the noise; `distributed`, each client adds a share; `local`, each client
adds all of it. All get the same rounds, learning rate and clip norm; the accuracy is that of the last round on the
10,000 test images. These settings were chosen with seed 7, which is not in the table. A client takes one step in a
round: with more, clients of six images learn these by heart, and their mean update loses what they have in common.

LoRA's A is trained here. The default under privacy freezes it; but of this layer's 1,600 inputs a random A of at most
ten rows keeps so little that even without noise and with all rows in one place 39 of 100 digits are right (rank 8).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines, write_atomically
from tsugiki.common.plots import BLUE, GREY, ORANGE, RED, new_figure, render, style
from tsugiki.server.run.simulate import simulate

CLIENTS = (100, 1_000, 10_000)
GATEWAYS = 10
EPSILONS = (2.0, 8.0)
NOISY_POINTS = 2.0
"""Where central noise costs more than this, chance decides between two modes: there 0 has to be in the interval."""
MODES = ("central", "distributed", "local")
SETTINGS = ("rounds", "optimizer", "learning_rate", "local_steps", "batch_size", "clip_norm", "server_momentum")


@dataclass(frozen=True)
class Case:
    """One cell of the table; `mode` "none" has no epsilon."""

    mode: str
    clients: int
    epsilon: float = 0.0


@dataclass(frozen=True)
class Result:
    """What one run of a case gave."""

    case: Case
    seed: int
    accuracy: float
    spent: dict[str, float | None]
    noise_multiplier: float
    seconds: float


def config(case: Case, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> RunConfig:
    """Return the run of one case."""
    data = Path(os.environ["TSUGIKI_DATA"]) / "mnist"
    private = {"mode": case.mode, "target_epsilon": case.epsilon, "delta": 1e-5, "clip_norm": options.clip_norm}
    return parse(
        {
            "run": {"name": f"run-{time.time_ns()}", "rounds": options.rounds, "seed": seed, "output_dir": str(folder)},
            "model": {"name": str(base)},
            "task": {"name": "image-classification", "num_labels": 10},
            "adapter": {"rank": 8, "alpha": 16.0, "freeze_a": "no"},
            "train": {
                "optimizer": options.optimizer,
                "learning_rate": options.learning_rate,
                "lr_schedule": "constant",
                "warmup_ratio": 0.0,
                "max_grad_norm": 0.0,
                "per_device_train_batch_size": options.batch_size,
                "local_steps": options.local_steps,
                "threads": 1,
            },
            "strategy": {
                "name": "fedavgm",
                "server_momentum": options.server_momentum,
                "min_clients": case.clients,
                "round_timeout_s": 3600.0,
            },
            "privacy": {"mode": "none"} if case.mode == "none" else private,
            "evaluation": {
                "data": str(data / "t10k-images-idx3-ubyte.gz"),
                "every_rounds": options.rounds,
                "batch_size": 1000,
            },
            "simulation": {
                "clients": case.clients,
                "clients_per_site": case.clients // GATEWAYS,
                "data": str(data / "train-images-idx3-ubyte.gz"),
            },
        }
    )


def run(case: Case, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> Result:
    """Return the last round's accuracy, and what was spent by the run's own ledger."""
    started = time.perf_counter()
    outcome = simulate(config(case, seed, base, folder, options), simulated_app)
    last = read_lines(outcome.folder / "metrics.jsonl")[-1]
    privacy = outcome.summary["privacy"]
    result = Result(
        case,
        seed,
        100 * last["eval"]["accuracy"],
        privacy.get("epsilon", {}),
        privacy.get("noise_multiplier", 0.0),
        time.perf_counter() - started,
    )
    print(json.dumps({**vars(case), **{k: v for k, v in vars(result).items() if k != "case"}}), flush=True)
    return result


def run_population(clients: int, seed: int, base: Path, folder: Path, options: argparse.Namespace) -> list[Result]:
    """Run all cases of a population, in one process: the split and its features are kept from one to the next."""
    return [run(case, seed, base, folder, options) for case in cases() if case.clients == clients]


def cases() -> list[Case]:
    """Return all cells."""
    private = [Case(mode, clients, epsilon) for clients in CLIENTS for epsilon in EPSILONS for mode in MODES]
    return [Case("none", clients) for clients in CLIENTS] + private


def of(results: list[Result], case: Case) -> list[float]:
    """Return the accuracies of a cell, by seed."""
    return [one.accuracy for one in sorted(results, key=lambda one: one.seed) if one.case == case]


def table(results: list[Result]) -> str:
    """Return the table in Markdown: mean accuracy, least and most over the seeds."""
    lines = ["| clients | epsilon | central | distributed | local | no privacy |", "|---|---|---|---|---|---|"]
    for clients in CLIENTS:
        for epsilon in EPSILONS:
            cells = [of(results, Case(mode, clients, epsilon)) for mode in MODES] + [of(results, Case("none", clients))]
            told = [f"{mean(cell):.2f} ({min(cell):.2f} to {max(cell):.2f})" for cell in cells]
            lines.append(f"| {clients:,} | {epsilon:g} | {' | '.join(told)} |")
    return "\n".join(lines)


def judge(results: list[Result], seconds: float) -> list[Figure]:
    """Return the figures with their targets."""
    figures = []
    for clients in CLIENTS:
        for epsilon in EPSILONS:
            central, shared, local = (of(results, Case(mode, clients, epsilon)) for mode in MODES)
            gap, low, high = interval([one - other for one, other in zip(central, shared, strict=True)])
            lost = mean(of(results, Case("none", clients))) - mean(central)
            dominates = lost > NOISY_POINTS
            note = f"95 % interval {low:.2f} to {high:.2f}; noise costs {lost:.1f}" + "; it dominates" * dominates
            name = f"central minus distributed, n = {clients:,}, epsilon {epsilon:g}"
            figures.append(Figure(name, gap, "points", "" if dominates else "<= 0.5", note))
            if dominates:
                figures.append(Figure(f"{name}: low end of the interval", low, "points", "<= 0"))
            learns = mean(central) > 30
            note = "central learns" if learns else "central learns nothing either"
            gap = mean(central) - mean(local)
            figures.append(
                Figure(
                    f"central minus local, n = {clients:,}, epsilon {epsilon:g}",
                    gap,
                    "points",
                    ">= 2" if learns else "",
                    note,
                )
            )
    for mode in MODES:
        for epsilon in EPSILONS:
            means = [mean(of(results, Case(mode, clients, epsilon))) for clients in CLIENTS]
            least = min(after - before for before, after in pairwise(means))
            figures.append(Figure(f"least rise with n, {mode}, epsilon {epsilon:g}", least, "points", ">= 0"))
    figures.append(Figure("whole grid", seconds / 60, "minutes", "<= 60"))
    return figures


def draw(results: list[Result], path: Path) -> None:
    """Write the figure: accuracy against the number of clients, a panel for each epsilon."""
    colours = {"none": GREY, "central": BLUE, "distributed": ORANGE, "local": RED}
    with style():
        plot = new_figure(width_in=9, height_in=3.6)
        panels = plot.subplots(1, len(EPSILONS), sharey=True)
        for panel, epsilon in zip(panels, EPSILONS, strict=True):
            for mode in ("none", *MODES):
                values = [of(results, Case(mode, n, 0.0 if mode == "none" else epsilon)) for n in CLIENTS]
                middle = [mean(value) for value in values]
                below = [m - min(v) for m, v in zip(middle, values, strict=True)]
                above = [max(v) - m for m, v in zip(middle, values, strict=True)]
                label = "no privacy" if mode == "none" else mode
                dashes = {"linestyle": "--"} if mode == "none" else {}
                panel.errorbar(
                    CLIENTS, middle, [below, above], label=label, color=colours[mode], marker="o", capsize=3, **dashes
                )
            panel.set_xscale("log")
            panel.set_title(f"epsilon {epsilon:g}, delta 1e-5", loc="left", fontsize=10)
            panel.set_xlabel("clients")
            panel.set_xticks(CLIENTS, [f"{n:,}" for n in CLIENTS])
        panels[0].set_ylabel("accuracy on MNIST test, %")
        panels[-1].legend(loc="center right")
        content = render(plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def write(results: list[Result], options: argparse.Namespace, seconds: float) -> None:
    """Write the page and the figure."""
    folder = Path(options.write)
    draw(results, folder / "dp_populations.svg")
    spent = {
        (one.case.mode, one.case.epsilon): (one.noise_multiplier, one.spent)
        for one in results
        if one.case.mode != "none" and one.case.clients == max(CLIENTS)
    }
    ledgers = ["| mode | epsilon wanted | z | release | uploads |", "|---|---|---|---|---|"]
    for (mode, epsilon), (noise, seen) in sorted(spent.items()):
        uploads = seen.get("uploads")
        told = "not protected" if uploads is None else f"{uploads:,.4g}"
        ledgers.append(f"| {mode} | {epsilon:g} | {noise:.4g} | {seen['release']:.4g} | {told} |")
    command = "python scripts/studies/mnist_populations.py --seeds " + " ".join(map(str, options.seeds))
    for name in SETTINGS:
        command += f" --{name.replace('_', '-')} {getattr(options, name)}"
    page = f"""# How many clients differential privacy takes

{__doc__.strip().split(chr(10) * 2, 2)[2]}

`{command}`: {seconds / 60:.0f} minutes on {os.cpu_count()} cores, CPU only.

Accuracy in percent: the mean over {len(options.seeds)} seeds, and the least and the most of them.

{table(results)}

![Accuracy against the number of clients](dp_populations.svg)

What each adversary's ledger said at the end (of the largest population; `release`: another gateway, which sees the
models; `uploads`: the server, without secure aggregation, against each client's own upload):

{chr(10).join(ledgers)}
"""
    (folder / "dp_populations.md").write_text(page, "utf-8")


def main() -> None:
    """Run the grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--clip-norm", type=float, default=0.4)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--server-momentum", type=float, default=0.9)
    parser.add_argument("--processes", type=int, default=2, help="populations at a time, each on one thread")
    parser.add_argument("--base", type=Path, help="a folder from scripts/studies/pretrain_cnn.py; default: make one")
    parser.add_argument("--write", default="", metavar="DIR", help="write the page and the figure there")
    options = parser.parse_args()
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds mnist/")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or Path(folder) / "cnn"
        if options.base is None:
            subprocess.run([sys.executable, ROOT / "scripts" / "studies" / "pretrain_cnn.py", base], check=True)
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            tasks = [(clients, seed) for clients in reversed(CLIENTS) for seed in options.seeds]
            work = [pool.submit(run_population, *task, base, Path(folder), options) for task in tasks]
            results = [one for done in as_completed(work) for one in done.result()]
    seconds = time.perf_counter() - started
    print(f"\n{table(results)}")
    if options.write:
        write(results, options, seconds)
    show("MNIST, populations", judge(results, seconds))


if __name__ == "__main__":
    main()
