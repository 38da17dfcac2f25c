"""Baselines of federated training: no training, a linear probe, every site alone, all data in one place.

Each trained baseline is a federation of one, the same program with other settings. A site alone trains as in the
federation, round by round with a fresh optimiser in each, so that only the averaging is missing. The central run takes
the steps of all sites together, and keeps its optimiser from round to round, as in training without a federation.

One place and a federation want different learning rates. Each baseline therefore gets its own, by a short search that
looks at training loss alone: rows that are reported choose nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import QuorumNotMet, TrainingError, UsageError
from tsugiki.common.files import read_lines, to_json, write_atomically
from tsugiki.common.model.load import load_graft
from tsugiki.common.model.rates import with_rates
from tsugiki.common.settings import HeadedSettings
from tsugiki.common.tasks import TASKS
from tsugiki.common.wire.spec import Vector
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.evaluate import evaluate_base, make_evaluator
from tsugiki.server.run.federation import Outcome, run_federation
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.simulate import SimulatedApp, simulate

Metrics = dict[str, float]

KINDS = ("untouched", "local", "centralised")
"""Names of the baselines."""

RATE_STEP = math.sqrt(10.0)
"""The search tries the federation's learning rate and its neighbours, this factor apart."""
MOST_STEPS = 3
"""How many such steps the search may go away from the federation's rate."""
SEARCH_SHARE = 0.2
"""Share of a baseline's rounds that the search trains with each rate."""
MOST_POINTS = 10
"""Most evaluations of the central run, for its curve."""

LEVEL = 1e-3
"""Losses that differ by less than this share count as equal."""
HIGHEST_RATE = 10.0
"""The highest learning rate that a run may have."""

_ALONE: Mapping[str, Any] = {
    "strategy": {
        "name": "fedavg",
        "min_clients": 1,
        "round_timeout_s": 604_800.0,
        "max_update_norm": sys.float_info.max,  # an update may be the whole training here
        "norm_tolerance": 0.0,  # one site alone has no others to be compared with
    },
    "simulation.ranks": [],
    "simulation.engine": "in-process",  # which alone keeps an optimiser between rounds
    "privacy": {"mode": "none"},  # one party alone has nobody to protect its data from
    "evaluation.early_stopping_patience": 0,
}
"""Settings that a federation of one changes in a run."""


