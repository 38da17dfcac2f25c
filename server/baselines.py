"""Baselines of federated training: no training, every site alone, all data in one place.

Each trained baseline is a federation of one, the same program with other settings. A site alone trains as in the
federation, round by round with a fresh optimiser in each, so that only the averaging is missing. The central run takes
the steps of all sites together in one round, as in training without a federation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import UsageError
from tsugiki.common.files import read_lines, write_atomically
from tsugiki.common.model.load import load_graft
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.evaluate import evaluate_base, make_evaluator
from tsugiki.server.run.federation import Outcome, run_federation
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.simulate import SimulatedApp, simulate

Metrics = dict[str, float]

KINDS = ("untouched", "local", "centralised")
"""Names of the baselines."""

_ALONE: Mapping[str, Any] = {
    "strategy": {
        "name": "fedavg",
        "min_clients": 1,
        "round_timeout_s": 604_800.0,
        "max_update_norm": sys.float_info.max,  # an update may be the whole training here
    },
    "simulation.ranks": [],
    "privacy": {"mode": "none"},  # one party alone has nobody to protect its data from
    "evaluation.data": "",
    "evaluation.at_sites": False,
    "evaluation.early_stopping_patience": 0,
}
"""Settings that a federation of one changes in a run."""


def centralised(config: RunConfig, sites: int) -> RunConfig:
    """Return the run with all data at one site and equally many training samples; epochs are rounded."""
    rounds = config.run.rounds * config.strategy.fraction_train  # rounds of an average site
    changes = {
        **_ALONE,
        "run.rounds": 1,
        "train.local_steps": max(1, round(config.train.local_steps * rounds * sites)),
        "train.local_patience": 0,  # its one round is the whole training
        "simulation.partition": "iid",
        "simulation.column": "",
        "simulation.clients": 1,
        "simulation.clients_per_site": 1,
    }
    if config.train.local_epochs:
        changes["train.local_epochs"] = max(1, round(config.train.local_epochs * rounds))
    return changed(config, changes)


def local_only(config: RunConfig) -> RunConfig:
    """Return the run of one site by itself, with its average number of rounds and the same split of data."""
    asked = max(1, round(config.run.rounds * config.strategy.fraction_train))
    return changed(config, {**_ALONE, "run.rounds": asked})


def run_baselines(
    config: RunConfig,
    folder: Path,
    client: SimulatedApp,
    sites: list[str],
    kinds: list[str],
    progress: Progress,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Return the metrics of each baseline on the central evaluation data, and write them to baselines.json.

    Args:
        config: the federated run, with evaluation data.
        folder: folder of the federated run.
        client: makes ClientApps of simulated sites.
        sites: names of all sites.
        kinds: baselines to run, of `KINDS`.
        progress: is given a note as each baseline begins.
        stop: a request to stop ends the baseline that is running.

    Raises:
        Interrupted: `stop` was requested.
    """
    graft = load_graft(config, config.model.name, config.run.seed)
    evaluate = make_evaluator(graft, config)
    if evaluate is None:
        return {}
    results: dict[str, Any] = {}
    if "untouched" in kinds:  # nothing is trained, so this one needs no federation
        progress.note("baseline: the untouched base model")
        results["untouched"] = evaluate_base(graft, config)

    def train_alone(alone: RunConfig, name: str, app: ClientApp) -> Metrics:
        progress.note(f"baseline: {name}")
        alone = changed(alone, {"run.output_dir": str(folder / "baselines"), "run.name": name})
        outcome = run_federation(InProcessGrid(app, 1), alone, stop=stop)
        return evaluate(outcome.state.vector)

    if "local" in kinds:
        alone = local_only(config)
        results["local"] = {site: train_alone(alone, f"local-{site}", client(alone, site)[0]) for site in sites}
    if "centralised" in kinds:
        central = centralised(config, len(sites))
        results["centralised"] = train_alone(central, "centralised", client(central, "")[0])
    write_atomically(folder / "baselines.json", json.dumps(results, indent=1).encode())
    return results


def compare(
    config: RunConfig,
    client: SimulatedApp,
    kinds: Sequence[str] = KINDS,
    *,
    progress: Progress,
    notes: Progress,
    stop: Stop | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Run a federation and its baselines; return what the run leaves, and the metrics of each training by name.

    Args:
        config: the run, with evaluation data.
        client: makes ClientApps of simulated sites.
        kinds: baselines to run, of `KINDS`.
        progress: shows the federated run.
        notes: is given a note as each baseline begins.
        stop: a request to stop ends what is running.

    Raises:
        UsageError: the run has no held-out rows.
        TsugikiError: a run cannot start or go on.
    """
    if not config.evaluation.data:
        raise UsageError("the run has nothing to compare by", "evaluation.data in the run file", "name a held-out file")
    outcome = simulate(config, client, progress=progress, stop=stop)
    sites = site_names(outcome.folder)
    found = run_baselines(config, outcome.folder, client, sites, list(kinds), notes, stop)
    return outcome, {"federated": last_evaluation(outcome.folder), **found}


def site_names(folder: Path) -> list[str]:
    """Return the sites that passed the hello, from the audit log of a run's folder."""
    return sorted({event["site"] for event in verify(folder / "audit.jsonl") if event["event"] == "hello"})


def last_evaluation(folder: Path) -> dict[str, float]:
    """Return the metrics of the last evaluated round of a run's folder."""
    found: Metrics = [line["eval"] for line in read_lines(folder / "metrics.jsonl") if "eval" in line][-1]
    return found


def average(metrics: dict[str, Metrics], name: str) -> float:
    """Return the mean of one metric over the sites."""
    return sum(values[name] for values in metrics.values()) / len(metrics)
