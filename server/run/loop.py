"""The round loop: sample a cohort, let it train, take the step, checkpoint, evaluate, record."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tsugiki.common.config.run import SITES
from tsugiki.common.errors import BudgetError, QuorumNotMet
from tsugiki.common.files import append_line
from tsugiki.common.wire.spec import Vector, sha256
from tsugiki.server.engines.grid import Deadline
from tsugiki.server.run import at_sites, checkpoint
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import evaluate_at_sites, sample
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.influence import weights_of
from tsugiki.server.run.kept import give_back_memory, let_go
from tsugiki.server.run.open_round import OpenRound
from tsugiki.server.run.private_round import PrivateRound
from tsugiki.server.run.replies import DROPOUTS, Collected
from tsugiki.server.run.roster import Member
from tsugiki.server.run.rounds import Replies, Round

ATTEMPTS = 2
"""A voided round is tried once more, then the run stops, unless sites were only absent: see `_Retries`. Attempts that
search for a site that spoils sums do not count."""
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
"""The pauses before a further attempt at a round, each twice as long as the one before."""


def run_rounds(ctx: RunContext, state: State) -> State:
    """Run the rounds that are left, and return the last state; every round is on disk when the next begins.

    Raises:
        QuorumNotMet: all attempts at a round had too few accepted replies.
        SecureAggregationError: a site spoils sums, and cannot be found.
        BudgetError: the privacy budget does not allow a single round. Used up later, it ends the run without an error.
        NotEnoughSites: fewer sites than the quorum are connected.
        Interrupted: the user asked to stop.
        StorageError: the run's folder can no longer be written.
    """
    if state.evaluated_round < state.round:  # a new run, or one that stopped between a checkpoint and its evaluation
        state = finish_round(ctx, state)
    while state.round < ctx.config.run.rounds and not _patience_is_over(ctx, state):
        ctx.stop.check()
        try:
            trained = train_round(ctx, state)
        except BudgetError as error:
            if state.round == 0:  # an untrained adapter is no result
                raise
            ctx.audit.write("budget-exhausted", round=state.round)
            ctx.progress.note(str(error))
            return state
        state = finish_round(ctx, trained)
    return state


def _patience_is_over(ctx: RunContext, state: State) -> bool:
    patience = ctx.config.evaluation.early_stopping_patience
    return bool(patience) and state.evaluations_since_best >= patience


def train_round(ctx: RunContext, state: State) -> State:
    """Do the next round up to its checkpoint; return the state after it.

    Raises:
        QuorumNotMet, SecureAggregationError, BudgetError, NotEnoughSites, Interrupted, StorageError: see `run_rounds`.
        TrainingError: the model would no longer be finite.
    """
    if ctx.privacy is None:
        return _train(ctx, OpenRound(ctx), state)
    return _train(ctx, PrivateRound(ctx, ctx.privacy), state)


def _train(ctx: RunContext, kind: Round[Replies], state: State) -> State:
    """Try a round of this kind until it is valid, as often as `_Retries` allows; steps of a search do not count."""
    round_number = state.round + 1
    retries = _Retries(ctx)
    missed = 0
    searching = False
    for attempt in itertools.count():
        # before any site is asked: an attempt that cannot be paid for must not begin
        if ctx.privacy:
            ctx.privacy.check_budget(searching)
        # each attempt draws its own cohort: the sites that failed the last one may be left out
        cohort = sample(ctx, round_number, attempt)
        not_asked = _not_asked(ctx, round_number, cohort)
        ctx.progress.round_begins(round_number, ctx.config.run.rounds, [member.name for member in cohort])
        give_back_memory(ctx.spec.size)
        replies = kind.collect(state, round_number, cohort, attempt)
        give_back_memory(ctx.spec.size)
        record = kind.record(round_number, cohort, replies) | not_asked
        # with too few clients the model stays as it is, and the round is tried once more
        if replies.clients >= ctx.quorum:
            _show_timeout(ctx, round_number)
            return _complete(ctx, kind, state, replies, record)
        _void(ctx, attempt, record)
        searching = replies.searching
        if searching:  # a search ends by itself
            continue
        missed += 1
        if not retries.again(missed, cohort, replies):
            break
    attempts = "twice" if missed == ATTEMPTS else f"at the last of {missed} attempts"
    raise QuorumNotMet(
        f"round {round_number} had {replies.clients} accepted replies, {attempts}",
        f"strategy.min_clients = {ctx.config.strategy.min_clients}",
        f"see audit.jsonl; the model of round {state.round} is kept in {ctx.folder / 'checkpoint'}, "
        f"and --resume {ctx.folder} goes on from it",
    )


def _show_timeout(ctx: RunContext, round_number: int) -> None:
    """Say after round 1 how long rounds wait from now on, if that follows from the pace of the sites."""
    follows = ctx.config.strategy.round_timeout_s == "auto"
    if follows and round_number == 1 and not ctx.grid.simulated and not ctx.withholds:
        ctx.progress.note(f'rounds wait for {ctx.round_timeout_s:.0f} s at most (strategy.round_timeout_s = "auto")')


class _Retries:
    """Says whether a voided round is tried again.

    It is tried twice in any case. An open run goes on trying for `strategy.wait_for_quorum_s` as long as absent sites
    alone are missing. A private run does not: each attempt may cost the clients' budget.
    """

    def __init__(self, ctx: RunContext) -> None:
        self._ctx = ctx
        self._deadline: Deadline | None = None

    def again(self, attempts: int, cohort: list[Member], replies: Collected[Any]) -> bool:
        """Return whether there is another attempt, after a pause before each one beyond `ATTEMPTS`.

        Args:
            attempts: how many were made.
            cohort: of the last attempt.
            replies: of the last attempt, too few.

        Raises:
            Interrupted: the user asked to stop.
        """
        ctx = self._ctx
        if self._deadline is None:
            self._deadline = Deadline(ctx.wait_for_quorum_s)
        if attempts < ATTEMPTS:
            return True
        absent = {one.site for one in replies.rejected if one.reason in DROPOUTS}
        possible = replies.clients + sum(member.clients for member in cohort if member.name in absent)
        if ctx.privacy is not None or possible < ctx.quorum or self._deadline.left_s <= 0:
            return False
        pause_s = min(FIRST_PAUSE_S * 2 ** (attempts - ATTEMPTS), LONGEST_PAUSE_S, self._deadline.left_s)
        ctx.progress.note(f"trying again in {pause_s:.0f} s (strategy.wait_for_quorum_s)")
        ctx.stop.pause(pause_s)
        return True


def _not_asked(ctx: RunContext, round_number: int, cohort: list[Member]) -> dict[str, Any]:
    """Return who is left out, for the round's line; nothing where the cohort is secret.

    `not_asked` has the sites that were silent, each with its next round; `expected` those whose update of an earlier
    round may still come, each with that round.
    """
    connected = ctx.roster.members().keys() - {member.name for member in cohort}
    if ctx.withholds:
        return {}
    late = ctx.late.expected()
    resting = ctx.roster.silence.resting("train", round_number)
    found = {site: again for site, again in resting.items() if site in connected and site not in late}
    return {key: value for key, value in (("not_asked", found), ("expected", late)) if value}


def _of_not_asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an audit event that names the sites that were left out; empty if there were none."""
    return {"not_asked": sorted(record["not_asked"])} if "not_asked" in record else {}


