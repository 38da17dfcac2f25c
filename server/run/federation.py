"""A whole run on a Grid: the records that are written first, the rounds, the results that are written last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tsugiki.common import __version__
from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.config.commented import comment
from tsugiki.common.config.files import to_toml, with_absolute_paths
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TsugikiError
from tsugiki.common.files import make_folder, read_lines, to_json, write_atomically
from tsugiki.common.model.device import precision_advice
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.load import grafts, load_graft
from tsugiki.common.model.rates import describe_rates, with_rates
from tsugiki.common.model.start import about_start, started
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.spec import AdapterSpec, Vector, sha256, unpack
from tsugiki.server.budget.assessment import check_hope
from tsugiki.server.engines.grid import RunGrid, Stop
from tsugiki.server.run import checkpoint
from tsugiki.server.run.anchors import check_anchors, check_finished
from tsugiki.server.run.at_sites import results
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.evaluate import make_evaluator
from tsugiki.server.run.farewell import tell_sites
from tsugiki.server.run.influence import dominant_sites
from tsugiki.server.run.loop import evaluated, initial_state, run_rounds
from tsugiki.server.run.privacy import Privacy, open_privacy, rows_summary
from tsugiki.server.run.progress import Progress, describe_missing, describe_notes, describe_rows
from tsugiki.server.run.resume import (
    Change,
    as_records,
    changes,
    check_plan,
    describe,
    judged_anew,
    measured_by,
    set_results_aside,
)
from tsugiki.server.run.roster import Roster
from tsugiki.server.run.storage import STOP_FILE, clear_start, run_folder
from tsugiki.server.run.suspicion import Suspicion
from tsugiki.server.run.warm_head import with_warm_head


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run: its folder, its last state and what is in summary.json."""

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
    sessions: Callable[[], Mapping[int, str]] | None = None,
    simulated: bool = False,
    accept_hopeless: bool = True,
) -> Outcome:
    """Run a whole federation on the Grid of any engine.

    Args:
        grid: sends messages to the sites and receives their replies.
        config: of the run.
        resume: go on from the last checkpoint in the run's folder instead of starting a new run.
        previous: with `resume`, go on from the checkpoint before the last, when the last is damaged.
        progress: shows the run to its operator.
        stop: set to end the run at the next chance.
        names: returns the names under which nodes' keys are registered, by node id; None: nodes have no keys.
        sessions: returns since when each node is connected, by node id; None: nobody knows.
        simulated: the clients exist in this run only, and so does their privacy ledger.
        accept_hopeless: start a run also if nothing can be learned under its privacy plan.

    Raises:
        TsugikiError: the run cannot start or go on; the class says why, and the last checkpoint is kept.
    """
    if not simulated:
        config = deployed(config)
    config = with_absolute_paths(config)
    progress = progress or Progress()
    stop = stop or Stop()
    place = Path(config.run.output_dir) / config.run.name
    with run_folder(place, resume=resume) as folder, stop.asked_by(folder / STOP_FILE):
        # what can fail without a site fails before a record is written: the run's name stays free
        graft = load_graft(config, config.model.name, config.run.seed)
        config, initial = _start(config, graft, folder, resume=resume)
        resolved = with_rates(config, config.model.name)
        rates = describe_rates(resolved, config)
        config = resolved
        plan = make_plan(config, graft.spec.size)
        if plan and not (accept_hopeless or resume):
            check_hope(plan, config.strategy.fraction_train)
        evaluator = make_evaluator(graft, config)
        # whatever is exchanged, a number takes at most eight bytes
        grid.limit_replies(graft.spec.size * 8)

        ledger = _ledger_path(config, folder, simulated)
        opened = _open(folder, config, plan, graft, initial, rates, ledger, resume=resume, previous=previous)
        del initial
        audit = opened.audit
        privacy = opened.privacy

        with progress:
            computes = simulated or evaluator is not None
            for line in [*opened.notes, *_advice(config, graft, rates, privacy, computes=computes)]:
                progress.note(line)
            roster = Roster(grid, config, graft.spec, plan, audit, stop, names, sessions)
            _wait_for_sites(roster, config, progress, audit)
            ctx = RunContext(
                config=config,
                spec=graft.spec,
                grid=grid,
                roster=roster,
                evaluate=evaluator,
                lower_is_better=config.metric in graft.task.lower_is_better,
                folder=folder,
                audit=audit,
                progress=progress,
                stop=stop,
                privacy=privacy,
                suspicion=Suspicion(verify(folder / "audit.jsonl")),
            )
            with _telling_sites(ctx):
                state = with_warm_head(ctx, graft, opened.state)
                if not grid.sequential:  # else the sites train in this process, with the same graft
                    grafts.clear()
                    graft.forget_initial()
                handed_over = [state]
                del state, opened  # or the adapter that the run starts from would stay in memory to its end
                state = run_rounds(ctx, handed_over.pop())

        summary = _write_results(ctx, graft, state)
        tell_sites(ctx, summary["stopped"])
    return Outcome(folder, state, summary)


