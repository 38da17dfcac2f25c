"""Train a simulated site with an auditor's canaries among its clients. Nothing but `tsugiki audit privacy` uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from tsugiki.client.training.cohort import protect, train_each
from tsugiki.client.training.job import ClientUpdates, Job
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.privacy.canaries import Auditor
from tsugiki.common.privacy.clipping import clip
from tsugiki.common.privacy.plan import Plan

CHUNK_CLIENTS = 50
"""Canaries whose updates are in memory together."""


def planted(auditor: Auditor) -> Callable[[Job, Plan], ProtectedSum]:
    """Return a stand-in for `train_protecting_clients`: canaries do not train, and send the auditor's update instead.

    From there on, everything is as without canaries: the updates of all clients are clipped, noised and added up by the
    same code.
    """

    def train(job: Job, plan: Plan) -> ProtectedSum:
        canaries = auditor.canaries(plan.dimension)
        marked = [name for name in job.clients if name in canaries.numbers]
        others = {name: rows for name, rows in job.clients.items() if name not in canaries.numbers}
        known = np.zeros(plan.dimension, np.int64)

        def groups() -> Iterator[ClientUpdates]:
            for group in train_each(replace(job, clients=others), private=True):
                np.add(known, clip(group.updates, plan.clip_norm).levels.sum(axis=0), out=known)
                yield group
            for start in range(0, len(marked), CHUNK_CLIENTS):
                chunk = marked[start : start + CHUNK_CLIENTS]
                yield ClientUpdates(chunk, canaries.updates(chunk, plan), np.zeros(len(chunk)), 0)

        total = protect(groups(), job, plan)
        auditor.see(list(job.clients), job.request.round, job.received, plan, total.levels, known)
        return total

    return train
