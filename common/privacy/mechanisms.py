"""The privacy modes, one class each: who adds which noise, and what each adversary sees.

The methods of a mode return the noise of each party; the plan (`common/privacy/plan.py`) contains the numbers. There
are four adversaries, each with a ledger of its own:

- `release`: the strongest who sees the models that the run releases. In mode `distributed`, that is another site: it
  knows the noise that it has added itself.
- `outsiders`: anyone else who sees these models. Only where `release` is stronger.
- `sums`: a curious server under secure aggregation; it sees the sums that were opened, and whose updates are in them.
- `uploads`: a curious server without secure aggregation; it sees each site's upload.

A fifth ledger, `rows`, is for DP-SGD at a site, which protects single rows (`client/training/dp_sgd.py`). Only the
site keeps it, and it is never added to the others, which protect a whole client.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.clipping import LEVELS, Levels
from tsugiki.common.privacy.noise import gaussian, skellam
from tsugiki.common.registry import Registry

if TYPE_CHECKING:
    import numpy.typing as npt

    from tsugiki.common.privacy.plan import Plan

Adversary = Literal["release", "outsiders", "sums", "uploads", "rows"]
ADVERSARIES: dict[Adversary, str] = {
    "release": "whoever sees the models, other sites included",
    "outsiders": "outsiders, who see the models only",
    "sums": "the server, which sees only opened sums",
    "uploads": "the server, which sees each upload",
    "rows": "whoever sees this site's uploads, about one of its rows",
}

MECHANISMS: Registry[type[Mechanism]] = Registry("privacy mode")


class Mechanism(ABC):
    """A mode of `[privacy]`. No state: everything is in the plan."""

    name: ClassVar[str]
    title: ClassVar[str]
    budgeted: ClassVar[tuple[Adversary, ...]]
    """The adversaries that the mode protects against; `target_epsilon` bounds their ledgers."""

    @classmethod
    @abstractmethod
    def seen(cls, plan: Plan) -> dict[Adversary, Release]:
        """Return the release that each adversary sees in a round, without adversaries that see nothing."""

    @classmethod
    def client_noise(cls, plan: Plan, draw: np.random.Generator, clients: int = 1) -> Levels:
        """Return the sum of the noise that `clients` clients add to their clipped updates, in levels.

        Its shape is (dimension,). A gateway sends only the sum over its clients, so their noise is drawn at once: a
        sum of k independent shares has the distribution of one share with k times the variance.
        """
        return np.zeros(plan.dimension, np.int64)

    @classmethod
    def server_noise(cls, plan: Plan, draw: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
        """Return the noise that the server adds to the next `size` numbers of the sum, in levels, shape (size,)."""
        return np.zeros(size)

    @classmethod
    def client_variance(cls, plan: Plan) -> float:
        """Return the variance of a client's noise on each coordinate, in levels^2."""
        return 0.0

    @classmethod
    def server_variance(cls, plan: Plan) -> float:
        """Return the variance of the server's noise on each coordinate, in levels^2."""
        return 0.0


