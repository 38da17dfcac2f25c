"""Next-word prediction on a phone's titles under privacy: Stack Overflow titles, 100 against 1,000 clients.

    TSUGIKI_DATA=... python scripts/studies/nextword_populations.py --model FOLDER [--clients 100 1000] [--seeds 1 2 3]

FOLDER is a causal language model as `transformers` saves it (stories260K, or SmolLM2-135M). 18,000 titles are split
evenly and at random over the clients, who are simulated behind five gateways; perplexity is that of the last round on
the other 2,000 titles. LoRA on query and value, A frozen; distributed noise and secure aggregation, delta 1e-5; without
either, and at each epsilon. In each round a client takes a few steps on its own titles; with privacy or without it is
the same rounds and learning rate. The settings were chosen with seed 7, which is not in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.mechanisms import epsilon_after
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.rng import generator
from tsugiki.server.run.simulate import simulate

HELD_OUT = 2_000
GATEWAYS = 5


@dataclass(frozen=True)
class Result:
    """One run: perplexity before and after, and each adversary's epsilon; `epsilon` 0 is without privacy.

    `release` and `sums` are what the run's ledger says; `uploads` is what its plan would tell a server without secure
    aggregation.
    """

    clients: int
    epsilon: float
    seed: int
    before: float
    after: float
    noise_multiplier: float
    spent: dict[str, float | None]
    seconds: float


def split_titles(folder: Path) -> tuple[Path, Path]:
    """Write the titles to train on and those held out, the same for all seeds."""
    lines = (Path(os.environ["TSUGIKI_DATA"]) / "stackoverflow_titles" / "titles.txt").read_text("utf-8").splitlines()
    titles = [line for line in lines if line.strip()]
    order = generator(0, "held-out-titles").permutation(len(titles))
    train, held = folder / "train.txt", folder / "held.txt"
    held.write_text("".join(titles[index] + "\n" for index in order[:HELD_OUT]), "utf-8")
    train.write_text("".join(titles[index] + "\n" for index in order[HELD_OUT:]), "utf-8")
    return train, held


def config(clients: int, epsilon: float, seed: int, files: tuple[Path, Path], options: argparse.Namespace) -> RunConfig:
    """Return one run."""
    private = {
        "mode": "distributed",
        "secure_aggregation": True,
        "target_epsilon": epsilon,
        "clip_norm": options.clip_norm,
        "delta": 1e-5,
    }
    simulation: dict[str, Any] = {"clients": clients, "clients_per_site": clients // GATEWAYS, "data": str(files[0])}
    if options.rows:
        simulation["rows"] = options.rows
    return parse(
        {
            "run": {
                "name": f"run-{time.time_ns()}",
                "rounds": options.rounds,
                "seed": seed,
                "output_dir": str(files[0].parent),
            },
            "model": {"name": str(options.model.absolute())},
            "task": {"name": "causal-lm", "max_length": 48},
            "adapter": {"rank": options.rank, "alpha": 2.0 * options.rank, "freeze_a": "yes"},
            "train": {
                "learning_rate": options.learning_rate,
                "lr_schedule": "constant",
                "warmup_ratio": 0.0,
                "per_device_train_batch_size": 16,
                "local_steps": options.local_steps,
                "threads": options.threads,
            },
            "strategy": {
                "name": "fedavgm",
                "server_momentum": options.server_momentum,
                "min_clients": clients,
                "round_timeout_s": 36000.0,
            },
            "privacy": private if epsilon else {"mode": "none"},
            "evaluation": {"data": str(files[1]), "every_rounds": options.rounds, "batch_size": 64},
            "simulation": simulation,
        }
    )


def run(clients: int, epsilon: float, seed: int, files: tuple[Path, Path], options: argparse.Namespace) -> Result:
    """Return what one run gave."""
    started = time.perf_counter()
    settings = config(clients, epsilon, seed, files, options)
    outcome = simulate(settings, simulated_app)
    evaluated = [line["eval"] for line in read_lines(outcome.folder / "metrics.jsonl") if "eval" in line]
    privacy = outcome.summary["privacy"]
    result = Result(
        clients,
        epsilon,
        seed,
        evaluated[0]["perplexity"],
        evaluated[-1]["perplexity"],
        privacy.get("noise_multiplier", 0.0),
        privacy.get("epsilon", {}) | without_masks(settings, outcome.summary["adapter_parameters"]),
        time.perf_counter() - started,
    )
    print(json.dumps(vars(result)), flush=True)
    return result


def without_masks(settings: RunConfig, dimension: int) -> dict[str, float]:
    """Return what a server that sees each upload would have learned by the last round; empty without privacy."""
    plan = make_plan(changed(settings, {"privacy.secure_aggregation": False}), dimension)
    return {"uploads": epsilon_after(plan, plan.rounds)["uploads"]} if plan else {}


def table(results: list[Result]) -> str:
    """Return the table in Markdown: mean, least and most over the seeds; each ledger's epsilon."""
    lines = ["| clients | epsilon wanted | z | perplexity | release | server, masked | server, not masked |"]
    lines.append("|---|---|---|---|---|---|---|")
    for clients, epsilon in sorted({(one.clients, one.epsilon) for one in results}):
        cell = [one for one in results if (one.clients, one.epsilon) == (clients, epsilon)]
        after, first = [one.after for one in cell], cell[0]
        spent = [first.spent.get(who) for who in ("release", "sums", "uploads")]
        told = ["no bound" if value is None else f"{value:,.4g}" for value in spent]
        wanted = f"{epsilon:g}" if epsilon else "no privacy"
        lines.append(
            f"| {clients:,} | {wanted} | {first.noise_multiplier:.4g} | {mean(after):.2f} ({min(after):.2f} to "
            f"{max(after):.2f}) | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.0, 2.0, 8.0], help="0: no privacy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--clip-norm", type=float, default=0.3)
    parser.add_argument("--server-momentum", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=0, help="use only so many titles; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds stackoverflow_titles/")
    started, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        files = split_titles(Path(name))
        for clients in options.clients:
            for seed in options.seeds:
                results += [run(clients, epsilon, seed, files, options) for epsilon in options.epsilons]
    print(f"\n{table(results)}")
    figures = [
        Figure("perplexity before", results[0].before),
        Figure("grid", (time.perf_counter() - started) / 60, "min"),
    ]
    for epsilon in sorted(set(options.epsilons)):
        cells = [[one.after for one in results if (one.clients, one.epsilon) == (n, epsilon)] for n in options.clients]
        means = [mean(cell) for cell in cells]
        if len(means) > 1:
            wanted = f"epsilon {epsilon:g}" if epsilon else "no privacy"
            figures.append(Figure(f"perplexity, fewest over most clients, {wanted}", means[0] / means[-1], "ratio"))
    show(f"Next words, {options.model.name}", figures)


if __name__ == "__main__":
    main()