def _void(ctx: RunContext, attempt: int, record: dict[str, Any]) -> None:
    """Record an attempt that changed nothing."""
    record = record | {"voided": True, "attempt": attempt}
    append_line(ctx.folder / "metrics.jsonl", record)
    ctx.audit.write(
        "round-voided",
        round=record["round"],
        attempt=attempt,
        accepted=len(record["accepted"]),
        rejected={site: one["reason"] for site, one in record["rejected"].items()},
        **_of_not_asked(record),
    )
    ctx.progress.round_ends(record)


def _complete(ctx: RunContext, kind: Round[Replies], state: State, replies: Replies, record: dict[str, Any]) -> State:
    """Take the step of a valid round, and checkpoint the result."""
    started = time.perf_counter()
    round_number = state.round + 1
    step = kind.step(state, round_number, replies)
    record = {**record, **step.record}
    # where the cohort is secret, nothing of a round is timed: a time may follow from the number of clients
    if not ctx.withholds:
        record["seconds"] = {**record["seconds"], "aggregate": time.perf_counter() - started}
    record["adapter_sha256"] = sha256(step.vector)
    record["update_norm"] = step.update_norm
    # the record is checkpointed with the model: its line is written only when its evaluation is in it
    state = replace(
        state, vector=step.vector, round=round_number, strategy=step.moments, record=record, norms=step.norms
    )
    # without evaluation there is no best adapter but the last; only their answers show whether sites evaluate
    if state.best_metric is None and (ctx.evaluate is None or ctx.config.monitors_sites):
        state = replace(state, best_round=round_number)
    # the audit log before the checkpoint: a crash between them leaves a round recorded twice, not a missing one
    ctx.audit.write(
        "round",
        round=round_number,
        accepted=sorted(record["accepted"]),
        rejected={site: one["reason"] for site, one in record["rejected"].items()},
        adapter_sha256=record["adapter_sha256"],
        **_of_not_asked(record),
    )
    give_back_memory(ctx.spec.size)  # what the step took
    state = replace(state, anchors=ctx.logs.anchors())
    folder = ctx.folder / "checkpoint"
    checkpoint.save(folder, state, ctx.config.fixed, ctx.spec.sha256, record["adapter_sha256"])
    let_go(state.strategy.values())  # the next step alone reads the moments
    return state