@contextmanager
def _telling_sites(ctx: RunContext) -> Iterator[None]:
    """Tell the sites that the run is over, if an error of ours ends it inside a `with` block."""
    try:
        yield
    except TsugikiError as error:
        tell_sites(ctx, error.code)
        raise


def _start(config: RunConfig, graft: Graft, folder: Path, *, resume: bool) -> tuple[RunConfig, Vector]:
    """Return the settings with the hash of the adapter that the run starts from, and its values.

    A run that has begun needs the export no more: its checkpoint has the adapter, and its config.toml the hash.
    """
    if resume and checkpoint.exists(folder / "checkpoint"):
        return config, graft.initial
    return started(config, graft)


def _advice(config: RunConfig, graft: Graft, rates: str, privacy: Privacy | None, *, computes: bool) -> list[str]:
    """Return lines for the operator about settings that were chosen for the run, or might be chosen otherwise."""
    start = about_start(config)
    lines = ["starts from {start_from}, values {start_sha256:.12}".format_map(start)] if start else []
    lines += [precision_advice(config, str(graft.device).partition(":")[0]) if computes else "", rates]
    if privacy and not (config.privacy.enrolled_clients or config.simulation.data):
        most = "min_clients" if config.enrolled_clients == config.strategy.min_clients else "start_with"
        most += f" = {config.enrolled_clients}"
        lines.append(f"privacy.enrolled_clients is not set: no more than {most} may join")
    return [line for line in lines if line]


@dataclass(frozen=True)
class _Opened:
    """A run whose records are ready for its next round.

    Args:
        state: to go on from.
        audit: its audit log.
        privacy: the operator's part of a private run.
        notes: lines for the operator, on settings that have changed.
    """

    state: State
    audit: AuditLog
    privacy: Privacy | None
    notes: Sequence[str]


def _open(
    folder: Path,
    config: RunConfig,
    plan: Plan | None,
    graft: Graft,
    initial: Vector,
    rates: str,
    ledger: Path,
    *,
    resume: bool,
    previous: bool,
) -> _Opened:
    """Write the records that a run's folder has before its next round."""
    changed: list[Change] = []
    if resume:
        changed = changes(folder, config)
        state = _last_state(folder, config, plan, graft, initial, ledger, previous=previous)
    else:
        state = _first_state(folder, config, plan, graft, initial, rates)
    write_atomically(folder / "spec.json", _describe_spec(graft))
    audit = AuditLog(folder / "audit.jsonl")
    audit.write(
        "resumed" if resume else "started",
        round=state.round,
        version=__version__,
        config_sha256=config.sha256,
        spec_sha256=graft.spec.sha256,
        base_fingerprint=graft.spec.base_fingerprint,
        **about_start(config),
        **({"changed": as_records(changed)} if changed else {}),
    )
    # before any site is asked: a ledger that was tampered with, or lacks this run's rounds, ends the run here
    privacy = open_privacy(plan, config, ledger, audit, state.round)
    if resume:
        state = _go_on(folder, config, state, privacy, changed, graft)
    return _Opened(state, audit, privacy, describe(changed, config, state))


