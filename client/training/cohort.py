"""Train the clients of a site: one, or those behind a gateway, each by itself and from the same adapter."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from tsugiki.client.training import dp_sgd
from tsugiki.client.training.job import Group, Job
from tsugiki.client.training.trainer import Plan, Trained, steps_per_round, train
from tsugiki.client.training.update import ProtectedSum, make_update
from tsugiki.client.training.validation import BestOfRound
from tsugiki.client.training.vectorised import can_train_together, train_together
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TrainingError, TsugikiError, WireError
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.mechanisms import Adversary
from tsugiki.common.privacy.plan import Plan as PrivacyPlan
from tsugiki.common.privacy.settings import ExamplePrivacySection
from tsugiki.common.strategies.factors import truncate
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.wire.spec import Vector

log = logging.getLogger("tsugiki.client")


def asked_clients(site: str, clients: Sequence[Sequence[int]], wanted: str) -> dict[str, Sequence[int]]:
    """Return the rows of the clients that a request asks for, by name.

    Args:
        site: its name; a single client has the same.
        clients: the rows of each.
        wanted: `TrainRequest.clients`.

    Raises:
        WireError: `clients`, a number that no client has, or one twice.
    """
    names = [f"{site}/{number}" for number in range(len(clients))] if len(clients) > 1 else [site]
    if not wanted:
        return dict(zip(names, clients, strict=True))
    parts = wanted.split(",")
    if len(set(parts)) != len(parts) or not all(
        part.isascii() and part.isdigit() and len(part) < 9 and int(part) < len(clients) and part == str(int(part))
        for part in parts
    ):
        raise WireError("the list of clients is not valid", f"different numbers below {len(clients)}", code="clients")
    return {names[int(part)]: clients[int(part)] for part in parts}


def train_openly(job: Job) -> tuple[Vector, Trained, int]:
    """Return the mean update of the clients by rows, shape (size,), what training reports, and the number of rows.

    Raises:
        TrainingError: a client diverged, or the time is up.
    """
    if len(job.clients) == 1:
        ((name, chosen),) = job.clients.items()
        trained = _train_one(job, name, chosen, job.request.deadline_s)
        return make_update(job.graft.read(), job.received), trained, len(chosen)
    started, total, loss, rows, steps = time.perf_counter(), np.zeros(job.graft.spec.size), 0.0, 0, 0
    for group in _train_all(job):
        if not all(map(math.isfinite, group.losses)):
            raise TrainingError("the loss of a client is not finite", do="lower train.learning_rate", code="diverged")
        weights = np.array([len(job.clients[name]) for name in group.names])
        total += weights @ group.updates
        loss, rows, steps = loss + float(weights @ group.losses), rows + int(weights.sum()), steps + group.steps
    return (total / rows).astype(np.float32), Trained(steps, loss / rows, time.perf_counter() - started), rows


def train_privately(job: Job, plan: PrivacyPlan) -> ProtectedSum:
    """Return the sum of the clients' updates, each clipped and noised by itself.

    A client whose training diverges or fails contributes nothing but its noise: an error would tell something about
    its data. The site's own log has it.

    Raises:
        TrainingError: `deadline`, the time is up.
        MemoryError: or torch's own; it is the machine that fails, not the client's data.
    """
    total = ProtectedSum.empty(plan, job.config.privacy.insecure_noise_seed)
    for group in _train_all(job, private=True):
        total.add(group.updates, group.names[0], job.request.round)
    return total


def _train_all(job: Job, private: bool = False) -> Iterator[Group]:
    """Yield what the clients have learned: together where that is possible, else one after the other.

    Raises:
        TrainingError: `deadline`, the time is up.
    """
    ends = time.monotonic() + job.request.deadline_s
    tail = job.tail() if can_train_together(job) else None
    left = dict.fromkeys(job.clients)
    try:
        for group in train_together(job, tail) if tail else ():
            for name in group.names:
                del left[name]
            yield _in_time(group, ends)
    except Exception as error:
        if not private or _goes_on(error):
            raise
        log.exception("clients cannot be trained together: one by one")
    for name in left:
        yield _in_time(_alone(job, name, ends, private), ends)


def _in_time(group: Group, ends: float) -> Group:
    if time.monotonic() > ends:
        raise TrainingError(f"the clients up to {group.names[-1]} took too long", code="deadline")
    return group


def _goes_on(error: Exception) -> bool:
    """Return whether an error is told also in a private run: of ours, and a machine's that has no memory left."""
    return isinstance(error, TsugikiError | MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _alone(job: Job, name: str, ends: float, private: bool) -> Group:
    """Return what one client has learned; not a number where training diverged, zero where it has no rows."""
    rows, size = job.clients[name], job.graft.spec.size
    if not rows:
        return Group([name], np.zeros((1, size)), np.zeros(1), 0)
    try:
        trained = _train_one(job, name, rows, ends - time.monotonic())
    except TrainingError as error:
        if error.code != "diverged":
            raise
        return _null(name, size)
    except Exception as error:
        if not private or _goes_on(error):
            raise
        log.exception("a client failed: it adds noise only")
        return _null(name, size)
    update = job.graft.read().astype(np.float64) - job.received
    return Group([name], update[np.newaxis], np.array([trained.loss]), trained.steps)


def _null(name: str, size: int) -> Group:
    """Return what a client whose training came to nothing has learned: not a number, which becomes a null update."""
    return Group([name], np.full((1, size), math.nan), np.full(1, math.nan), 0)


def _train_one(job: Job, name: str, rows: Sequence[int], deadline_s: float) -> Trained:
    job.graft.write(truncate(job.received, job.graft.spec, job.rank))
    encoded = job.encoded if len(rows) == len(job.encoded) else job.encoded.take(rows)
    plan = job.plan(name, deadline_s)
    if not job.config.privacy.examples.enabled:
        with job.graft.training_only(job.part):
            return _train_openly(job, encoded, plan)
    examples, seed = examples_of(job.config, len(rows)), job.config.privacy.insecure_noise_seed
    try:
        return dp_sgd.train_privately(job.graft, encoded, job.config.train, plan, examples, job.watch, seed)
    except TrainingError as error:
        if error.code != "diverged":
            raise
        steps = steps_per_round(len(rows), job.config.train)
        return Trained(steps, 0.0, 0.0)  # private and finite parameters; that the loss is not is not told


def _train_openly(job: Job, encoded: Encoded, plan: Plan) -> Trained:
    """Train; where the run validates inside a round, leave the best adapter of the round."""
    if (held_out := job.validation()) is None:
        return train(job.graft, encoded, job.config.train, plan, job.watch)
    best = BestOfRound(job.graft, held_out, job.config)
    trained = train(job.graft, encoded, job.config.train, plan, job.watch, best.ends)
    best.restore()
    return trained


def examples_of(config: RunConfig, rows: int) -> ExamplePrivacySection:
    """Return the settings of DP-SGD for a client with so many rows, with the noise that its budget takes.

    Raises:
        TrainingError: `examples-unsupported`, no noise is enough.
    """
    return dp_sgd.calibrated(rows, config.train, config.privacy.examples, config.run.rounds)


def row_releases(job: Job) -> dict[Adversary, tuple[Release, int]]:
    """Return what the round shows of a row of this site: of the client that shows most; nothing without DP-SGD."""
    counts = {len(rows) for rows in job.clients.values() if rows}
    if not counts or not job.config.privacy.examples.enabled:
        return {}
    shown = [dp_sgd.release_of_round(rows, job.config.train, examples_of(job.config, rows)) for rows in sorted(counts)]
    delta = job.config.privacy.examples.delta
    return {"rows": max(shown, key=lambda one: epsilon({one[0]: one[1]}, delta))}
