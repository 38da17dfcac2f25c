"""Canaries: clients of a simulation that an audit plants, and whose updates its attacker looks for in what it sees.

A canary sends the same update in every round. It points in a direction of its own, at a right angle to those of all
other canaries, and is longer than the clip norm, so that clipping is part of what is audited. A canary that was left
out is a null client: it sends zeros and still adds its noise (zero-out adjacency).

Source: Andrew et al. 2023, arXiv:2302.03098 (canary clients with random directions, all in one run); Nasr et al. 2023,
arXiv:2302.07956 (Dirac canaries: updates that no other client's can hide).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.wire.spec import Vector

LENGTH = 10.0
"""Length of a canary's update before clipping, in clip norms."""


@dataclass(frozen=True)
class Canaries:
    """The canaries of one run.

    Args:
        names: of the clients that are canaries.
        included: whether each takes part with its update, shape (canaries,), bool; else it is a null client.
        coordinates: where each canary's direction is not zero, shape (canaries, coordinates). No two share one.
        signs: the signs there, of the same shape.
    """

    names: tuple[str, ...]
    included: npt.NDArray[np.bool_]
    coordinates: npt.NDArray[np.int64]
    signs: npt.NDArray[np.float64]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each canary, by name."""
        return {name: number for number, name in enumerate(self.names)}

    def updates(self, names: Sequence[str], plan: Plan) -> npt.NDArray[np.float64]:
        """Return the updates of some canaries before clipping, shape (len(names), plan.dimension)."""
        found = np.zeros((len(names), plan.dimension))
        value = LENGTH * plan.clip_norm / np.sqrt(self.signs.shape[1])
        for row, name in enumerate(names):
            number = self.numbers[name]
            if self.included[number]:
                found[row, self.coordinates[number]] = value * self.signs[number]
        return found

    def scores(self, vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the inner product of a vector, shape (dimension,), with each canary's direction of length 1."""
        products = (vector[self.coordinates] * self.signs).sum(axis=1)
        return np.asarray(products / np.sqrt(self.signs.shape[1]))


def draw_canaries(names: Sequence[str], dimension: int, draw: np.random.Generator) -> Canaries:
    """Return canaries with random directions, each included with probability 1/2.

    The directions share the coordinates evenly. With more clients than coordinates, some clients are no canaries.

    Args:
        names: of the clients that may be canaries, at least one.
        dimension: number of coordinates of an update.
        draw: the auditor's randomness.
    """
    chosen = tuple(names)
    if len(chosen) > dimension:
        chosen = tuple(names[number] for number in sorted(draw.choice(len(names), dimension, replace=False)))
    each = dimension // len(chosen)
    coordinates = draw.permutation(dimension)[: each * len(chosen)].reshape(len(chosen), each)
    signs = draw.choice((-1.0, 1.0), coordinates.shape)
    return Canaries(chosen, draw.random(len(chosen)) < 0.5, coordinates, signs)


class Auditor(Protocol):
    """Plants canaries among the clients of a simulation, and is shown what an attacker may see."""

    def meet(self, clients: Mapping[str, Sequence[str]]) -> None:
        """Learn the names of the clients of each site, before the run starts."""

    def canaries(self, dimension: int) -> Canaries:
        """Return the run's canaries, the same in each round."""

    def see(
        self, names: Sequence[str], round_number: int, received: Vector, plan: Plan, upload: Levels, known: Levels
    ) -> None:
        """Look at a site in a round.

        Args:
            names: of the site's clients whose updates are in the upload.
            round_number: counted from 1.
            received: the adapter that the site started from, shape (dimension,).
            plan: of the run.
            upload: the protected sum that leaves the site, before masks, shape (dimension,).
            known: the sum of the clipped updates of those of the clients that are no canaries. The attacker knows their
                data, as differential privacy lets it.
        """
