"""STS Benchmark: Pearson on the test part before training, after federated, and after centralised training.

    TSUGIKI_DATA=... python scripts/studies/stsb.py [--seeds 1 2 3]

all-MiniLM-L6-v2, LoRA rank 8, cosine-similarity loss, 4 IID sites over the train part, 10 rounds of 18 steps of 16
pairs at each site, against 720 steps in one place. The last adapter counts; nothing is chosen on the test part. The
base model was trained on NLI and Stack Exchange data, so these sentences are not a new domain to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.files import read
from tsugiki.server.baselines import run_baselines
from tsugiki.server.run.progress import Lines
from tsugiki.server.run.simulate import simulate


def run_seed(seed: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Return the three correlations of one seed."""
    changes = [f"run.seed={seed}", f"run.output_dir={folder}", f"run.name=stsb-{seed}", "evaluation.every_rounds=1000"]
    config = read(ROOT / "examples" / "stsb.toml", [*changes, *overrides])
    outcome = simulate(config, simulated_app, progress=Lines())
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    kinds = ["untouched", "centralised"]
    sites = [f"site-{number}" for number in range(config.simulation.clients)]
    results = run_baselines(config, outcome.folder, simulated_app, sites, kinds, Lines())
    result = {
        "seed": seed,
        "before": results["untouched"]["pearson"],
        "federated": lines[-1]["eval"]["pearson"],
        "centralised": results["centralised"]["pearson"],
    }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [run_seed(seed, Path(folder), options.set) for seed in options.seeds]
    figures = []
    for name in ("before", "federated", "centralised"):
        values = [result[name] for result in results]
        note = f"seeds {options.seeds}: {[round(value, 4) for value in values]}"
        figures.append(Figure(f"Pearson on test, {name}", mean(values), "", "", note))
    centre, low, high = interval([result["centralised"] - result["federated"] for result in results])
    note = f"95 % interval {low:.4f} to {high:.4f}"
    figures.append(Figure("paired gap, centralised minus federated", centre, "", "", note))
    show("STS-B, LoRA, 4 sites", figures)


if __name__ == "__main__":
    main()