@MECHANISMS.register("central")
class Central(Mechanism):
    """The server sees every clipped update, adds the noise to their sum, and is trusted with both.

    Source: McMahan et al. 2018, arXiv:1710.06963, algorithm 1.
    """

    name = "central"
    title = "the server adds the noise and is trusted"
    budgeted = ("release",)

    @classmethod
    def seen(cls, plan: Plan) -> dict[Adversary, Release]:
        """Return the models, with the noise, and the uploads, without noise."""
        noisy = Release("gaussian", plan.noise_multiplier, plan.sampling_probability)
        return {"release": noisy, "uploads": Release("gaussian", 0.0)}

    @classmethod
    def server_noise(cls, plan: Plan, draw: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
        """Return Gaussian noise of standard deviation z on the sum."""
        return gaussian(draw, math.sqrt(cls.server_variance(plan)), (size,))

    @classmethod
    def server_variance(cls, plan: Plan) -> float:
        """(z * LEVELS)^2."""
        return (plan.noise_multiplier * LEVELS) ** 2


@MECHANISMS.register("local")
class Local(Mechanism):
    """Each client adds all of the noise to its own update: every upload is private by itself.

    Zero-out adjacency compares a client that takes part with its data and one that takes part with none. Between any
    two updates of a client, the sensitivity is twice as large, so z counts half.
    """

    name = "local"
    title = "each client adds all of the noise to its own update"
    budgeted = ("uploads", "release")

    @classmethod
    def seen(cls, plan: Plan) -> dict[Adversary, Release]:
        """Return the upload for both adversaries: the models follow from uploads, and cost at most as much."""
        noisy = Release("gaussian", plan.noise_multiplier)
        return {"release": noisy, "uploads": noisy}

    @classmethod
    def client_noise(cls, plan: Plan, draw: np.random.Generator, clients: int = 1) -> Levels:
        """Return Gaussian noise of standard deviation z; rounding noisy values costs no privacy."""
        deviation = math.sqrt(clients * cls.client_variance(plan))
        return np.rint(gaussian(draw, deviation, (plan.dimension,))).astype(np.int64)

    @classmethod
    def client_variance(cls, plan: Plan) -> float:
        """(z * LEVELS)^2."""
        return (plan.noise_multiplier * LEVELS) ** 2


@MECHANISMS.register("distributed")
class Distributed(Mechanism):
    """Each client adds a share of the noise; the sum of any `n_min` clients contains at least all of it.

    Shares are Skellam noise of variance (z * LEVELS)^2 / (h * n_min). In a sum over n' >= n_min clients, of which at
    least h * n_min are honest, noise of variance (z * LEVELS)^2 or more stays secret. From a site that has added k of
    the shares itself, h * n_min - k shares stay secret. k is the most clients that the plan allows a site.

    Source: Kairouz, Liu and Steinke 2021, arXiv:2102.06387; Agarwal et al. 2021, arXiv:2110.04995.
    """

    name = "distributed"
    title = "each client adds a share of the noise"
    budgeted = ("release", "sums")

    @classmethod
    def seen(cls, plan: Plan) -> dict[Adversary, Release]:
        """Return the sum, to another site without the noise of its own clients, to all others with all noise.

        Without secure aggregation, the server sees each upload, with only its share, instead of the sum.
        """
        shares = plan.honest_fraction * plan.min_clients
        share = plan.noise_multiplier / math.sqrt(shares)

        def noisy(noise_multiplier: float) -> Release:
            return Release("skellam", noise_multiplier, dimension=plan.dimension)

        total = noisy(plan.noise_multiplier)
        to_others: dict[Adversary, Release] = {
            "release": noisy(share * math.sqrt(max(secret_shares(plan), 0.0))),
            "outsiders": total,
        }
        if plan.secure_aggregation:
            return {**to_others, "sums": total}
        return {**to_others, "uploads": noisy(share)}

    @classmethod
    def client_noise(cls, plan: Plan, draw: np.random.Generator, clients: int = 1) -> Levels:
        """Return the sum of the clients' Skellam shares."""
        return skellam(draw, clients * cls.client_variance(plan), (plan.dimension,))

    @classmethod
    def client_variance(cls, plan: Plan) -> float:
        """(z * LEVELS)^2 / (h * n_min)."""
        return (plan.noise_multiplier * LEVELS) ** 2 / (plan.honest_fraction * plan.min_clients)


def secret_shares(plan: Plan) -> float:
    """Return the least number of noise shares in a sum that are secret from every single site, in mode `distributed`.

    A site knows the shares of its own clients. Settings with less than one secret share are refused
    (`common/config/rules.py`).
    """
    return plan.honest_fraction * plan.min_clients - plan.max_clients_per_site


def mechanism_of(plan: Plan) -> type[Mechanism]:
    """Return the mechanism of a plan's mode."""
    return MECHANISMS.get(plan.mode)


def releases_of(plan: Plan) -> dict[Adversary, Release]:
    """Return the release that each adversary sees in a round, without adversaries that see nothing."""
    return mechanism_of(plan).seen(plan)


def epsilon_after(plan: Plan, rounds: int) -> dict[Adversary, float]:
    """Return each adversary's epsilon after `rounds` rounds, none of them repeated."""
    return {adversary: epsilon([release] * rounds, plan.delta) for adversary, release in releases_of(plan).items()}


def mean_noise(plan: Plan, clients: int) -> float:
    """Return the standard deviation of the noise on each coordinate of a mean over `clients` updates."""
    mechanism = mechanism_of(plan)
    variance = mechanism.client_variance(plan) * clients + mechanism.server_variance(plan)
    return math.sqrt(variance) * plan.clip_norm / LEVELS / clients
