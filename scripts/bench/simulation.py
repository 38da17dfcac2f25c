"""Measure simulation: messages per second, the local loop and a whole run against bare PyTorch, and bytes.

    python scripts/bench/simulation.py [--pairs 9]

Needs the extras [demo] and [ray]. The two sides of each ratio are measured in this one run, in turns.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
from figures import Figure, median, show, spread
from trivial import trivial_app, trivial_spec

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.client.training import trainer
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.model.load import load_graft
from tsugiki.common.rng import generator
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.roster import Roster
from tsugiki.server.run.simulate import simulate

SITES, ROUNDS = 100, 10
FLOWER_ROUNDS = 3


def our_messages_per_second(size: int, folder: Path) -> float:
    """Return our train messages per second, including loop, guard, FedAvg, checkpoint and logs."""
    spec = trivial_spec(size)
    config = parse({"run": {"rounds": ROUNDS}, "strategy": {"min_clients": SITES}})
    folder.mkdir()
    audit, stop = AuditLog(folder / "audit.jsonl"), Stop()
    grid = InProcessGrid(trivial_app(spec), SITES)
    roster = Roster(grid, config, spec, None, audit, stop)
    roster.wait(lambda count: None)
    ctx = RunContext(config, spec, grid, roster, None, False, folder, audit)
    started = time.perf_counter()
    run_rounds(ctx, initial_state(np.zeros(size, np.float32)))
    return SITES * ROUNDS / (time.perf_counter() - started)


def flower_messages_per_second(size: int) -> float:
    """Return the train messages per second of Flower's own Ray simulation with its FedAvg, without Ray's start."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app, seconds = ClientApp(), ServerApp(), []

    @client_app.train()
    def train(message: Any, context: Any) -> Any:
        content = {"arrays": ArrayRecord({"w": Array(np.zeros(size, np.float32))})}
        return Message(RecordDict({**content, "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
        arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1)  # workers start in the first round
        started = time.perf_counter()
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=FLOWER_ROUNDS)
        seconds.append(time.perf_counter() - started)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server_app, client_app, SITES, backend_config={"client_resources": resources})
    return SITES * FLOWER_ROUNDS / seconds[0]


def text_config(folder: Path, **train: Any) -> RunConfig:
    """Return the settings of a classification run on generated reviews: 4 sites, MiniLM, LoRA rank 8."""
    words = [
        "plot",
        "acting",
        "music",
        "scene",
        "story",
        "dialogue",
        "camera",
        "ending",
        "pace",
        "cast",
        "mood",
        "script",
        "humour",
        "tone",
        "light",
    ]
    rng = generator(1, "bench")
    data = folder / "train.csv"
    if not data.exists():
        with data.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(800):
                writer.writerow([" ".join(rng.choice(words, int(rng.integers(8, 28)))), row % 2])
    settings = {"local_steps": 10, "learning_rate": 1e-3, "threads": 2, **train}
    return parse(
        {
            "run": {"name": f"run-{time.time_ns()}", "rounds": 3, "output_dir": str(folder / "runs")},
            "train": settings,
            "strategy": {"min_clients": 4},
            "simulation": {"clients": 4, "data": str(data)},
        }
    )