def finish_round(ctx: RunContext, state: State) -> State:
    """Evaluate where it is due, and write the round's line, with which the round is finished."""
    evaluation = ctx.config.evaluation
    record: dict[str, Any] = {"round": state.round, "seconds": {}, **state.record}
    # the last round is always evaluated
    due = state.round % evaluation.every_rounds == 0 or state.round == ctx.config.run.rounds
    started = time.perf_counter()
    if ctx.evaluate is not None and due:
        record["eval"] = ctx.evaluate(state.vector)
    if ctx.config.evaluates_at_sites and due:
        record |= _evaluate_at_sites(ctx, state)
    record["seconds"] = {**record["seconds"], "evaluate": time.perf_counter() - started}
    if ctx.config.monitors_sites and due:
        record |= at_sites.compared_with(state.best_at_sites, state.best_round, record, ctx.config.metric)
        _note_unmeasured(ctx, state, record)
    state = evaluated(state, record, ctx.config.monitor, ctx.lower_is_better)
    if record.get("sites_eval" if ctx.config.monitors_sites else "eval"):
        record["best"] = state.best_round == state.round and state.evaluations_since_best == 0
    append_line(ctx.folder / "metrics.jsonl", record)
    ctx.progress.round_ends(record)
    return state


def evaluated(state: State, record: Mapping[str, Any], monitor: str, lower_is_better: bool) -> State:
    """Return the state after a round's evaluation. A resumed run takes the evaluation from metrics.jsonl.

    Args:
        state: after the round's checkpoint.
        record: the round's line in metrics.jsonl, with its metrics as `eval` and `sites_eval` if it was evaluated.
        monitor: the metric that says which adapter is best; a mean over sites if it begins with `sites_`.
        lower_is_better: whether a smaller value of it is better.
    """
    state = replace(state, evaluated_round=state.round, record={})
    if monitor.startswith(SITES):
        return _evaluated_by_sites(state, record, monitor.removeprefix(SITES), lower_is_better)
    if "eval" not in record:
        return state
    value = record["eval"][monitor]
    if not _is_better(value, state.best_metric, lower_is_better):
        return replace(state, evaluations_since_best=state.evaluations_since_best + 1)
    return replace(state, best_metric=value, best_round=state.round, evaluations_since_best=0)


def _evaluated_by_sites(state: State, record: Mapping[str, Any], metric: str, lower_is_better: bool) -> State:
    """Return the state after an evaluation by sites: see `at_sites.py` for what is compared with what."""
    if "sites_eval" not in record:
        return state
    now = at_sites.values_of(record, metric)
    weights = at_sites.weights_in(record)
    best = state.best_at_sites
    common = at_sites.in_common(now, best)
    first = state.best_metric is None or (not common and state.best_round == 0)
    if not first and not common:
        return state
    if first or _is_better(at_sites.mean(now, weights, common), at_sites.mean(best, weights, common), lower_is_better):
        mean = at_sites.mean(now, weights) if now else None
        return replace(state, best_metric=mean, best_at_sites=now, best_round=state.round, evaluations_since_best=0)
    return replace(state, evaluations_since_best=state.evaluations_since_best + 1)


def _note_unmeasured(ctx: RunContext, state: State, record: Mapping[str, Any]) -> None:
    """Tell the operator before training if no site sends the metric that is to decide which adapter is best."""
    if state.round or at_sites.values_of(record, ctx.config.metric):
        return
    if record.get("sites_eval"):
        ctx.progress.note(
            f"no site sends {ctx.config.metric}, which is to decide which round is best (they send "
            f"{', '.join(record.get('sites_mean', {})) or 'no metric'}): as long as none does, that is the last one"
        )
    elif ctx.config.evaluation.early_stopping_patience or ctx.config.evaluation.monitor:
        ctx.progress.note(
            "no site has evaluated: as long as none does, the last round counts as the best, and nothing stops the "
            "run early"
        )


def _evaluate_at_sites(ctx: RunContext, state: State) -> dict[str, Any]:
    """Return `sites_eval` for the round's line; with at_sites = "auto" nothing if no site keeps evaluation rows."""
    keeping_rows = {member.name for member in ctx.roster.connected().values() if member.evaluation_rows}
    silent = ctx.roster.silence.not_evaluating(state.round)
    not_asked = {site: again for site, again in silent.items() if site in keeping_rows}
    not_evaluated = {"sites_eval_not_asked": not_asked} if not_asked else {}
    found = evaluate_at_sites(ctx, state)
    # the line is written all the same if sites have evaluated before: it tells that they have not evaluated this round
    if not found and not state.best_at_sites and ctx.config.evaluation.at_sites == "auto":
        return not_evaluated
    # for a mean over sites: a site's number of evaluation rows is its own word, too
    weights = weights_of({site: int(metrics["rows"]) for site, metrics in found.items()}, ctx.config.strategy)
    line = {"sites_eval": found, "sites_eval_weights": weights}
    return line | at_sites.summed_up(line, ctx.config.metric, ctx.lower_is_better) | not_evaluated


def _is_better(value: float | None, best: float | None, lower_is_better: bool) -> bool:
    """Return whether a metric is better than the best one so far. One that is not finite (null in a file) never is."""
    if value is None or not math.isfinite(value):
        return False
    if best is None:
        return True
    if lower_is_better:
        return value < best
    return value > best


def initial_state(vector: Vector, plan: Mapping[str, Any] | None = None) -> State:
    """Return the state before the first round; `plan` is the privacy plan of a private run."""
    return State(vector, plan=plan)
