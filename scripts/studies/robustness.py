"""What one lying site costs: six and three sites on MNIST, four kinds of liars, four strategies.

    TSUGIKI_DATA=... python scripts/studies/robustness.py [--sites 6 3] [--rounds 14] [--tolerances 5] [--seeds 1]

A small network that has seen 900 pictures of clothes and no digit (`pretrain_cnn.py`) learns digits with LoRA, from a
few thousand rows that are split over the sites. One site lies in every round:

- boost: its update, at the norm 99, just below the default `strategy.max_update_norm`;
- reverse: the same, turned round;
- constant: the same number everywhere, at the norm 99;
- flipped: it trains on rows whose digit d is called 9 - d.

The accuracy is that of the last round, on the 10,000 test images. A liar's cost is the difference from the same run in
which that site is honest; fedavg should lose at most 2 points with six sites.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from figures import Figure, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import make_app, simulated_app
from tsugiki.client.site.simulated import SimulatedSite, simulated_sites
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.files import read_lines
from tsugiki.common.tasks import Task
from tsugiki.server.run.simulate import simulate

NORM = 99.0
MOST_POINTS = 2.0
FORGED = ("boost", "reverse", "constant")
LIARS = ("none", *FORGED, "flipped")
STRATEGIES = ("fedavg", "trimmed_mean", "fedmedian", "krum")
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """One cell of the table.

    Args:
        sites: in the run; the last one lies.
        strategy: its name.
        liar: of `LIARS`.
        tolerance: `strategy.norm_tolerance`.
        seed: of the run.
    """

    sites: int
    strategy: str
    liar: str
    tolerance: float
    seed: int


class FlippedSite(SimulatedSite):
    """A site that calls the digit d by the name of 9 - d."""

    @cached_property
    def _identity(self) -> str:
        return f"flipped:{super()._identity}"

    def train_shard(self, task: Task) -> Shard:
        """Return the site's rows with other labels."""
        shard = super().train_shard(task)
        labels = [CLASSES - 1 - int(label) for label in shard.columns["label"]]
        return Shard({**shard.columns, "label": labels}, shard.extra, shard.notes)


def flipped_app(config: RunConfig, only: str = "") -> tuple[Any, int]:
    """Return the ClientApp of the simulated sites, of which the last one has flipped labels."""
    sites = list(simulated_sites(config))
    last = sites[-1]
    sites[-1] = FlippedSite(**{part.name: getattr(last, part.name) for part in fields(SimulatedSite)})
    return make_app(lambda context: sites[int(context.node_config["partition-id"])]), len(sites)


def forging(case: Case) -> Callable[[int, Any], list[Any]]:
    """Return the fault by which the last node sends another update than it has trained."""
    from flwr.app import Array, ArrayRecord

    from tsugiki.common.wire.arrays import ARRAY_KEY

    def fault(node: int, reply: Any) -> list[Any]:
        if node != case.sites or reply.has_error() or str(reply.metadata.message_type) != "train":
            return [reply]
        update = reply.content.array_records["arrays"][ARRAY_KEY].numpy().astype(np.float64)
        forged = {
            "boost": update * (NORM / np.linalg.norm(update)),
            "reverse": update * (-NORM / np.linalg.norm(update)),
            "constant": np.full(update.shape, NORM / np.sqrt(update.size)),
        }[case.liar]
        reply.content["arrays"] = ArrayRecord({ARRAY_KEY: Array(forged.astype(np.float32))})
        return [reply]

    return fault


def config(case: Case, base: Path, folder: Path, options: argparse.Namespace) -> RunConfig:
    """Return the run of a case."""
    data = Path(os.environ["TSUGIKI_DATA"]) / "mnist"
    strategy: dict[str, Any] = {"name": case.strategy, "norm_tolerance": case.tolerance, "min_clients": case.sites}
    if case.strategy == "trimmed_mean":
        strategy["trim_fraction"] = 0.34 if case.sites == 3 else 0.2
    if case.strategy == "krum" and case.sites < 5:
        strategy["num_malicious_sites"] = 0  # it promises nothing with fewer than 2 f + 3 sites
    name = f"{case.strategy}-{case.liar}-{case.sites}-{case.tolerance:g}-{case.seed}"
    return parse(
        {
            "run": {"name": name, "rounds": options.rounds, "seed": case.seed, "output_dir": str(folder)},
            "model": {"name": str(base)},
            "task": {"name": "image-classification", "num_labels": CLASSES},
            "adapter": {"rank": 8, "alpha": 16.0, "freeze_a": "no"},
            "train": {"local_steps": options.local_steps, "per_device_train_batch_size": 20, "threads": 1},
            "strategy": strategy,
            "evaluation": {
                "data": str(data / "t10k-images-idx3-ubyte.gz"),
                "every_rounds": options.rounds,
                "batch_size": 1000,
            },
            "simulation": {
                "clients": case.sites,
                "rows": options.rows,
                "data": str(data / "train-images-idx3-ubyte.gz"),
                "partition": "dirichlet",
                "dirichlet_alpha": options.alpha,
            },
        }
    )


def accuracy(case: Case, base: Path, folder: Path, options: argparse.Namespace) -> float:
    """Run a case, and return its last accuracy in percent."""
    app = flipped_app if case.liar == "flipped" else simulated_app
    fault = forging(case) if case.liar in FORGED else None
    outcome = simulate(config(case, base, folder, options), app, fault=fault)
    found = 100 * float(read_lines(outcome.folder / "metrics.jsonl")[-1]["eval"]["accuracy"])
    print(f"{case}: {found:.2f}", flush=True)
    return found


def main() -> None:
    """Run all cases, and print a table of the accuracy and the figures of the default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[6, 3])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--liars", nargs="+", choices=LIARS[1:], default=LIARS[1:])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[5.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--alpha", type=float, default=1.0, help="how even the split over the sites is")
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = folder / "base"
        subprocess.run([sys.executable, str(ROOT / "scripts/studies/pretrain_cnn.py"), str(base)], check=True)
        for sites in options.sites:
            for tolerance in options.tolerances:
                for strategy in options.strategies:
                    found = {
                        liar: mean(
                            [
                                accuracy(Case(sites, strategy, liar, tolerance, seed), base, folder, options)
                                for seed in options.seeds
                            ]
                        )
                        for liar in ("none", *options.liars)
                    }
                    title = f"{sites} sites, {strategy}, tolerance {tolerance:g}"
                    figures.append(Figure(f"{title}, no liar", found["none"], "%"))
                    for liar in options.liars:
                        target = ""
                        if sites == 6 and strategy == "fedavg":
                            target = f"<= {MOST_POINTS}"
                        cost = found["none"] - found[liar]
                        figures.append(Figure(f"{title}, {liar}", cost, "points", target, f"{found[liar]:.2f} %"))
    show("One liar: what it costs", figures)


if __name__ == "__main__":
    main()