def bare_steps(graft: Any, batches: list[Any], settings: Any) -> float:
    """Return the seconds of a plain PyTorch training loop on prepared batches."""
    import torch

    parameters = [value for value in graft.base.network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    graft.base.network.train()
    started = time.perf_counter()
    for batch in batches:
        loss = graft.task.loss(graft.base.network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    graft.base.network.eval()
    return seconds


def site_batches(config: RunConfig, graft: Any) -> dict[str, list[Any]]:
    """Return the batches of all rounds by site, as the client draws them."""
    from tsugiki.client.site.simulated import simulated_sites

    batches: dict[str, list[Any]] = {}
    for site in simulated_sites(config):
        encoded = graft.task.encode(site.train_shard(graft.task), graft.base)
        batches[site.name] = []
        for number in range(1, config.run.rounds + 1):
            local_round = trainer.LocalRound(config.run.seed, site.name, number, 0.0, 1.0)
            lengths = trainer.grouping_lengths(graft.task, encoded, config.train)
            stream = trainer.batches(len(encoded), config.train, local_round, config.train.local_steps, lengths)
            rows = [next(stream) for _ in range(config.train.local_steps)]
            batches[site.name] += [graft.task.batch(encoded, row, graft.base) for row in rows]
    return batches


def local_loop_ratios(folder: Path, pairs: int) -> list[float]:
    """Return bare seconds / our seconds for pairs of 10 steps on the same batches, in alternating order."""
    import torch

    config = text_config(folder)
    torch.set_num_threads(config.train.threads)
    graft = load_graft(config, config.model.name, config.run.seed)
    from tsugiki.client.site.simulated import simulated_sites

    site = simulated_sites(config)[0]
    encoded = graft.task.encode(site.train_shard(graft.task), graft.base)
    ready = site_batches(config, graft)[site.name][: config.train.local_steps]
    local_round = trainer.LocalRound(config.run.seed, site.name, 1, 0.0, 1.0)
    initial, ratios = graft.read(), []
    for pair in range(pairs + 1):
        seconds: dict[str, float] = {}
        for kind in ("ours", "bare") if pair % 2 else ("bare", "ours"):
            graft.write(initial)
            if kind == "ours":
                started = time.perf_counter()
                trainer.train(graft, encoded, config.train, local_round)
                seconds[kind] = time.perf_counter() - started
            else:
                seconds[kind] = bare_steps(graft, ready, config.train)
        ratios.append(seconds["bare"] / seconds["ours"])
    graft.write(initial)
    return ratios[1:]  # the first pair warms up


def whole_run_ratios(folder: Path, pairs: int) -> tuple[list[float], dict[str, Any]]:
    """Return bare seconds / seconds of a whole simulated run (base loaded before), and the last run's summary."""
    ratios, summary = [], {}
    for pair in range(pairs):
        config = text_config(folder)
        graft = load_graft(config, config.model.name, config.run.seed)
        batches = [batch for site in site_batches(config, graft).values() for batch in site]
        initial, seconds = graft.read(), {}
        for kind in ("ours", "bare") if pair % 2 else ("bare", "ours"):
            graft.write(initial)
            if kind == "bare":
                seconds[kind] = bare_steps(graft, batches, config.train)
            else:
                started = time.perf_counter()
                summary = simulate(config, simulated_app).summary
                seconds[kind] = time.perf_counter() - started
        graft.write(initial)
        ratios.append(seconds["bare"] / seconds["ours"])
    return ratios, summary


def bytes_ratio(folder: Path, wire_dtype: str) -> tuple[float, int]:
    """Return the ratio of reported bytes (a client, round and direction) to the adapter's float32 bytes, and these."""
    config = text_config(folder, local_steps=1)
    names = {"adapter.wire_dtype": wire_dtype, "run.name": f"bytes-{wire_dtype}"}
    summary = simulate(changed(config, {**names, "run.rounds": 1}), simulated_app).summary
    size = 4 * (summary["adapter_parameters"] + summary["head_parameters"])
    return max(summary["bytes_up"], summary["bytes_down"]) / 4 / size, size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of the local loop")
    parser.add_argument("--runs", type=int, default=5, help="interleaved pairs of whole runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = [our_messages_per_second(1_000, folder / f"small-{n}") for n in range(5)]
        large = [our_messages_per_second(75_000, folder / f"large-{n}") for n in range(5)]
        loop = local_loop_ratios(folder, options.pairs)
        runs, _ = whole_run_ratios(folder, options.runs)
        full, size = bytes_ratio(folder, "float32")
        half, _ = bytes_ratio(folder, "float16")
        flower = flower_messages_per_second(1_000)
    figures = [
        Figure("messages per second, 1,000 floats", median(small), "1/s", ">= 1000", spread(small)),
        Figure("messages per second, 75,000 floats", median(large), "1/s", "", spread(large)),
        Figure("Flower's Ray simulation, 1,000 floats", flower, "1/s", "", f"{SITES} nodes, {FLOWER_ROUNDS} rounds"),
        Figure("ours over Flower's", median(small) / flower, "ratio"),
        Figure("local loop, bare seconds over ours", median(loop), "ratio", ">= 0.97", spread(loop)),
        Figure("whole run of 4 sites, bare over ours", median(runs), "ratio", ">= 0.95", spread(runs)),
        Figure("bytes each way over float32 adapter", full, "ratio", "<= 1.05", f"adapter and head {size:,} bytes"),
        Figure("the same, float16", half, "ratio", "<= 0.53"),
    ]
    show("Simulation", figures)


if __name__ == "__main__":
    main()
