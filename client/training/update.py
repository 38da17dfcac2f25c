"""From trained parameters to what leaves the site: local minus received adapter; under privacy, clipped and noised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.privacy.clipping import Levels, clip
from tsugiki.common.privacy.mechanisms import mechanism_of
from tsugiki.common.privacy.noise import noise_generator
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.wire.spec import Vector


def make_update(local: Vector, received: Vector) -> Vector:
    """Return `local - received`, both of shape (size,), subtracted in float64.

    A site that has not trained sends exact zeros. Clipping and noise, if the run has them, come after this step.
    """
    return (local.astype(np.float64) - received).astype(np.float32)


@dataclass
class ProtectedSum:
    """The sum of clients' updates, each clipped and noised by itself. Only the sum leaves the site.

    Args:
        plan: the privacy plan.
        insecure_noise_seed: tests only; see `common/privacy/noise.py`.
        levels: the sum so far, shape (size,).
        clients: number of clients in the sum.
        clipped: how many updates were longer than the clip norm. Stays at the site.
        null: how many updates were not finite and became noise alone. Stays at the site.
    """

    plan: Plan
    insecure_noise_seed: int
    levels: Levels
    clients: int = 0
    clipped: int = 0
    null: int = 0

    @classmethod
    def empty(cls, plan: Plan, insecure_noise_seed: int = 0) -> ProtectedSum:
        """Return the sum of no updates."""
        return cls(plan, insecure_noise_seed, np.zeros(plan.dimension, np.int64))

    def add(self, updates: npt.NDArray[Any], *purpose: str | int) -> None:
        """Clip and noise each update, and add it.

        Args:
            updates: local minus received adapters, in float64, shape (clients, size).
            purpose: names and numbers that make seeded noise differ between clients and rounds.
        """
        clipped = clip(updates, self.plan.clip_norm)
        draw = noise_generator(self.insecure_noise_seed, *purpose)
        noise = mechanism_of(self.plan).client_noise(self.plan, draw, len(updates))
        self.levels = self.levels + clipped.levels.sum(axis=0) + noise
        self.clients += len(updates)
        self.clipped += int(np.sum(clipped.norm > self.plan.clip_norm))
        self.null += int(np.sum(clipped.null))
