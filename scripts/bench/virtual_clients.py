"""Measure a round of 10,000 clients behind a gateway: together, one after the other, and in Flower's own simulation.

    TSUGIKI_DATA=... python scripts/bench/virtual_clients.py [--rounds 5] [--alone 100] [--flower 500]

The network and the data of `scripts/studies/mnist_populations.py`: LoRA of rank 8 on the last layer, MNIST over 10,000
clients of six images, noise by each client (mode local), one local epoch. A round is everything from the sampled cohort
to the checkpoint: training, clipping, noise, sum, guard, account, aggregation. "One after the other" trains some of the
same clients with the ordinary local loop; the time is scaled up. Flower's simulation (Ray, its FedAvg) trains 500
clients of the same size for the same number of steps with plain PyTorch on the whole network; the time is scaled up,
and Ray's start is not counted.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, median, show, spread

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.client.prepare import SiteRun, load_at
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.cohort import asked_clients, train_protecting_clients
from tsugiki.client.training.job import Job
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.common.wire.messages import TrainRequest
from tsugiki.server.run.simulate import simulate

CLIENTS = 10_000


def config(base: Path, folder: Path, rounds: int, freeze_a: str) -> RunConfig:
    """Return the settings of the run."""
    data = Path(os.environ["TSUGIKI_DATA"]) / "mnist" / "train-images-idx3-ubyte.gz"
    return parse(
        {
            "run": {"name": f"run-{time.time_ns()}", "rounds": rounds, "output_dir": str(folder)},
            "model": {"name": str(base)},
            "task": {"name": "image-classification", "num_labels": 10},
            "adapter": {"rank": 8, "freeze_a": freeze_a},
            "train": {"optimizer": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "local_epochs": 1, "threads": 2},
            "strategy": {"min_clients": CLIENTS, "round_timeout_s": 3600.0},
            "privacy": {"mode": "local", "target_epsilon": 8.0, "clip_norm": 0.5},
            "simulation": {"clients": CLIENTS, "clients_per_site": CLIENTS, "data": str(data)},
        }
    )


def together(run: RunConfig) -> list[float]:
    """Return the seconds of each round except the first, which reads the data and computes the trunk's features."""
    outcome = simulate(run, simulated_app)
    lines = [line for line in read_lines(outcome.folder / "metrics.jsonl") if line["round"]]
    return [sum(line["seconds"].values()) for line in lines[1:]]


def alone(run: RunConfig, count: int) -> float:
    """Return the seconds that all clients would take one after the other, estimated from `count` of them."""
    site = simulated_sites(run)[0]
    opened = SiteRun.open(site, run)
    if opened.plan is None:
        raise ValueError("a private run")
    graft = opened.graft
    request = TrainRequest(run.for_sites(), 1, graft.spec.sha256, 0.0, 0.1, 1e9, "", "")
    clients = asked_clients(site.name, opened.rows_of_clients(), ",".join(map(str, range(count))))
    # A job without a tail trains its clients one after the other.
    job = Job(graft, opened.train_rows(), clients, run, request, graft.initial, lambda *_: None)
    train_protecting_clients(replace(job, clients=dict(list(clients.items())[:5])), opened.plan)
    started = time.perf_counter()
    train_protecting_clients(job, opened.plan)
    return (time.perf_counter() - started) * CLIENTS / count


def flower(run: RunConfig, base: Path, count: int, rounds: int = 2) -> float:
    """Return the seconds that Flower's own simulation would take for all clients, estimated from `count` of them."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    spec = load_at(simulated_sites(run)[0], run).spec
    client_app, server_app, seconds = ClientApp(), ServerApp(), []

    @client_app.train()
    def train(message: Any, context: Any) -> Any:
        import numpy as np
        import torch

        from tsugiki.common.tasks.image_classification import small_cnn

        torch.set_num_threads(1)
        network = small_cnn()[1].from_pretrained(base)
        network.requires_grad_(False)
        network.fc.requires_grad_(True)
        images, labels = torch.rand(6, 1, 28, 28), torch.randint(0, 10, (6,))
        optimizer = torch.optim.SGD(network.fc.parameters(), 0.01)
        torch.nn.functional.cross_entropy(network(pixel_values=images).logits, labels).backward()
        optimizer.step()
        content = {"arrays": ArrayRecord({"w": Array(np.zeros(spec.size, np.float32))})}
        return Message(RecordDict({**content, "metrics": MetricRecord({"num-examples": 6})}), reply_to=message)

    @server_app.main()
    def main_(grid: Any, context: Any) -> None:
        import numpy as np

        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
        arrays = ArrayRecord({"w": Array(np.zeros(spec.size, np.float32))})
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1)  # workers start in the first round
        started = time.perf_counter()
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)
        seconds.append((time.perf_counter() - started) / rounds)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server_app, client_app, count, backend_config={"client_resources": resources})
    return seconds[0] * CLIENTS / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", type=int, default=100, help="clients trained one after the other")
    parser.add_argument("--flower", type=int, default=500, help="clients in Flower's simulation; 0: leave it out")
    parser.add_argument("--base", type=Path, help="a folder from scripts/studies/pretrain_cnn.py; default: make one")
    options = parser.parse_args()
    if "TSUGIKI_DATA" not in os.environ:
        parser.error("set TSUGIKI_DATA to the folder that holds mnist/")
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = options.base or folder / "cnn"
        if options.base is None:
            subprocess.run([sys.executable, ROOT / "scripts" / "studies" / "pretrain_cnn.py", base], check=True)
        for freeze_a, title in (("no", "12,880 numbers"), ("yes", "A frozen, 80 numbers")):
            run = config(base, folder, options.rounds + 1, freeze_a)
            rounds, single = together(run), alone(run, options.alone)
            figures.append(
                Figure(f"a round of {CLIENTS:,} clients, {title}", median(rounds), "s", "<= 5", spread(rounds))
            )
            note = f"from {options.alone} clients; {single / median(rounds):.0f} times"
            figures.append(Figure("  the same one after the other", single, "s", "", note))
        if options.flower:
            scaled = flower(run, base.absolute(), options.flower)
            note = f"from {options.flower} clients; no clipping, no noise, no account"
            figures.append(Figure("  Flower's simulation", scaled, "s", "", note))
    show("Many small clients", figures)


if __name__ == "__main__":
    main()
