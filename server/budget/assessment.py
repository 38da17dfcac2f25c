"""A run's own privacy plan, judged: who learns how much, whether anything can be learned, what dropouts would cost.

Symbols in brackets are those of docs/privacy.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.mechanisms import ADVERSARIES, Adversary, mechanism_of, releases_of
from tsugiki.common.privacy.plan import Plan
from tsugiki.server.budget.alternatives import Lever, Noise, everything_seen, levers, most_rounds, noise_on_mean

NO_SIGNAL = 0.1
WEAK_SIGNAL = 1.0
"""Rules of thumb for the signal-to-noise bound: below the first nothing is learned, below the second little."""

SURVIVING = (0.9, 0.8, 0.5)
"""Shares of the least number of clients for which the cost of opening their sum all the same is told."""

Verdict = Literal["hopeless", "hard", "possible", "no-noise"]


@dataclass(frozen=True)
class View:
    """What one adversary may have learned about one client after all rounds.

    Args:
        who: the ledger's name.
        words: who that is.
        epsilon: infinite if it sees updates or sums without noise.
        here: whether it sees that in this plan, and not only with secure aggregation switched the other way.
        budget: that bounds it in this plan; None: none does.
    """

    who: Adversary
    words: str
    epsilon: float
    here: bool
    budget: float | None


@dataclass(frozen=True)
class Dropout:
    """What sums over too few clients would cost if they were opened all the same; the program refuses to.

    Args:
        clients: that are left, of the least number (n_min).
        share: of the noise's variance that is left with them.
        epsilon: of the release after all rounds.
    """

    clients: int
    share: float
    epsilon: float


@dataclass(frozen=True)
class Assessment:
    """What there is to say about a run's plan.

    Args:
        plan: the frozen plan.
        calibrated: whether its noise multiplier was found from the budget.
        views: of the adversaries.
        strict_epsilon: of uploads between any two updates, not an update and none (mode local); else None.
        rounds_allowed: how many of the planned rounds the budget allows.
        noise: with the least number of clients, then with all that are asked; one entry where that makes no difference.
        growth: of the noise on the sum when all take part, sqrt(n' / (h n_min)); 1 where clients add no shares.
        verdict: on the bound with all clients that are asked.
        levers: none if the bound is 1 or more.
        dropouts: none where dropouts take no noise away.
    """

    plan: Plan
    calibrated: bool
    views: tuple[View, ...]
    strict_epsilon: float | None
    rounds_allowed: int
    noise: tuple[Noise, ...]
    growth: float
    verdict: Verdict
    levers: tuple[Lever, ...]
    dropouts: tuple[Dropout, ...]


def assess(plan: Plan, clients: int, calibrated: bool, target_epsilon: float) -> Assessment:
    """Return everything about a run's plan.

    Args:
        plan: of the run.
        clients: asked in a round; under Poisson sampling, on average.
        calibrated: whether its noise multiplier was found from its budget.
        target_epsilon: what the levers are to keep.
    """
    noise = tuple(noise_on_mean(plan, count) for count in dict.fromkeys((plan.min_clients, clients)))
    noise = noise[-1:] if plan.denominator else noise
    shares = "sums" in everything_seen(plan) and plan.noise_multiplier > 0
    return Assessment(
        plan=plan,
        calibrated=calibrated,
        views=_views(plan),
        strict_epsilon=_scaled_epsilon(plan, "uploads", 0.25) if plan.mode == "local" else None,
        rounds_allowed=_rounds_allowed(plan),
        noise=noise,
        growth=math.sqrt(clients / (plan.honest_fraction * plan.min_clients)) if shares else 1.0,
        verdict=judge(noise[-1].bound),
        levers=levers(plan, clients, target_epsilon) if noise[-1].bound < WEAK_SIGNAL else (),
        dropouts=_dropouts(plan) if shares else (),
    )


def judge(bound: float) -> Verdict:
    """Return what a signal-to-noise bound means."""
    if math.isinf(bound):
        return "no-noise"
    return "hopeless" if bound < NO_SIGNAL else "hard" if bound < WEAK_SIGNAL else "possible"


def _views(plan: Plan) -> tuple[View, ...]:
    here = releases_of(plan)
    budgets = {who: plan.target_epsilon for who in mechanism_of(plan).budgeted if who in here and plan.target_epsilon}
    return tuple(
        View(who, ADVERSARIES[who], epsilon({release: plan.rounds}, plan.delta), who in here, budgets.get(who))
        for who, release in everything_seen(plan).items()
    )


def _rounds_allowed(plan: Plan) -> int:
    if not plan.target_epsilon:
        return plan.rounds
    seen = releases_of(plan)
    return min(most_rounds(seen[who], plan.target_epsilon, plan) for who in mechanism_of(plan).budgeted if who in seen)


def _scaled_epsilon(plan: Plan, who: Adversary, share: float) -> float:
    """Return an adversary's epsilon after all rounds if the noise had only a share of its variance."""
    release = releases_of(plan)[who]
    weaker = replace(release, noise_multiplier=release.noise_multiplier * math.sqrt(share))
    return epsilon({weaker: plan.rounds}, plan.delta)


def _dropouts(plan: Plan) -> tuple[Dropout, ...]:
    """Return what releases cost that lack the shares of some clients: privacy notes, section 1.3."""
    least = plan.min_clients
    left = dict.fromkeys(max(1, math.floor(share * least + 1e-9)) for share in SURVIVING)
    return tuple(
        Dropout(count, count / least, _scaled_epsilon(plan, "release", count / least))
        for count in left
        if count < least
    )
