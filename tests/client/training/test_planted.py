"""Canaries among the clients of a simulated site."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.private import plan_of
from tsugiki.client.training import planted
from tsugiki.client.training.job import ClientUpdates, Job
from tsugiki.common.privacy.canaries import draw_canaries
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.wire.messages import TrainRequest

SIZE = 20
CLIENTS = {"a/0": [0], "a/1": [1], "a/2": [2]}


class Auditor:
    """Has one canary, `a/1`, and remembers what it is shown."""

    def __init__(self, included):
        self.seen: list[Any] = []
        self._included = included

    def canaries(self, dimension):
        """Return the canary."""
        seed = next(seed for seed in range(99) if self._drawn(seed).included[0] == self._included)
        return self._drawn(seed)

    def _drawn(self, seed):
        return draw_canaries(["a/1", "b/0"], SIZE, np.random.default_rng(seed))

    def see(self, *shown):
        """Remember it."""
        self.seen.append(shown)


@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_canaries_send_their_update_and_all_others_their_own(included, noise, monkeypatch):
    """Catches: a canary that trains too, another client that does not; an update that escapes the clip or the noise.

    Also: an attacker that is shown another sum than the one that leaves, or does not know the ordinary clients' part.
    """
    asked = []

    def train_each(job, private):
        asked.extend(job.clients)
        assert private
        for name in job.clients:
            yield ClientUpdates([name], np.full((1, SIZE), 5.0), np.zeros(1), 1)

    monkeypatch.setattr(planted, "train_each", train_each)
    plan = plan_of("local", SIZE, clients=3, noise_multiplier=noise or 1e-9, clip_norm=0.5)
    config: Any = SimpleNamespace(privacy=SimpleNamespace(insecure_noise_seed=0))
    received = np.zeros(SIZE, np.float32)
    request = TrainRequest("", 7, "", 0.0, 0.5, 60.0, "", "")
    job = Job(None, None, CLIENTS, config, request, received, lambda *arguments: None)  # type: ignore[arg-type]
    auditor = Auditor(included)
    total = planted.planted(auditor)(job, plan)

    assert asked == ["a/0", "a/2"]
    assert total.clients == 3
    names, round_number, start, _, upload, known = auditor.seen[0]
    assert (names, round_number) == (["a/0", "a/1", "a/2"], 7)
    assert start is received
    assert upload is total.levels
    ordinary = np.full(SIZE, 2 * LEVELS / np.sqrt(SIZE))
    assert np.abs(known - ordinary).max() <= 2
    rest = (upload - known) / LEVELS
    score = auditor.canaries(SIZE).scores(rest)[0]
    if noise:
        assert np.linalg.norm(rest) > 2.0  # of three clients, 20 numbers each
    else:
        assert score == pytest.approx(float(included), abs=1e-3)
        assert np.linalg.norm(rest) == pytest.approx(float(included), abs=1e-3)
