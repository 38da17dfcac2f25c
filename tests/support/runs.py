"""Folders of finished runs, written by hand: for tests of what reads them."""

import json

BASELINES = {
    "untouched": {"accuracy": 0.5},
    "local": {"a": {"accuracy": 0.6}, "b": {"accuracy": 0.8}},
    "centralised": {"accuracy": 0.95},
}


def accepted(loss=0.5, rows=10):
    """Return what one accepted reply leaves in a line."""
    return {"rows": rows, "loss": loss, "steps": 2, "seconds": 1.0, "update_norm": 0.1, "bytes_up": 1000}


def line(number, good=("a", "b"), bad=None, **more):
    """Return one attempt at a round: the sites with accepted replies, and the others with their reasons."""
    bad = bad or {}
    return {
        "round": number,
        "cohort": sorted([*good, *bad]),
        "accepted": {site: accepted(0.7 - 0.1 * number) for site in good},
        "rejected": {site: {"reason": reason, "detail": ""} for site, reason in bad.items()},
        "train_loss": 0.7 - 0.1 * number if good else None,
        "bytes_down": 1000 * (len(good) + len(bad)),
        "bytes_up": 1000 * len(good),
        "seconds": {"wait": 2.0, "aggregate": 0.1},
        **more,
    }


def start(**metrics):
    """Return round 0, evaluated."""
    return {"round": 0, "seconds": {"evaluate": 1.0}, "eval": metrics}


def voided(number, **more):
    """Return an attempt that did not reach its quorum."""
    return line(number, good=("a",), bad={"b": "norm"}, voided=True, attempt=0, **more)


def run_folder(folder, lines, baselines=None, **summary):
    """Write a run's files and return the folder."""
    folder.mkdir(exist_ok=True)
    done = [entry for entry in lines if not entry.get("voided")]
    measured = [entry for entry in done if "eval" in entry]
    best = max(measured, key=lambda entry: entry["eval"]["accuracy"], default=None)
    body = {
        "name": "small",
        "rounds": max((entry["round"] for entry in done), default=0),
        "stopped": "finished",
        "task": "sequence-classification",
        "method": "lora",
        "strategy": "fedavg",
        "monitor": "accuracy",
        "before": measured[0]["eval"] if measured else None,
        "after": best["eval"] if best else None,
        "best_round": best["round"] if best else 1,
        "adapter_sha256": "ab" * 32,
        "adapter_parameters": 1234,
        "head_parameters": 20,
        **summary,
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (folder / "summary.json").write_text(json.dumps(body))
    (folder / "config.toml").write_text('[run]\nname = "small"\n\n[privacy]\nmode = "none"\n')
    if baselines is not None:
        (folder / "baselines.json").write_text(json.dumps(baselines))
    return folder


def usual(folder, baselines=None):
    """Return a run of two rounds with everything in it."""
    at_sites = {site: {"accuracy": value, "rows": 5} for site, value in (("a", 0.9), ("b", 0.6))}
    return run_folder(
        folder,
        [
            start(accuracy=0.5, loss=0.7),
            line(1, eval={"accuracy": 0.8, "loss": 0.5}, sites_eval=at_sites),
            voided(2),
            line(2, bad={"c": "gone"}, eval={"accuracy": 0.75, "loss": 0.4}, sites_eval=at_sites),
        ],
        baselines,
    )
