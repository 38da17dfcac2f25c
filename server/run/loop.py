"""The round loop: sample, send, collect, guard, aggregate, checkpoint, evaluate, record."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tsugiki.common.errors import BudgetError, QuorumNotMet, TrainingError
from tsugiki.common.files import append_line
from tsugiki.common.wire.spec import Vector, l2_norm, sha256
from tsugiki.server.run import checkpoint
from tsugiki.server.run.aggregate import aggregate
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import collect, evaluate_at_sites, sample
from tsugiki.server.run.context import Collected, Parts
from tsugiki.server.run.factors import aggregation_error, combine
from tsugiki.server.run.privacy import Privacy
from tsugiki.server.run.replies import DROPOUT, Accepted, AcceptedSum
from tsugiki.server.run.roster import Member
from tsugiki.server.run.secagg import collect_sum

ATTEMPTS = 2
"""A voided round is tried once more, then the run stops."""


def run_rounds(parts: Parts, state: State) -> State:
    """Run the rounds that are left, and return the last state; every round is on disk when the next begins.

    Raises:
        QuorumNotMet: a round and its retry had too few accepted replies.
        BudgetError: the privacy budget does not allow a single round; later on it ends the run, as finished.
        NotEnoughSites: fewer sites than the quorum are connected.
        Interrupted: the user asked to stop.
        StorageError: the run's folder can no longer be written.
    """
    if state.evaluated_round < state.round:
        state = finish_round(parts, state)
    while state.round < parts.config.run.rounds and not _patience_is_over(parts, state):
        parts.stop.check()
        try:
            trained = train_round(parts, state)
        except BudgetError as error:
            if state.round == 0:
                raise
            parts.audit.write("budget-exhausted", round=state.round)
            parts.progress.note(str(error))
            return state
        state = finish_round(parts, trained)
    return state


def _patience_is_over(parts: Parts, state: State) -> bool:
    patience = parts.config.evaluation.early_stopping_patience
    return bool(patience) and state.evaluations_since_best >= patience


def train_round(parts: Parts, state: State) -> State:
    """Do one round up to its checkpoint; return the state after it.

    Raises:
        QuorumNotMet, NotEnoughSites, Interrupted, StorageError: see `run_rounds`.
    """
    number = state.round + 1
    for attempt in range(ATTEMPTS):
        if parts.privacy:
            parts.privacy.check_budget()
        cohort = sample(parts, number, attempt)
        parts.progress.round_begins(number, parts.config.run.rounds, [member.name for member in cohort])
        gather = collect_sum if parts.privacy and parts.privacy.plan.secure_aggregation else collect
        collected = gather(parts, state, number, cohort, attempt)
        if collected.clients >= parts.quorum:
            return _complete(parts, state, number, cohort, collected)
        _void(parts, number, attempt, cohort, collected)
    raise QuorumNotMet(
        f"round {number} had {collected.clients} accepted replies, twice",
        f"strategy.min_clients = {parts.config.strategy.min_clients}",
        f"see audit.jsonl; the model of round {state.round} is kept in {parts.folder / 'checkpoint'}, "
        f"and --resume {parts.folder} goes on from it",
    )


def _void(parts: Parts, number: int, attempt: int, cohort: list[Member], collected: Collected) -> None:
    """Record an attempt that changed nothing."""
    record = _record(parts, number, cohort, collected) | {"voided": True, "attempt": attempt}
    append_line(parts.folder / "metrics.jsonl", record)
    parts.audit.write(
        "round-voided",
        round=number,
        attempt=attempt,
        accepted=len(record["accepted"]),
        rejected={site: one["reason"] for site, one in record["rejected"].items()},
    )
    parts.progress.round_ends(record)


def _complete(parts: Parts, state: State, number: int, cohort: list[Member], collected: Collected) -> State:
    """Aggregate the accepted updates and checkpoint the result."""
    started = time.perf_counter()
    record = _record(parts, number, cohort, collected)
    accepted = [reply for reply in collected.accepted if isinstance(reply, Accepted)]
    if parts.privacy:
        mean, record["privacy"] = _private_mean(parts.privacy, number, collected)
        accepted = [Accepted("mean", mean, 1, None, 0, 0.0, l2_norm(mean), 0)]
    strategy, seed = parts.config.strategy, parts.config.run.seed
    update, remembered = aggregate(strategy, state.strategy, number, accepted)
    update = combine(strategy.name, parts.spec, state.vector, update, accepted, seed, number)
    vector = (state.vector + update).astype(np.float32)
    if not np.isfinite(vector).all():
        raise TrainingError(f"round {number}: the aggregated model is not finite", do="lower the learning rates")
    if not parts.privacy and (error := aggregation_error(parts.spec, state.vector, vector, accepted)) is not None:
        record["aggregation_error"] = error
    record["seconds"]["aggregate"] = time.perf_counter() - started
    record |= {"adapter_sha256": sha256(vector), "update_norm": l2_norm(update)}
    state = replace(state, vector=vector, round=number, strategy=remembered, record=record)
    if parts.evaluate is None:
        state = replace(state, best_vector=vector, best_round=number)
    parts.audit.write(  # before the checkpoint: a crash between them leaves a round recorded twice, not a missing one
        "round",
        round=number,
        accepted=sorted(record["accepted"]),
        rejected={site: one["reason"] for site, one in record["rejected"].items()},
        adapter_sha256=record["adapter_sha256"],
    )
    checkpoint.save(parts.folder / "checkpoint", state, parts.config.sha256, parts.spec.sha256)
    return state


def _private_mean(privacy: Privacy, number: int, collected: Collected) -> tuple[Vector, dict[str, Any]]:
    """Return the noisy mean of a round, and its figures; that it will be released is in the ledger before."""
    privacy.charge("release", number)
    total = collected.total
    if total is None:
        sums = [reply.levels for reply in collected.accepted if isinstance(reply, AcceptedSum)]
        total = np.sum([np.zeros(privacy.plan.dimension, np.int64), *sums], axis=0)
    return privacy.mean(total, collected.clients, number)


def _record(parts: Parts, number: int, cohort: list[Member], collected: Collected) -> dict[str, Any]:
    """Return what one attempt at a round adds to metrics.jsonl.

    Under Poisson sampling it does not say who was asked, nor how many, their bytes or time: the account counts on it.
    """
    if parts.withholds:
        cohort, collected = [], replace(collected, accepted=[], rejected=[], bytes_down=0, bytes_up=0)
    accepted = [reply for reply in collected.accepted if isinstance(reply, Accepted)]
    losses = [(reply.loss, reply.weight) for reply in accepted if reply.loss is not None]
    weight = sum(rows for _, rows in losses)
    return {
        "round": number,
        "cohort": [member.name for member in cohort],
        "accepted": {reply.site: _told(reply) for reply in collected.accepted},
        "rejected": {reply.site: {"reason": reply.reason, "detail": reply.detail} for reply in collected.rejected},
        "dropouts": sum(reply.reason == DROPOUT for reply in collected.rejected),
        "train_loss": sum(loss * rows for loss, rows in losses) / weight if weight else None,
        "bytes_down": collected.bytes_down,
        "bytes_up": collected.bytes_up,
        "seconds": {} if parts.withholds else {"wait": collected.wait_s},
        "train_seconds": max((reply.seconds for reply in accepted), default=0.0),
    }


def _told(reply: Accepted | AcceptedSum) -> dict[str, Any]:
    """Return what a reply says of itself: in a private run, how many clients are in it, which the server knew."""
    if isinstance(reply, AcceptedSum):
        return {"clients": reply.clients, "bytes_up": reply.size_bytes}
    return {
        "rows": reply.weight,
        "loss": reply.loss,
        "steps": reply.steps,
        "seconds": reply.seconds,
        "update_norm": reply.norm,
        "bytes_up": reply.size_bytes,
    }


def finish_round(parts: Parts, state: State) -> State:
    """Evaluate where it is due, keep the best adapter, write the round's line and the checkpoint that has it all."""
    number, evaluation = state.round, parts.config.evaluation
    record: dict[str, Any] = {"round": number, "seconds": {}, **state.record}
    due = number % evaluation.every_rounds == 0 or number == parts.config.run.rounds
    started = time.perf_counter()
    if parts.evaluate is not None and due:
        record["eval"] = parts.evaluate(state.vector)
        state, record["best"] = _judge(parts, state, record["eval"])
    if evaluation.at_sites and due:
        record["sites_eval"] = evaluate_at_sites(parts, state)
    record["seconds"] = {**record["seconds"], "evaluate": time.perf_counter() - started}
    state = replace(state, evaluated_round=number, record={})
    append_line(parts.folder / "metrics.jsonl", record)
    checkpoint.save(parts.folder / "checkpoint", state, parts.config.sha256, parts.spec.sha256)
    parts.progress.round_ends(record)
    return state


def _judge(parts: Parts, state: State, metrics: Mapping[str, float]) -> tuple[State, bool]:
    """Return the state with the best adapter kept, and whether this one is it."""
    monitor = parts.config.monitor
    value, best = metrics[monitor], state.best_metric
    better = math.isfinite(value) and (best is None or (value < best if parts.lower_is_better else value > best))
    if not better:
        return replace(state, evaluations_since_best=state.evaluations_since_best + 1), False
    state = replace(
        state, best_vector=state.vector, best_metric=value, best_round=state.round, evaluations_since_best=0
    )
    return state, True


def initial_state(vector: Vector, plan: Mapping[str, Any] | None = None) -> State:
    """Return the state before the first round; `plan` is the privacy plan of a private run."""
    return State(vector, vector, plan=plan)
