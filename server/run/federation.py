"""A whole run on a Grid: what is written first, the rounds, what is written last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsugiki.common import __version__
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.files import to_toml, with_absolute_paths
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import StorageError
from tsugiki.common.files import read_lines, write_atomically
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.planning import make_plan, resolve
from tsugiki.common.wire.spec import AdapterSpec, sha256, unpack
from tsugiki.server.engines.grid import RunGrid, Stop
from tsugiki.server.run import checkpoint
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.context import Parts
from tsugiki.server.run.evaluate import make_evaluator
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.privacy import Privacy, open_privacy, rows_summary
from tsugiki.server.run.progress import Progress, describe_notes
from tsugiki.server.run.roster import Roster
from tsugiki.server.run.storage import run_folder


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves in memory."""

    folder: Path
    state: State
    summary: dict[str, Any]


def run_federation(
    grid: RunGrid,
    config: RunConfig,
    *,
    resume: bool = False,
    previous: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
    names: Callable[[], Mapping[int, str]] | None = None,
    simulated: bool = False,
) -> Outcome:
    """Run a whole federation on a Grid, whichever engine lends it.

    Args:
        grid: where the sites are.
        config: the run.
        resume: go on from the last checkpoint in the run's folder instead of starting a new one.
        previous: with `resume`, from the one before it, when the last is damaged.
        progress: shows what happens.
        stop: set to end the run at the next chance.
        names: returns the names under which nodes' keys are registered, by node id; None: nodes have no keys.
        simulated: the clients exist in this run only, and so does their privacy ledger.

    Raises:
        TsugikiError: the run cannot start or go on; the class says why, and the last checkpoint is kept.
    """
    config = with_absolute_paths(config if simulated else deployed(config))
    progress, stop = progress or Progress(), stop or Stop()
    with run_folder(Path(config.run.output_dir) / config.run.name, resume=resume) as folder:
        graft = load_graft(config, config.model.name, config.run.seed)
        given = config.privacy.enrolled_clients or config.simulation.data
        config = resolve(config, graft.spec.size)
        evaluator = make_evaluator(graft, config)
        grid.limit_replies(graft.spec.size * 8)  # whatever is exchanged, a number takes at most eight bytes
        if resume and previous:
            checkpoint.promote_previous(folder / "checkpoint")
        if not resume:  # before the first checkpoint: a folder with either can be resumed
            write_atomically(folder / "config.toml", to_toml(config).encode())
        state = _first_state(folder / "checkpoint", config, graft, resume)
        write_atomically(folder / "spec.json", _describe_spec(graft))
        _drop_unfinished(folder / "metrics.jsonl", state)
        audit = AuditLog(folder / "audit.jsonl")
        audit.write(
            "resumed" if resume else "started",
            round=state.round,
            version=__version__,
            config_sha256=config.sha256,
            spec_sha256=graft.spec.sha256,
            base_fingerprint=graft.spec.base_fingerprint,
        )
        ledger = _ledger_path(config, folder, simulated)
        privacy = open_privacy(config, graft.spec.size, ledger, audit, state.round)
        with progress:
            if privacy and not given:
                most = config.strategy.min_clients
                progress.note(f"privacy.enrolled_clients is not set: no more than min_clients = {most} may join")
            roster = Roster(grid, config, graft.spec, audit, stop, names)
            roster.wait(lambda count: progress.note(f"{count} of {config.strategy.min_clients} nodes connected"))
            for line in describe_notes({name: member.notes for name, member in roster.members().items()}):
                progress.note(line)
            lower = config.monitor in graft.task.lower_is_better
            parts = Parts(config, graft.spec, grid, roster, evaluator, lower, folder, audit, progress, stop, privacy)
            state = run_rounds(parts, state)
        summary = summarise(config, graft, state, read_lines(folder / "metrics.jsonl"), privacy)
        summary["rows_privacy"] = _rows_summary(folder, config)
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
        _save_best(folder / "best", graft.spec, state)
        audit.write("finished", round=state.round, adapter_sha256=sha256(state.vector), best_round=state.best_round)
    return Outcome(folder, state, summary)


def deployed(config: RunConfig) -> RunConfig:
    """Return the run without its simulation: real sites are as many as they are, and no plan may rest on the others."""
    return config.model_copy(update={"simulation": config.simulation.model_copy(update={"data": ""})})


