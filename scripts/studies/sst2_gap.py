"""Federated against centralised training on SST-2, at equal samples, over several seeds.

    TSUGIKI_DATA=... python scripts/studies/sst2_gap.py [--method houlsby] [--seeds 1 2 3]

all-MiniLM-L6-v2, 4 IID sites, 16,000 training sentences in total, each seen once: 25 rounds of 40 steps of 4 rows at
each site, against 1,000 steps of 16 rows in one place. Each kind of training has a batch size and a learning rate of
its own, chosen with seed 7 on the 2,042 sentences of dev.tsv that have 12 words or more, as most of the test's have.
Accuracy of the last round on the 872 sentences of GLUE's dev split (test.tsv here). Nothing is chosen on those: no
early stopping, the last adapter counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.files import expand, override, read_toml
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.server.baselines import run_baselines
from tsugiki.server.run.progress import Lines
from tsugiki.server.run.simulate import simulate

TARGETS = {"lora": (">= 83.5", "<= 1.0"), "houlsby": ("", "")}
CENTRAL = {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "local_steps": 10}
"""Of the run in one place; `local_steps` counts as a site's of a round, of which it takes all."""


def configure(method: str, seed: int, folder: Path, overrides: list[str]) -> RunConfig:
    """Return examples/sst2.toml for a seed, evaluated once, after the last round."""
    file = ROOT / "examples" / "sst2.toml"
    named = [f"run.seed={seed}", f"run.output_dir={folder}", f"run.name={method}-{seed}"]
    raw = {**read_toml(file), "adapter": {"method": method}}  # the method's own defaults: LoRA has rank 8
    raw, problems = expand(override(raw, [*named, "evaluation.every_rounds=1000", *overrides]))
    return parse(raw, str(file), problems)


def run_seed(method: str, seed: int, folder: Path, overrides: list[str], central: bool) -> dict[str, Any]:
    """Return the accuracies, in percent, of one seed."""
    config = configure(method, seed, folder, overrides)
    started = time.perf_counter()
    outcome = simulate(config, simulated_app, progress=Lines())
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "seed": seed,
        "federated": 100 * lines[-1]["eval"]["accuracy"],
        "parameters": outcome.summary["adapter_parameters"],
        "head": outcome.summary["head_parameters"],
    }
    if central:
        kinds = ["centralised"]
        sites = [f"site-{number}" for number in range(config.simulation.clients)]
        at_once = changed(config, {f"train.{key}": value for key, value in CENTRAL.items()})
        results = run_baselines(at_once, outcome.folder, simulated_app, sites, kinds, Lines())
        result["centralised"] = 100 * results["centralised"]["accuracy"]
    result["seconds"] = time.perf_counter() - started
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora", choices=["lora", "houlsby"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-central", action="store_true", help="federated only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            run_seed(options.method, seed, Path(folder), options.set, not options.no_central) for seed in options.seeds
        ]
    accuracy, gap = TARGETS[options.method]
    seeds = f"seeds {options.seeds}"
    federated = [result["federated"] for result in results]
    figures = [
        Figure("federated accuracy", mean(federated), "%", "", f"{seeds}: {[round(value, 2) for value in federated]}"),
        Figure("adapter parameters", results[0]["parameters"], "", "", f"and {results[0]['head']} in the head"),
    ]
    if not options.no_central:
        centralised = [result["centralised"] for result in results]
        gaps = [there - here for there, here in zip(centralised, federated, strict=True)]
        centre, low, high = interval(gaps)
        values = [round(value, 2) for value in centralised]
        figures.insert(0, Figure("centralised accuracy", mean(centralised), "%", accuracy, f"{seeds}: {values}"))
        note = f"95 % interval {low:.2f} to {high:.2f}"
        figures.insert(2, Figure("paired gap, centralised minus federated", centre, "points", gap, note))
    show(f"SST-2, {options.method}, 4 sites", figures)


if __name__ == "__main__":
    main()
