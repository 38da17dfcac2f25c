"""Train the clients of a site: one, or those behind a gateway. Each trains alone, and all from the same adapter."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from tsugiki.client.training import dp_sgd
from tsugiki.client.training.job import ClientUpdates, Job
from tsugiki.client.training.trainer import LocalRound, Trained, steps_per_round, train
from tsugiki.client.training.update import ProtectedSum, make_update
from tsugiki.client.training.validation import BestOfRound
from tsugiki.client.training.vectorised import can_train_together, train_together
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TrainingError, TsugikiError, WireError
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.mechanisms import Adversary
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.settings import ExamplePrivacySection
from tsugiki.common.strategies.factors import truncate
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.wire.spec import Vector

log = logging.getLogger("tsugiki.client")


def asked_clients(site: str, clients: Sequence[Sequence[int]], wanted: str) -> dict[str, Sequence[int]]:
    """Return the rows of the clients that a request asks for, by name.

    Args:
        site: name of the site; a single client has the same name.
        clients: row numbers of each client.
        wanted: `TrainRequest.clients`.

    Raises:
        WireError: `clients`, a number that no client has, or one twice.
    """
    names = [site]
    if len(clients) > 1:
        names = [f"{site}/{number}" for number in range(len(clients))]
    if not wanted:
        return dict(zip(names, clients, strict=True))
    parts = wanted.split(",")
    valid = all(_is_number_below(part, len(clients)) for part in parts)
    if len(set(parts)) != len(parts) or not valid:
        raise WireError("the list of clients is not valid", f"different numbers below {len(clients)}", code="clients")
    return {names[int(part)]: clients[int(part)] for part in parts}


def _is_number_below(text: str, limit: int) -> bool:
    """Return whether a text is a number from 0 to `limit - 1`, in its shortest form."""
    # The length is bounded, because the text comes from the server and `int` is slow for long ones.
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        return False
    return int(text) < limit and text == str(int(text))


def train_openly(job: Job) -> tuple[Vector, Trained, int]:
    """Train without protection of clients; `[privacy.examples]` may protect rows.

    Returns:
        The mean of the clients' updates, weighted by their rows, shape (size,); the outcome of training; the number of
        rows, those of missed steps left out.

    Raises:
        TrainingError: `diverged`, a client's training did; `deadline`, the time is up.
    """
    # One client: its update as it is, without a mean that could round it.
    if len(job.clients) == 1:
        ((name, chosen),) = job.clients.items()
        trained = _train_one(job, name, chosen, job.request.deadline_s)
        return make_update(job.graft.read(), job.received), trained, trained.rows_seen(len(chosen))
    # Several: a running sum in float64, so that a gateway's updates need not be in memory together.
    started = time.perf_counter()
    total = np.zeros(job.graft.spec.size)
    loss = 0.0
    rows = 0
    steps = 0
    for group in train_each(job):
        if not all(map(math.isfinite, group.losses)):
            raise TrainingError("the loss of a client is not finite", hint="lower train.learning_rate", code="diverged")
        weights = np.array([len(job.clients[name]) for name in group.names])
        total += weights @ group.updates
        loss += float(weights @ group.losses)
        rows += int(weights.sum())
        steps += group.steps
    return (total / rows).astype(np.float32), Trained(steps, loss / rows, time.perf_counter() - started), rows


def train_protecting_clients(job: Job, plan: Plan) -> ProtectedSum:
    """Return the sum of the clients' updates, each clipped and noised by itself.

    A client whose training diverges or fails contributes its noise alone: an error would reveal something about its
    data. The site's own log has the error.

    Raises:
        TrainingError: `deadline`, the time is up.
        MemoryError: or torch's own error; the machine failed, not the client's data.
    """
    return protect(train_each(job, private=True), job, plan)


def protect(groups: Iterable[ClientUpdates], job: Job, plan: Plan) -> ProtectedSum:
    """Return the sum of these updates, each clipped and noised by itself."""
    total = ProtectedSum.empty(plan, job.config.privacy.insecure_noise_seed)
    for group in groups:
        total.add(group.updates, group.names[0], job.request.round)
    return total


def train_each(job: Job, private: bool = False) -> Iterator[ClientUpdates]:
    """Yield the clients' updates: trained together where that is possible, else one after the other.

    Args:
        job: of the round.
        private: a client that fails becomes a null update, which adds noise alone.

    Raises:
        TrainingError: `deadline`, the time is up.
    """
    ends = time.monotonic() + job.request.deadline_s
    tail = job.tail() if can_train_together(job) else None
    left = dict.fromkeys(job.clients)
    # Together: `left` shrinks as clients are done, so that after a failure nobody counts twice.
    try:
        groups = train_together(job, tail) if tail else iter(())
        for group in groups:
            for name in group.names:
                del left[name]
            yield _in_time(group, ends)
    except Exception as error:
        if not private or _goes_on(error):
            raise
        log.exception("clients cannot be trained together: one by one")
    # One by one: all clients, or those that a failure left over.
    for name in left:
        yield _in_time(_alone(job, name, ends, private), ends)


def _in_time(group: ClientUpdates, ends: float) -> ClientUpdates:
    """Return the updates, if `time.monotonic()` is not past `ends`."""
    if time.monotonic() > ends:
        raise TrainingError(f"the clients up to {group.names[-1]} took too long", code="deadline")
    return group


def _goes_on(error: Exception) -> bool:
    """Return whether an error is reported also in a private run: a TsugikiError, or one of a machine without memory."""
    return isinstance(error, TsugikiError | MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _alone(job: Job, name: str, ends: float, private: bool) -> ClientUpdates:
    """Return the update of one client: not a number if its training diverged, zero if it has no rows."""
    rows = job.clients[name]
    size = job.graft.spec.size
    if not rows:
        return ClientUpdates([name], np.zeros((1, size)), np.zeros(1), 0)
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
    # In float64, as `make_update` subtracts; the rounding to float32 comes after the mean.
    update = job.graft.read().astype(np.float64) - job.received
    return ClientUpdates([name], update[np.newaxis], np.array([trained.loss]), trained.steps)


def _null(name: str, size: int) -> ClientUpdates:
    """Return the update of a client whose training failed: not a number, which clipping makes a null update."""
    return ClientUpdates([name], np.full((1, size), math.nan), np.full(1, math.nan), 0)


def _train_one(job: Job, name: str, rows: Sequence[int], deadline_s: float) -> Trained:
    """Train one client; the graft has its adapter afterwards."""
    # Every client starts from what was received, whatever the client before left in the shared graft.
    job.graft.write(truncate(job.received, job.graft.spec, job.rank))
    encoded = job.encoded
    if len(rows) != len(job.encoded):
        encoded = job.encoded.take(rows)
    local_round = job.local_round(name, deadline_s)
    if not job.config.privacy.examples.enabled:
        with job.graft.training_only(job.part):
            return _train_validated(job, encoded, local_round)
    # Rows are protected: DP-SGD instead of the plain loop.
    examples = examples_of(job.config, len(rows))
    seed = job.config.privacy.insecure_noise_seed
    settings = job.config.train
    try:
        return dp_sgd.train_protecting_rows(job.graft, encoded, settings, local_round, examples, job.watch, seed)
    except TrainingError as error:
        if error.code != "diverged":
            raise
        # The parameters are private and finite. That the loss is not finite would reveal something about the rows.
        return Trained(steps_per_round(len(rows), settings), 0.0, 0.0)


def _train_validated(job: Job, encoded: Encoded, local_round: LocalRound) -> Trained:
    """Train; if the run validates inside a round, set the graft to the best adapter of the round."""
    if job.validation is None:
        return train(job.graft, encoded, job.config.train, local_round, job.watch)
    best = BestOfRound(job.graft, job.validation, job.config)
    trained = train(job.graft, encoded, job.config.train, local_round, job.watch, best.ends)
    best.restore()
    return trained


def examples_of(config: RunConfig, rows: int) -> ExamplePrivacySection:
    """Return the settings of DP-SGD for a client with this number of rows, with the noise that its budget takes.

    Raises:
        TrainingError: `examples-unsupported`, no noise is enough.
    """
    return dp_sgd.calibrated(rows, config.train, config.privacy.examples, config.run.rounds)


def row_releases(clients: Mapping[str, Sequence[int]], config: RunConfig) -> dict[Adversary, tuple[Release, int]]:
    """Return the release about one row, and its count, of the client that reveals most. Empty without DP-SGD.

    Args:
        clients: the rows of each client that trains, by its name.
        config: of the run.
    """
    counts = {len(rows) for rows in clients.values() if rows}
    if not counts or not config.privacy.examples.enabled:
        return {}
    # What a round shows about a row depends on the client's number of rows alone.
    shown = [dp_sgd.release_of_round(rows, config.train, examples_of(config, rows)) for rows in sorted(counts)]
    delta = config.privacy.examples.delta
    return {"rows": max(shown, key=lambda one: epsilon({one[0]: one[1]}, delta))}