def _rows_summary(folder: Path, config: RunConfig) -> dict[str, Any]:
    return rows_summary(folder, config.privacy.examples.delta, seeded=config.privacy.insecure_noise_seed > 0)


def _first_state(folder: Path, config: RunConfig, graft: Graft, resume: bool) -> State:
    """Return the last checkpoint's state, or that before training: checkpointed too, so that every run can go on."""
    plan = make_plan(config, graft.spec.size)
    frozen = None if plan is None else asdict(plan)
    if resume and any(folder.glob("*.json")):
        state = checkpoint.load(folder, config.sha256, graft.spec.sha256)
        _check_plan(state.plan or {}, frozen or {})
        return state
    state = initial_state(graft.initial, frozen)
    checkpoint.save(folder, state, config.sha256, graft.spec.sha256)
    return state


def _check_plan(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Do nothing if a run goes on under the privacy plan that it was started with.

    Raises:
        StorageError: `plan-changed`, with what differs.
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        raise StorageError(
            "the privacy plan has changed: "
            + ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names),
            "the plan that the run was started with: its account holds for no other",
            "resume with the same [privacy] settings and versions, or start a new run on the same ledger",
            code="plan-changed",
        )


def _ledger_path(config: RunConfig, folder: Path, simulated: bool) -> Path:
    """Return where the clients' privacy ledger is."""
    if config.privacy.ledger:
        return Path(config.privacy.ledger)
    return (folder if simulated else folder.parent) / "privacy-ledger.jsonl"


def _describe_spec(graft: Graft) -> bytes:
    """Return spec.json: what was exchanged, for people and for `tsugiki export`."""
    spec = graft.spec
    body = {
        "task": spec.task,
        "method": spec.method,
        "settings": json.loads(spec.settings),
        "constants": dict(graft.base.constants),
        "base_fingerprint": spec.base_fingerprint,
        "wire_dtype": spec.wire_dtype,
        "sha256": spec.sha256,
        "adapter_parameters": spec.parameters("adapter"),
        "head_parameters": spec.parameters("head"),
        "size_bytes": spec.size_bytes,
        "tensors": [{"name": t.name, "shape": t.shape, "part": t.part} for t in spec.tensors],
    }
    return json.dumps(body, indent=1).encode()


def _drop_unfinished(path: Path, state: State) -> None:
    """Leave out the lines of rounds that a crash undid; they will be written again."""
    kept = [line for line in read_lines(path) if line["round"] <= state.evaluated_round or line.get("voided")]
    if kept:
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    else:
        path.unlink(missing_ok=True)


def _save_best(folder: Path, spec: AdapterSpec, state: State) -> None:
    """Write the best adapter under the names of the model's own parameters."""
    from safetensors.numpy import save

    folder.mkdir(exist_ok=True)
    write_atomically(folder / "adapter.safetensors", save(unpack(state.best_vector, spec)))


def summarise(
    config: RunConfig, graft: Graft, state: State, lines: list[dict[str, Any]], privacy: Privacy | None = None
) -> dict[str, Any]:
    """Return summary.json: the run in one look."""
    rounds = [line for line in lines if not line.get("voided")]
    evaluated = [line for line in rounds if "eval" in line]
    best = next((line for line in evaluated if line["round"] == state.best_round), None)
    out_of_budget = privacy is not None and privacy.exhausted()
    unfinished = "budget-exhausted" if out_of_budget else "early"
    return {
        "name": config.run.name,
        "rounds": state.round,
        "stopped": "finished" if state.round == config.run.rounds else unfinished,
        "task": config.task.name,
        "method": config.adapter.method,
        "strategy": config.strategy.name,
        "monitor": config.monitor,
        "lower_is_better": sorted(graft.task.lower_is_better),
        "before": evaluated[0]["eval"] if evaluated else None,
        "after": best["eval"] if best else None,
        "best_round": state.best_round,
        "adapter_sha256": sha256(state.vector),
        "best_sha256": sha256(state.best_vector),
        "adapter_parameters": graft.spec.parameters("adapter"),
        "head_parameters": graft.spec.parameters("head"),
        "base_fingerprint": graft.spec.base_fingerprint,
        "threads": config.train.threads,
        "device": str(graft.device),
        "bytes_down": sum(line.get("bytes_down", 0) for line in lines),
        "bytes_up": sum(line.get("bytes_up", 0) for line in lines),
        "seconds": sum(sum(line["seconds"].values()) for line in lines),
        "privacy": privacy.summary() if privacy else {"mode": "none"},
    }
