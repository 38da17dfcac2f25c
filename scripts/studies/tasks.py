"""Each example of a task on real data: before, federated, and centralised on the same number of samples.

    TSUGIKI_DATA=... python scripts/studies/tasks.py nextword --model FOLDER [--seeds 42] [--set KEY=VALUE ...]

The first argument names a file of examples/: nextword, instructions, reward, dpo, rlhf or mnist. FOLDER is the base as
`transformers` saves it (stories260K or SmolLM2-135M for the language models, what scripts/studies/pretrain_cnn.py
writes for mnist). Rows for training and rows held out are those that the header of the example names. All metrics are
of the last round: nothing is chosen on the rows held out. The centralised run takes the steps of all sites in one
place, with the same batch size; `--central KEY=VALUE` gives it a setting of its own, as a learning rate. rlhf takes
`--set task.reward_adapter=FOLDER`, an export of the example reward on the same base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, interval, mean, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.client.app import simulated_app
from tsugiki.common.config.files import expand, override, read_toml
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.server.baselines import run_baselines
from tsugiki.server.run.progress import Lines
from tsugiki.server.run.simulate import simulate


@dataclass(frozen=True)
class Study:
    """What an example is judged by.

    Args:
        metric: of the evaluation.
        target: on the metric after the federated run; empty for none.
        share: the least share of the centralised improvement in the metric; 0 for none.
        beside: other metrics to print.
        rows: the published file, and the names of the two files that the example reads; none: it reads the data itself.
    """

    metric: str
    target: str = ""
    share: float = 0.0
    beside: tuple[str, ...] = ()
    rows: tuple[str, str, str] | None = None


STUDIES = {
    "nextword": Study(
        "loss",
        share=0.8,
        beside=("accuracy",),
        rows=("stackoverflow_titles/titles.txt", "titles-train.txt", "titles-test.txt"),
    ),
    "instructions": Study(
        "loss",
        share=0.8,
        beside=("accuracy",),
        rows=("instruct/rasbt_instruction_1100.json", "asked-train.jsonl", "asked-test.jsonl"),
    ),
    "reward": Study(
        "accuracy",
        ">= 0.8",
        beside=("margin",),
        rows=("preference/rasbt_preference_1100.json", "judged-train.jsonl", "judged-test.jsonl"),
    ),
    "dpo": Study(
        "margin",
        ">= 0.001",
        beside=("accuracy",),
        rows=("preference/rasbt_preference_1100.json", "judged-train.jsonl", "judged-test.jsonl"),
    ),
    "rlhf": Study(
        "reward",
        beside=("reward_low", "reward_high", "kl", "kl_above", "entropy", "length_tokens", "ended"),
        rows=("preference/rasbt_preference_1100.json", "judged-train.jsonl", "judged-test.jsonl"),
    ),
    "mnist": Study("accuracy"),
}


def write_rows(source: Path, train: Path, test: Path) -> None:
    """Write rows to train on and rows held out, as the examples' headers say."""
    if source.suffix == ".txt":
        lines = source.read_text("utf-8").splitlines(keepends=True)
        train.write_text("".join(line for number, line in enumerate(lines, 1) if number % 10), "utf-8")
        test.write_text("".join(line for number, line in enumerate(lines, 1) if not number % 10), "utf-8")
        return
    rows = [json.dumps(row) + "\n" for row in json.loads(source.read_text("utf-8"))]
    train.write_text("".join(rows[:1000]), "utf-8")
    test.write_text("".join(rows[1000:]), "utf-8")


def configure(name: str, seed: int, folder: Path, model: str, overrides: Sequence[str]) -> RunConfig:
    """Return an example as it is to be run, evaluated before the first round and after the last."""
    study, file = STUDIES[name], ROOT / "examples" / f"{name}.toml"
    named = [f"run.seed={seed}", f"run.output_dir={folder}", f"run.name={name}-{seed}", "evaluation.every_rounds=1000"]
    if model:
        named.append(f"model.name={model}")
    if study.rows:
        source, train, test = study.rows
        write_rows(Path(os.environ["TSUGIKI_DATA"]) / source, folder / train, folder / test)
        named += [f"simulation.data={folder / train}", f"evaluation.data={folder / test}"]
    raw, problems = expand(override(read_toml(file), [*named, *overrides]))
    return parse(raw, str(file), problems)


def run_seed(name: str, config: RunConfig, central: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of one seed: before, federated, centralised."""
    started = time.perf_counter()
    outcome = simulate(config, simulated_app, progress=Lines())
    lines = read_lines(outcome.folder / "metrics.jsonl")
    sites = [f"site-{number}" for number in range(config.simulation.clients)]
    told = parse(override(config.model_dump(mode="json"), list(central)))
    found = run_baselines(told, outcome.folder, simulated_app, sites, ["centralised"], Lines())
    result = {
        "study": name,
        "seed": config.run.seed,
        "before": outcome.summary["before"],
        "federated": lines[-1]["eval"],
        **found,
        "parameters": outcome.summary["adapter_parameters"],
        "head": outcome.summary["head_parameters"],
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(result), flush=True)
    return result


def figures_of(study: Study, results: Sequence[dict[str, Any]]) -> list[Figure]:
    """Return what the seeds have shown, in the mean."""
    found = []
    for metric in (study.metric, *study.beside):
        for kind in ("before", "federated", "centralised"):
            values = [result[kind][metric] for result in results]
            target = study.target if (metric, kind) == (study.metric, "federated") else ""
            note = f"seeds {[result['seed'] for result in results]}: {[round(value, 4) for value in values]}"
            found.append(Figure(f"{metric}, {kind}", mean(values), "", target, note))
    if "reward_low" in study.beside:
        gains = [result["federated"][study.metric] - result["before"][study.metric] for result in results]
        found.append(
            Figure(f"rise of {study.metric}", mean(gains), "", ">= 0", f"{[round(gain, 3) for gain in gains]}")
        )
        above = [result["federated"]["reward_low"] - result["before"]["reward_high"] for result in results]
        found.append(Figure("gap between the 95 % intervals before and after", min(above), "", ">= 0"))
    if study.share:
        gains = [
            [result["before"][study.metric] - result[kind][study.metric] for kind in ("federated", "centralised")]
            for result in results
        ]
        shares = [there / central for there, central in gains]
        centre, low, high = interval(shares)
        note = f"95 % interval {low:.3f} to {high:.3f}" if len(shares) > 1 else "one seed"
        name = f"share of the centralised improvement in {study.metric}"
        found.append(Figure(name, centre, "ratio", f">= {study.share}", note))
    found.append(
        Figure("adapter parameters", results[0]["parameters"], "", "", f"and {results[0]['head']} in the head")
    )
    found.append(Figure("seconds a seed", mean([result["seconds"] for result in results]), "s"))
    return found


def main() -> None:
    """Run all seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--model", default="", help="the base; by default the example's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--central", action="append", default=[], metavar="KEY=VALUE", help="of the centralised run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            run_seed(
                options.study,
                configure(options.study, seed, Path(folder), options.model, options.set),
                options.central,
            )
            for seed in options.seeds
        ]
    show(f"{options.study}, federated against centralised", figures_of(STUDIES[options.study], results))


if __name__ == "__main__":
    main()