def _alone(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a federation of one changes in this run."""
    merged_pair = {"adapter.merged_rank": 0} if getattr(config.adapter, "merged_rank", 0) else {}  # only flora fills it
    return {**_ALONE, **merged_pair}


def centralised(config: RunConfig, sites: int) -> RunConfig:
    """Return the run with all data at one site and equally many training samples; rounds and epochs are rounded."""
    rounds = max(1, round(config.run.rounds * config.strategy.fraction_train))  # of an average site
    return changed(
        config,
        {
            **_alone(config),
            "run.rounds": rounds,
            "train.local_steps": config.train.local_steps * sites,
            "train.persist_optimizer": True,  # the rounds are one training, cut up for the evaluation
            "train.local_patience": 0,
            "evaluation.every_rounds": max(config.evaluation.every_rounds, math.ceil(rounds / MOST_POINTS)),
            "evaluation.at_sites": False,  # there are no sites
            "evaluation.monitor": config.metric,
            "simulation.partition": "iid",
            "simulation.column": "",
            "simulation.clients": 1,
            "simulation.clients_per_site": 1,
        },
    )


def local_only(config: RunConfig) -> RunConfig:
    """Return the run of one site by itself, with its average number of rounds and the same split of data."""
    asked = max(1, round(config.run.rounds * config.strategy.fraction_train))
    # Only what it ends with is measured: a curve for each of many sites would take longer than their training.
    ends = {"run.rounds": asked, "evaluation.data": "", "evaluation.every_rounds": asked}
    return changed(config, {**_alone(config), **ends})


@dataclass(frozen=True)
class _Bench:
    """Runs federations of one in the folder `baselines/` of a run."""

    folder: Path
    client: SimulatedApp
    progress: Progress
    stop: Stop | None = None
    rates: dict[str, float] = field(default_factory=dict)

    def train(self, alone: RunConfig, name: str, site: str = "") -> tuple[Vector, list[dict[str, Any]]]:
        """Train a federation of one; return its last adapter and the lines of its metrics.jsonl.

        Args:
            alone: its settings.
            name: of its folder.
            site: whose rows it trains on; empty: all rows.
        """
        alone = changed(alone, {"run.output_dir": str(self.folder / "baselines"), "run.name": name})
        app = self.client(alone, site)[0]
        outcome = run_federation(InProcessGrid(app, 1), alone, stop=self.stop)
        return outcome.state.vector, read_lines(outcome.folder / "metrics.jsonl")

    def with_own_rate(self, alone: RunConfig, name: str, site: str = "") -> RunConfig:
        """Return the settings at the learning rate whose short training ends with the least training loss."""
        if TASKS.get(alone.task.name).signed_loss:
            return alone  # such a loss says nothing about how well the task is learnt
        losses = {0: self._short_loss(alone, 0, name, site)}
        # Upwards as long as the loss does not rise: where a rate is far too small, its neighbours look alike.
        for step in range(1, MOST_STEPS + 1):
            losses[step] = self._short_loss(alone, step, name, site)
            if losses[step] > min(losses.values()) * (1 + LEVEL):
                break
        # Downwards as long as it falls.
        for step in range(-1, -MOST_STEPS - 1, -1):
            least = min(losses.values())
            losses[step] = self._short_loss(alone, step, name, site)
            if losses[step] > least * (1 - LEVEL):
                break
        tried = len(losses)
        # Of rates that are as good as the best, the highest: the short training saw its beginning only.
        losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        enough = min(losses.values(), default=0.0) * (1 + LEVEL)
        best = max((step for step, loss in losses.items() if loss <= enough), default=0)
        chosen = _at_rate(alone, best)
        self.rates[name] = chosen.train.rate
        self.progress.note(f"learning rate of {name}: {self.rates[name]:.2g}, after {tried} short trainings")
        return chosen

    def _short_loss(self, alone: RunConfig, step: int, name: str, site: str) -> float:
        """Return the training loss at the end of a short training; infinite if it diverges."""
        rounds = max(1, round(alone.run.rounds * SEARCH_SHARE))
        silent = {"evaluation.data": "", "evaluation.at_sites": False, "evaluation.monitor": alone.metric}
        trial = changed(_at_rate(alone, step), {"run.rounds": rounds, **silent})
        try:
            _, lines = self.train(trial, f"search-{name}-{step}", site)
        except (QuorumNotMet, TrainingError):  # its only site gave up, or the model is no longer finite
            return math.inf
        return float(lines[-1]["train_loss"])


def _at_rate(config: RunConfig, step: int) -> RunConfig:
    factor = RATE_STEP**step
    rates = {"train.learning_rate": config.train.rate, "train.head_learning_rate": config.train.head_rate}
    return changed(config, {name: min(rate * factor, HIGHEST_RATE) for name, rate in rates.items()})


def run_baselines(
    config: RunConfig,
    folder: Path,
    client: SimulatedApp,
    sites: list[str],
    kinds: list[str],
    progress: Progress,
    stop: Stop | None = None,
    *,
    search_rates: bool = True,
) -> dict[str, Any]:
    """Return the metrics of each baseline on the central evaluation data, and write them to baselines.json.

    Beside the baselines by name there are `own_rows`, the metrics of each site alone and of the federation on the
    sites' own evaluation rows, if they keep any; `learning_rates` of the trained baselines; and `curves`, the metrics
    of the central run on its way.

    Args:
        config: the federated run, with evaluation data.
        folder: folder of the federated run.
        client: makes ClientApps of simulated sites.
        sites: names of all sites.
        kinds: baselines to run, of `KINDS`.
        progress: is given a note as each baseline begins.
        stop: a request to stop ends the baseline that is running.
        search_rates: whether each trained baseline gets a learning rate of its own; else it has the federation's.

    Raises:
        Interrupted: `stop` was requested.
    """
    if not config.evaluation.data:
        return {}
    config = with_rates(config, config.model.name)
    results: dict[str, Any] = {}
    bench = _Bench(folder, client, progress, stop)
    if "untouched" in kinds:  # nothing is trained, so this one needs no federation
        progress.note("baseline: the untouched base model")
        results["untouched"] = _untouched(bench, config)

    if "local" in kinds:
        results |= _train_sites_alone(bench, config, sites, search_rates)
    if "centralised" in kinds:
        central = centralised(config, len(sites))
        results |= _linear_probe(bench, central)
        progress.note("baseline: centralised")
        if search_rates:
            central = bench.with_own_rate(central, "centralised")
        _, lines = bench.train(central, "centralised")
        results["centralised"] = _last(lines, "eval")
        results["curves"] = {"centralised": _curve(lines, central, config)}
    results["learning_rates"] = {"federated": config.train.rate, **bench.rates}
    write_atomically(folder / "baselines.json", to_json(results, indent=1).encode())
    return results


def _untouched(bench: _Bench, config: RunConfig) -> Metrics:
    """Return the metrics of the base without an adapter."""
    federated = read_lines(bench.folder / "metrics.jsonl")
    # Most adapters change nothing before they are trained: then the run has measured the base before round 1.
    starts_at_base = ADAPTERS.get(config.adapter.method).starts_at_base and not config.adapter.start_from
    if federated and starts_at_base:
        before = federated[0]
        if "eval" in before and "warm_head" not in before:
            return dict(before["eval"])
    return evaluate_base(load_graft(config, config.model.name, config.run.seed), config)


def _train_sites_alone(bench: _Bench, config: RunConfig, sites: list[str], search_rates: bool) -> dict[str, Any]:
    """Return the metrics of each site alone: `local` on the operator's rows, `own_rows` on the site's."""
    alone = local_only(config)
    evaluate = make_evaluator(load_graft(config, config.model.name, config.run.seed), config)
    if search_rates and sites:
        alone = bench.with_own_rate(alone, "local", sites[0])  # one site's rate is good for all, as in the federation
    local: dict[str, Metrics] = {}
    own: dict[str, Metrics] = {}
    for site in sites:
        bench.progress.note(f"baseline: local-{site}")
        vector, lines = bench.train(alone, f"local-{site}", site)
        if evaluate is not None:
            local[site] = evaluate(vector)
        own |= _last(lines, "sites_eval")
    federated = _last(read_lines(bench.folder / "metrics.jsonl"), "sites_eval")
    if not own or not federated:
        return {"local": local}
    return {"local": local, "own_rows": {"local": own, "federated": federated}}


def _linear_probe(bench: _Bench, central: RunConfig) -> dict[str, Metrics]:
    """Return as `linear_probe` the metrics of a head in closed form on all rows; empty where the task has none.

    The head is the one that a run computes before round 1, on features of the frozen base.
    """
    if not isinstance(central.task, HeadedSettings):
        return {}
    federated = read_lines(bench.folder / "metrics.jsonl")
    if federated and "warm_head" in federated[0]:
        return {"linear_probe": federated[0]["eval"]}  # the same, from the sums of all sites
    one_step = {"run.rounds": 1, "train.local_steps": 1, "train.local_epochs": 0, "task.warm_head": "auto"}
    own_start = {"adapter.start_from": "", "adapter.start_sha256": ""}
    bench.progress.note("baseline: linear probe")
    _, lines = bench.train(changed(central, one_step | own_start), "linear-probe")
    start = lines[0]
    if "warm_head" not in start:  # this base has no such head
        return {}
    return {"linear_probe": start["eval"]}


def _last(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return an entry of the last line that has it; empty if no line has."""
    found = [line[name] for line in lines if line.get(name)]
    return dict(found[-1]) if found else {}


def _curve(lines: Sequence[Mapping[str, Any]], alone: RunConfig, config: RunConfig) -> list[dict[str, Any]]:
    """Return the metrics of each evaluation of a baseline.

    Each has as `round` the round of the federation by which its sites together have seen as many samples.
    """
    scale = config.run.rounds / alone.run.rounds
    return [{"round": line["round"] * scale, **line["eval"]} for line in lines if "eval" in line]


def compare(
    config: RunConfig,
    client: SimulatedApp,
    kinds: Sequence[str] = KINDS,
    *,
    progress: Progress,
    notes: Progress,
    stop: Stop | None = None,
    search_rates: bool = True,
) -> tuple[Outcome, dict[str, Any]]:
    """Run a federation and its baselines; return what the run leaves, and the result of each training by name.

    The result is that of `run_baselines`, with the metrics of the run's last evaluated round as `federated`.

    Args:
        config: the run, with evaluation data.
        client: makes ClientApps of simulated sites.
        kinds: baselines to run, of `KINDS`.
        progress: shows the federated run.
        notes: is given a note as each baseline begins.
        stop: a request to stop ends what is running.
        search_rates: whether each trained baseline gets a learning rate of its own.

    Raises:
        UsageError: the run has no held-out rows.
        TsugikiError: a run cannot start or go on.
    """
    if not config.evaluation.data:
        raise UsageError("the run has nothing to compare by", "evaluation.data in the run file", "name a held-out file")
    outcome = simulate(config, client, progress=progress, stop=stop)
    sites = site_names(outcome.folder)
    found = run_baselines(config, outcome.folder, client, sites, list(kinds), notes, stop, search_rates=search_rates)
    return outcome, {"federated": last_evaluation(outcome.folder), **found}


def site_names(folder: Path) -> list[str]:
    """Return the sites that passed the hello, from the audit log of a run's folder."""
    return sorted({event["site"] for event in verify(folder / "audit.jsonl") if event["event"] == "hello"})


def last_evaluation(folder: Path) -> dict[str, float]:
    """Return the metrics of the last evaluated round of a run's folder."""
    found: Metrics = [line["eval"] for line in read_lines(folder / "metrics.jsonl") if "eval" in line][-1]
    return found


def average(metrics: dict[str, Metrics], name: str) -> float | None:
    """Return the mean of one metric over the sites; None if it is not finite at one of them (null in their files)."""
    found = [values[name] for values in metrics.values()]
    if None in found:
        return None
    return sum(found) / len(found)
