"""The round loop: sample, send, collect, guard, aggregate, checkpoint, evaluate, record."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.audit import AuditLog
from common.config import RunConfig
from common.errors import NotEnoughSites, QuorumNotMet, TrainingError
from common.files import append_line
from common.messages import EvaluateRequest, TrainRequest, to_record
from common.rng import generator
from common.wire import AdapterSpec, Vector, encode, l2_norm, sha256
from server import checkpoint
from server.checkpoint import State
from server.engines.grid import Stop, exchange
from server.evaluate import Evaluator
from server.guard import DROPOUT, Accepted, Asked, Rejected, check, check_evaluation
from server.progress import Progress
from server.roster import Member, Roster
from server.strategy import aggregate

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid

ATTEMPTS = 2
"""A voided round is tried once more, then the run stops."""


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

    config: RunConfig
    spec: AdapterSpec
    grid: Grid
    roster: Roster
    evaluate: Evaluator | None
    lower_is_better: bool
    folder: Path
    audit: AuditLog
    progress: Progress = field(default_factory=Progress)
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class Collected:
    """What came back in one attempt at a round."""

    accepted: list[Accepted]
    rejected: list[Rejected]
    bytes_down: int
    bytes_up: int
    wait_s: float


def run_rounds(parts: Parts, state: State) -> State:
    """Run the rounds that are left, and return the last state; every round is on disk when the next begins.

    Raises:
        QuorumNotMet: a round and its retry had too few accepted replies.
        NotEnoughSites: fewer sites than the quorum are connected.
        Interrupted: the user asked to stop.
        StorageError: the run's folder can no longer be written.
    """
    if state.evaluated_round < state.round:
        state = finish_round(parts, state)
    while state.round < parts.config.run.rounds and not _patience_is_over(parts, state):
        parts.stop.check()
        state = finish_round(parts, train_round(parts, state))
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
        cohort = sample(parts, number, attempt)
        parts.progress.round_begins(number, parts.config.run.rounds, [member.name for member in cohort])
        collected = collect(parts, state, number, cohort)
        if len(collected.accepted) >= parts.config.strategy.min_clients:
            return _complete(parts, state, number, cohort, collected)
        _void(parts, number, attempt, cohort, collected)
    raise QuorumNotMet(
        f"round {number}: {len(collected.accepted)} accepted replies, twice",
        f"strategy.min_clients = {parts.config.strategy.min_clients}",
        f"see audit.jsonl; the model of round {state.round} is kept in {parts.folder / 'checkpoint'}, "
        f"and --resume {parts.folder} goes on from it",
    )


def sample(parts: Parts, number: int, attempt: int) -> list[Member]:
    """Return the cohort of a round, by site name: a function of the run's seed and of who is connected.

    Raises:
        NotEnoughSites: fewer than the quorum are.
    """
    parts.roster.gather()
    members = list(parts.roster.members().values())
    strategy = parts.config.strategy
    if len(members) < strategy.min_clients:
        raise NotEnoughSites(
            f"round {number}: {len(members)} sites are connected",
            f"strategy.min_clients = {strategy.min_clients}",
            "bring the sites back and resume the run",
        )
    size = min(len(members), max(strategy.min_clients, round(strategy.fraction_train * len(members))))
    chosen = generator(parts.config.run.seed, "cohort", number, attempt).choice(len(members), size, replace=False)
    return [members[index] for index in sorted(chosen)]


def collect(parts: Parts, state: State, number: int, cohort: list[Member]) -> Collected:
    """Send the adapter to the cohort and guard what comes back."""
    rounds, strategy = parts.config.run.rounds, parts.config.strategy
    arrays = encode(state.vector, parts.spec)
    text = parts.config.for_sites()

    def request(nonce: str) -> RecordDict:
        message = TrainRequest(
            text, number, parts.spec.sha256, (number - 1) / rounds, number / rounds, strategy.round_timeout_s, nonce
        )
        return to_record(message, arrays)

    started = time.perf_counter()
    verdicts: dict[str, Accepted | Rejected] = {}
    late: list[Rejected] = []
    asked, messages = _address(cohort, number, "train", request, strategy.round_timeout_s)
    for reply in exchange(parts.grid, messages, strategy.round_timeout_s, parts.stop):
        one = asked.get(reply.metadata.src_node_id)
        if one is None:
            parts.audit.write("unexpected-reply", round=number, node=str(reply.metadata.src_node_id))
        elif isinstance(verdicts.get(one.site), Accepted):
            late.append(Rejected(one.site, "duplicate"))  # the first valid reply counts
        else:
            verdict = check(reply, one, parts.spec, strategy.max_update_norm)
            verdicts[one.site] = verdict
            parts.progress.reply(one.site, "accepted" if isinstance(verdict, Accepted) else verdict.reason)
    for member in cohort:
        verdicts.setdefault(member.name, Rejected(member.name, DROPOUT))
    gone = {site for site, verdict in verdicts.items() if isinstance(verdict, Rejected) and verdict.reason == DROPOUT}
    parts.roster.drop(member.node_id for member in cohort if member.name in gone)
    return Collected(
        [verdict for _, verdict in sorted(verdicts.items()) if isinstance(verdict, Accepted)],
        [verdict for _, verdict in sorted(verdicts.items()) if isinstance(verdict, Rejected)] + late,
        sum(len(array.data) for array in arrays.values()) * len(messages),
        sum(verdict.size_bytes for verdict in verdicts.values()),
        time.perf_counter() - started,
    )


def _address(
    cohort: list[Member], number: int, kind: str, content: Callable[[str], RecordDict], timeout_s: float
) -> tuple[dict[int, Asked], list[Message]]:
    """Return what each node was asked, and the messages, each with a nonce of its own."""
    from flwr.app import Message

    asked, messages = {}, []
    for member in cohort:
        nonce = secrets.token_hex(8)
        rows = member.rows if kind == "train" else member.evaluation_rows
        asked[member.node_id] = Asked(member.name, member.node_id, number, nonce, rows)
        messages.append(Message(content(nonce), member.node_id, kind, ttl=timeout_s * 2, group_id=str(number)))
    return asked, messages


def _void(parts: Parts, number: int, attempt: int, cohort: list[Member], collected: Collected) -> None:
    """Record an attempt that changed nothing."""
    record = _record(number, cohort, collected) | {"voided": True, "attempt": attempt}
    append_line(parts.folder / "metrics.jsonl", record)
    parts.audit.write(
        "round-voided",
        round=number,
        attempt=attempt,
        accepted=len(collected.accepted),
        rejected={rejected.site: rejected.reason for rejected in collected.rejected},
    )
    parts.progress.round_ends(record)


def _complete(parts: Parts, state: State, number: int, cohort: list[Member], collected: Collected) -> State:
    """Aggregate the accepted updates and checkpoint the result."""
    started = time.perf_counter()
    update, remembered = aggregate(parts.config.strategy, state.strategy, number, collected.accepted)
    vector = (state.vector + update).astype(np.float32)
    if not np.isfinite(vector).all():
        raise TrainingError(f"round {number}: the aggregated model is not finite", do="lower the learning rates")
    record = _record(number, cohort, collected)
    record["seconds"]["aggregate"] = time.perf_counter() - started
    record |= {"adapter_sha256": sha256(vector), "update_norm": l2_norm(update)}
    state = replace(state, vector=vector, round=number, strategy=remembered, record=record)
    if parts.evaluate is None:
        state = replace(state, best_vector=vector, best_round=number)
    parts.audit.write(  # before the checkpoint: a crash between them leaves a round recorded twice, not a missing one
        "round",
        round=number,
        accepted=[accepted.site for accepted in collected.accepted],
        rejected={rejected.site: rejected.reason for rejected in collected.rejected},
        adapter_sha256=record["adapter_sha256"],
    )
    checkpoint.save(parts.folder / "checkpoint", state, parts.config.sha256, parts.spec.sha256)
    return state


def _record(number: int, cohort: list[Member], collected: Collected) -> dict[str, Any]:
    """Return what one attempt at a round adds to metrics.jsonl."""
    accepted = collected.accepted
    losses = [(reply.loss, reply.weight) for reply in accepted if reply.loss is not None]
    weight = sum(rows for _, rows in losses)
    return {
        "round": number,
        "cohort": [member.name for member in cohort],
        "accepted": {
            reply.site: {
                "rows": reply.weight,
                "loss": reply.loss,
                "steps": reply.steps,
                "seconds": reply.seconds,
                "update_norm": reply.norm,
                "bytes_up": reply.size_bytes,
            }
            for reply in accepted
        },
        "rejected": {reply.site: {"reason": reply.reason, "detail": reply.detail} for reply in collected.rejected},
        "dropouts": sum(reply.reason == DROPOUT for reply in collected.rejected),
        "train_loss": sum(loss * rows for loss, rows in losses) / weight if weight else None,
        "bytes_down": collected.bytes_down,
        "bytes_up": collected.bytes_up,
        "seconds": {"wait": collected.wait_s},
        "train_seconds": max((reply.seconds for reply in accepted), default=0.0),
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


def evaluate_at_sites(parts: Parts, state: State) -> dict[str, dict[str, float]]:
    """Return each site's metrics on its own evaluation rows, with their number as `rows`."""
    members = [member for member in parts.roster.members().values() if member.evaluation_rows]
    if not members:
        return {}
    arrays, text = encode(state.vector, parts.spec), parts.config.for_sites()

    def request(nonce: str) -> RecordDict:
        return to_record(EvaluateRequest(text, state.round, parts.spec.sha256, nonce), arrays)

    timeout_s = parts.config.strategy.round_timeout_s
    asked, messages = _address(members, state.round, "evaluate", request, timeout_s)
    results: dict[str, dict[str, float]] = {}
    for reply in exchange(parts.grid, messages, timeout_s, parts.stop):
        one = asked.get(reply.metadata.src_node_id)
        verdict = Rejected("", "unexpected-reply") if one is None else check_evaluation(reply, one)
        if isinstance(verdict, Rejected):
            parts.audit.write("evaluation-rejected", round=state.round, site=verdict.site, code=verdict.reason)
        elif one is not None:
            results.setdefault(one.site, {**verdict[0], "rows": verdict[1]})
    return dict(sorted(results.items()))


def initial_state(vector: Vector) -> State:
    """Return the state before the first round."""
    return State(vector, vector)