def _first_state(
    folder: Path, config: RunConfig, plan: Plan | None, graft: Graft, initial: Vector, rates: str
) -> State:
    """Write the settings of a new run, and the state before training, and return that state."""
    clear_start(folder)
    # before the first checkpoint: a folder with config.toml can be resumed
    _write_config(folder, config, plan, rates)
    state = initial_state(initial, None if plan is None else asdict(plan))
    state = replace(state, measured_by=measured_by(config))
    checkpoint.save(folder / "checkpoint", state, config.fixed, graft.spec.sha256)
    return state


def _write_config(folder: Path, config: RunConfig, plan: Plan | None, rates: str = "") -> None:
    """Write config.toml, with the plan's numbers: a resumed run need not calibrate again, and finds the same noise."""
    text = comment(rates) + to_toml(config.with_plan(plan))
    write_atomically(folder / "config.toml", text.encode())


def _last_state(
    folder: Path,
    config: RunConfig,
    plan: Plan | None,
    graft: Graft,
    initial: Vector,
    ledger: Path,
    *,
    previous: bool,
) -> State:
    """Return the state to go on from, after checking that its settings, its plan and its logs hold."""
    if previous:
        checkpoint.promote_previous(folder / "checkpoint")
    if not checkpoint.exists(folder / "checkpoint"):  # stopped before its first checkpoint
        return _first_state(folder, config, plan, graft, initial, "")
    state = checkpoint.load(folder / "checkpoint", config.fixed, graft.spec.sha256)
    check_plan(state.plan or {}, asdict(plan) if plan else {})
    # before metrics.jsonl is written anew: a log that was cut must not be continued
    check_anchors(folder, state.anchors, None if plan is None else ledger)
    check_finished(folder, state.round)
    return state


def _go_on(
    folder: Path,
    config: RunConfig,
    state: State,
    privacy: Privacy | None,
    changed: Sequence[Change],
    graft: Graft,
) -> State:
    """Bring the records of a resumed run up to its settings, and return its state with its last evaluation.

    Raises:
        BudgetError: the budget does not allow the rounds that were added.
        StorageError: `checkpoint-corrupt`, its best adapter is lost; or its records cannot be written.
    """
    plan = None if privacy is None else privacy.plan
    frozen = None if plan is None else asdict(plan)
    if privacy is not None and state.plan != frozen:
        privacy.check_rest(state.round, config.run.rounds)
    if changed:
        _write_config(folder, config, plan)
    if state.round < config.run.rounds:
        set_results_aside(folder, state)
    known = replace(state, plan=frozen)
    state = judged_anew(known, config)
    lower_is_better = config.metric in graft.task.lower_is_better
    for line in _drop_unfinished(folder / "metrics.jsonl", state, evaluated_too=state is known):
        # its line was written, so the round of the checkpoint was evaluated too
        if line["round"] == state.round and not line.get("voided"):
            state = evaluated(state, line, config.monitor, lower_is_better)
    # a run whose best adapter is damaged ends here, not after its last round
    checkpoint.read_best(folder / "checkpoint", state)
    return state


def _wait_for_sites(roster: Roster, config: RunConfig, progress: Progress, audit: AuditLog) -> None:
    """Wait until enough sites have joined, and show who is missing, and what is unusual about the others' rows."""
    roster.wait(lambda count: progress.note(f"{count} of {roster.nodes_wanted()} nodes connected"))
    members = roster.members()
    missing = roster.missing()
    if missing:
        audit.write("missing-at-start", sites=missing)
        progress.note(describe_missing(len(members), missing))
    for line in describe_notes({name: member.notes for name, member in members.items()}):
        progress.note(line)
    if config.privacy.mode == "none":  # a private run does not know the rows
        rows = {name: member.rows for name, member in members.items()}
        for line in describe_rows(rows, dominant_sites(rows), config.strategy.weighting):
            progress.note(line)


def _write_results(ctx: RunContext, graft: Graft, state: State) -> dict[str, Any]:
    """Write summary.json and the best adapter, close the audit log, and return the summary."""
    best = checkpoint.read_best(ctx.folder / "checkpoint", state)
    summary = summarise(ctx.config, graft, state, sha256(best), read_lines(ctx.folder / "metrics.jsonl"), ctx.privacy)
    summary["rows_privacy"] = _rows_summary(ctx.folder, ctx.config)
    write_atomically(ctx.folder / "summary.json", to_json(summary, indent=1).encode())
    _save_best(ctx.folder / "best", graft.spec, best)
    adapter_sha256 = sha256(state.vector)
    ctx.audit.write(
        "finished",
        round=state.round,
        adapter_sha256=adapter_sha256,
        best_round=state.best_round,
        metrics=ctx.logs.metrics(),
    )
    return summary


