"""Compare what a round writes of its adapter with one hash and one write of the same bytes: seconds, bytes, flushes.

    python scripts/bench/checkpoint.py [--pairs 7] [--folder DIR]

The anchor is SHA-256 over the adapter, and its bytes written to a new file and flushed to the disk. It keeps as many
files as a run does, because a file that takes the place of one just deleted gets memory that is cheap to write to.
Pairs are interleaved, in alternating order, and the figure is the median of their ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench"), str(ROOT)]

import numpy as np
from figures import Figure, median, show, spread
from many_sites import Cost, cost_of
from trivial import trivial_app, trivial_spec

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.parse import parse
from tsugiki.common.wire.spec import Vector, sha256
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run import checkpoint
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.loop import evaluated, initial_state, run_rounds
from tsugiki.server.run.roster import Roster

SIZES = {"1M": 10**6, "25M": 25 * 10**6, "50M": 50 * 10**6}
ROUNDS = 4
KEPT = 3
"""A run keeps the last two rounds and the best one."""


def anchor(vector: Vector, folder: Path, number: int) -> None:
    """Hash an adapter, write it with one flush, and delete the file of three rounds ago, as a run does."""
    hashlib.sha256(vector.data).hexdigest()
    with (folder / f"anchor-{number}").open("wb") as file:
        file.write(vector.data)
        file.flush()
        os.fsync(file.fileno())
    (folder / f"anchor-{number - KEPT}").unlink(missing_ok=True)


def save(state: checkpoint.State, folder: Path) -> None:
    """Hash and save a round's adapter, and keep the result of its evaluation, as a run does."""
    digest = sha256(state.vector)
    checkpoint.save(folder, state, {}, "0" * 64, digest)
    evaluated(state, {"eval": {"accuracy": 0.5}}, "accuracy", False)


def pairs(size: int, count: int, folder: Path) -> tuple[list[Cost], list[Cost]]:
    """Return the costs of rounds' saves and of anchors, one after the other."""
    costs: dict[str, list[Cost]] = {"save": [], "anchor": []}
    rng = np.random.default_rng(0)
    state = initial_state(rng.standard_normal(size, np.float32))
    for number in range(KEPT + count):
        state = replace(state, round=number, best_round=max(0, number - KEPT + 1))
        calls = {
            "save": partial(save, state, folder / "checkpoint"),
            "anchor": partial(anchor, state.vector, folder, number),
        }
        for name in sorted(calls, reverse=bool(number % 2)):
            costs[name].append(cost_of(calls[name]))
    return costs["save"][KEPT:], costs["anchor"][KEPT:]  # the first ones delete no file yet


def ratios(of: Callable[[Cost], float], saves: list[Cost], anchors: list[Cost]) -> list[float]:
    """Return one ratio for each pair."""
    return [of(one) / of(other) for one, other in zip(saves, anchors, strict=True)]


def flushes_of_a_round(folder: Path) -> float:
    """Return all flushes to the disk that a round of a run with evaluation makes."""
    folder.mkdir()
    spec = trivial_spec(1000)
    config = parse({"run": {"rounds": ROUNDS}, "strategy": {"min_clients": 2}})
    audit = AuditLog(folder / "audit.jsonl")
    grid = InProcessGrid(trivial_app(spec), 2)
    roster = Roster(grid, config, spec, None, audit, Stop())
    roster.wait(lambda count: None)
    scores = iter(range(ROUNDS + 1))
    ctx = RunContext(
        config, spec, grid, roster, lambda vector: {config.monitor: float(next(scores))}, False, folder, audit
    )
    state = replace(initial_state(np.zeros(1000, np.float32)), evaluated_round=0)
    return cost_of(lambda: run_rounds(ctx, state)).flushes / ROUNDS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    figures = []
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            started = time.perf_counter()
            saves, anchors = pairs(size, options.pairs, Path(temporary))
            written = max(path.stat().st_size for path in Path(temporary, "checkpoint").iterdir())
        cpu = ratios(lambda cost: cost.cpu_s, saves, anchors)
        wall = ratios(lambda cost: cost.wall_s, saves, anchors)
        seconds = f"{median([one.cpu_s for one in saves]):.3f} s; "
        figures += [
            Figure(f"{name}: CPU of a round's saves", median(cpu), "ratio", "<= 1.5", seconds + spread(cpu)),
            Figure(f"{name}: wall of a round's saves", median(wall), "ratio", "", spread(wall)),
            Figure(f"{name}: bytes written", written / (4 * size), "adapters", "<= 1.1"),
            Figure(f"{name}: flushes of a round's saves", max(one.flushes for one in saves), "", "<= 2"),
        ]
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        whole = flushes_of_a_round(Path(temporary) / "run")
    figures.append(Figure("flushes of a whole round", whole, "", "<= 4", "with its audit event and its line"))
    show("checkpoints", figures)


if __name__ == "__main__":
    main()