def deployed(config: RunConfig) -> RunConfig:
    """Return the run without simulated data: a plan must not count on simulated clients where the sites are real."""
    return config.model_copy(update={"simulation": config.simulation.model_copy(update={"data": ""})})


def _rows_summary(folder: Path, config: RunConfig) -> dict[str, Any]:
    return rows_summary(folder, config.privacy.examples.delta, seeded=config.privacy.insecure_noise_seed > 0)


def _ledger_path(config: RunConfig, folder: Path, simulated: bool) -> Path:
    """Return the path of the clients' privacy ledger."""
    if config.privacy.ledger:
        return Path(config.privacy.ledger)
    # simulated clients exist in this run only; real ones may take part in all runs beside it
    if simulated:
        return folder / "privacy-ledger.jsonl"
    return folder.parent / "privacy-ledger.jsonl"


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
    return to_json(body, indent=1).encode()


def _drop_unfinished(path: Path, state: State, *, evaluated_too: bool) -> list[dict[str, Any]]:
    """Drop the lines of rounds that no checkpoint covers, because those are done again. Return the others.

    Args:
        path: of metrics.jsonl.
        state: to go on from.
        evaluated_too: whether the evaluation of its round still holds. If not, its line is dropped too.
    """
    last = state.round if evaluated_too else state.round - 1
    kept = [line for line in read_lines(path) if line["round"] <= last or line.get("voided")]
    if kept:
        write_atomically(path, "".join(to_json(line) + "\n" for line in kept).encode())
    else:
        path.unlink(missing_ok=True)
    return kept


def _save_best(folder: Path, spec: AdapterSpec, best: Vector) -> None:
    """Write the best adapter under the names of the model's own parameters."""
    from safetensors.numpy import save

    make_folder(folder)
    write_atomically(folder / "adapter.safetensors", save(unpack(best, spec)))


def summarise(
    config: RunConfig,
    graft: Graft,
    state: State,
    best_sha256: str,
    lines: list[dict[str, Any]],
    privacy: Privacy | None = None,
) -> dict[str, Any]:
    """Return summary.json: the run in one look."""
    # voided attempts changed nothing, but their bytes and seconds count
    rounds = [line for line in lines if not line.get("voided")]
    return {
        "name": config.run.name,
        "rounds": state.round,
        "stopped": _why_stopped(config, state, privacy),
        "task": config.task.name,
        "method": config.adapter.method,
        "agreed": dict(graft.base.constants),
        **about_start(config),
        "strategy": config.strategy.name,
        "monitor": config.monitor,
        "lower_is_better": sorted(graft.task.lower_is_better),
        **results(rounds, state.best_round, config.metric, config.metric in graft.task.lower_is_better),
        "best_round": state.best_round,
        "adapter_sha256": sha256(state.vector),
        "best_sha256": best_sha256,
        "adapter_parameters": graft.spec.parameters("adapter"),
        "head_parameters": graft.spec.parameters("head"),
        "base_fingerprint": graft.spec.base_fingerprint,
        "learning_rate": config.train.rate,
        "head_learning_rate": config.train.head_rate,
        "threads": config.train.threads,
        "device": str(graft.device),
        "bytes_down": sum(line.get("bytes_down", 0) for line in lines),
        "bytes_up": sum(line.get("bytes_up", 0) for line in lines),
        "seconds": sum(sum(line["seconds"].values()) for line in lines),
        "privacy": privacy.summary() if privacy else {"mode": "none"},
    }


def _why_stopped(config: RunConfig, state: State, privacy: Privacy | None) -> str:
    """Return why a run ended: all rounds are done, the privacy budget is used up, or it stopped early."""
    if state.round >= config.run.rounds:
        return "finished"
    if privacy is not None and privacy.exhausted():
        return "budget-exhausted"
    return "early"
