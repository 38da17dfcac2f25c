"""Assess a run's own privacy plan: what each adversary learns, whether the model can learn, and what dropouts cost.

docs/privacy.md explains the symbols in brackets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tsugiki.common.errors import UsageError
from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.mechanisms import ADVERSARIES, Adversary, mechanism_of, releases_of
from tsugiki.common.privacy.plan import Plan
from tsugiki.server.budget.alternatives import Lever, Noise, everything_seen, levers, most_rounds, noise_on_mean

NO_SIGNAL = 0.1
WEAK_SIGNAL = 1.0
"""Rules of thumb for the signal-to-noise bound: below NO_SIGNAL nothing is learned, below WEAK_SIGNAL little."""

SURVIVING = (0.9, 0.8, 0.5)
"""Shares of the least number of clients for which the cost of opening their sum is reported."""

Verdict = Literal["hopeless", "hard", "possible", "no-noise"]


@dataclass(frozen=True)
class View:
    """What one adversary may have learned about one client after all rounds.

    Args:
        who: the adversary's name in the ledger.
        words: a description of the adversary.
        epsilon: epsilon after all rounds; infinite if the adversary sees updates or sums without noise.
        here: whether the adversary sees anything in this plan; if not, it does with secure aggregation switched.
        budget: the epsilon that limits this adversary in the plan; None without a limit.
    """

    who: Adversary
    words: str
    epsilon: float
    here: bool
    budget: float | None


@dataclass(frozen=True)
class Dropout:
    """The cost of opening sums over too few clients. The program refuses to open them.

    Args:
        clients: number of clients left, below the least number (n_min).
        share: share of the noise's variance that is left with them, from 0 to 1.
        epsilon: epsilon of the release after all rounds; infinite if a site knows all that is left.
    """

    clients: int
    share: float
    epsilon: float


@dataclass(frozen=True)
class Assessment:
    """The assessment of a run's plan.

    Args:
        plan: the frozen plan.
        calibrated: whether its noise multiplier was found from the budget.
        views: what each adversary may learn.
        strict_epsilon: in mode local, epsilon of uploads if any two updates are compared, in place of an update and
            none; None in other modes.
        rounds_allowed: how many of the planned rounds the budget allows.
        noise: the noise with the least number of clients, then with all clients asked; one entry if both are the same.
        growth: factor by which the noise on the sum grows if all take part, sqrt(n' / (h n_min)); 1 if clients add no
            shares of noise.
        verdict: verdict on the bound with all clients asked.
        levers: changes that would lift the bound to 1; empty if it is 1 or more.
        dropouts: costs of missing clients; empty if dropouts take no noise away.
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
    """Return the assessment of a run's plan.

    Args:
        plan: the run's plan.
        clients: number of clients asked in a round; under Poisson sampling, the average.
        calibrated: whether the plan's noise multiplier was found from its budget.
        target_epsilon: epsilon that the levers keep.
    """
    counts = [plan.min_clients, clients]
    if plan.denominator:  # the mean has a fixed denominator: its noise is the same for every number of clients
        counts = [clients]
    noise = tuple(noise_on_mean(plan, count) for count in dict.fromkeys(counts))
    bound = noise[-1].bound
    # In modes with sums, each client adds a share of the noise, so that dropouts take noise away.
    shares = "sums" in everything_seen(plan) and plan.noise_multiplier > 0
    return Assessment(
        plan=plan,
        calibrated=calibrated,
        views=_views(plan),
        strict_epsilon=_scaled_epsilon(plan, "uploads", 0.25) if plan.mode == "local" else None,
        rounds_allowed=_rounds_allowed(plan),
        noise=noise,
        growth=math.sqrt(clients / (plan.honest_fraction * plan.min_clients)) if shares else 1.0,
        verdict=judge(bound),
        levers=levers(plan, clients, target_epsilon) if bound < WEAK_SIGNAL else (),
        dropouts=_dropouts(plan) if shares else (),
    )


def clients_asked(plan: Plan, fraction_train: float) -> int:
    """Return the number of clients asked in a round; under Poisson sampling, the average."""
    asked = plan.denominator or max(plan.min_clients, round(fraction_train * plan.enrolled_clients))
    return max(1, round(asked))


def check_hope(plan: Plan, fraction_train: float) -> None:
    """Check that something can be learned under a plan.

    Args:
        plan: of the run.
        fraction_train: share of the clients that are asked in each round.

    Raises:
        UsageError: `plan-hopeless`, the noise leaves nothing to learn from.
    """
    bound = noise_on_mean(plan, clients_asked(plan, fraction_train)).bound
    if judge(bound) == "hopeless":
        raise UsageError(
            f"nothing can be learned under this privacy plan: the signal-to-noise bound of a round is {bound:.2g}",
            f"at least {NO_SIGNAL:g}, or the clients' budget is spent for noise",
            "`tsugiki budget FILE`, which says what would help; or --yes, which runs it all the same",
            code="plan-hopeless",
        )


def judge(bound: float) -> Verdict:
    """Return the verdict on a signal-to-noise bound."""
    if math.isinf(bound):
        return "no-noise"
    if bound < NO_SIGNAL:
        return "hopeless"
    if bound < WEAK_SIGNAL:
        return "hard"
    return "possible"


def _views(plan: Plan) -> tuple[View, ...]:
    """Return what each adversary may learn, with secure aggregation as planned and switched the other way."""
    here = releases_of(plan)
    limited: set[Adversary] = set()
    if plan.target_epsilon:
        limited = {adversary for adversary in mechanism_of(plan).budgeted if adversary in here}
    return tuple(
        View(
            who=adversary,
            words=ADVERSARIES[adversary],
            epsilon=epsilon({release: plan.rounds}, plan.delta),
            here=adversary in here,
            budget=plan.target_epsilon if adversary in limited else None,
        )
        for adversary, release in everything_seen(plan).items()
    )


def _rounds_allowed(plan: Plan) -> int:
    if not plan.target_epsilon:
        return plan.rounds
    seen = releases_of(plan)
    limited = [adversary for adversary in mechanism_of(plan).budgeted if adversary in seen]
    return min(most_rounds(seen[adversary], plan.target_epsilon, plan) for adversary in limited)


def _scaled_epsilon(plan: Plan, adversary: Adversary, share: float) -> float:
    """Return an adversary's epsilon after all rounds if the noise had only a share of its variance."""
    weaker = replace(plan, noise_multiplier=plan.noise_multiplier * math.sqrt(share))
    return epsilon({releases_of(weaker)[adversary]: plan.rounds}, plan.delta)


def _dropouts(plan: Plan) -> tuple[Dropout, ...]:
    """Return the cost of releases that lack the noise shares of some clients.

    Source: Tsugiki's privacy notes, section 1.3.
    """
    least = plan.min_clients
    # The small addend makes up for rounding in the product, which could cost one client.
    left = dict.fromkeys(max(1, math.floor(share * least + 1e-9)) for share in SURVIVING)
    return tuple(
        Dropout(count, count / least, _scaled_epsilon(replace(plan, min_clients=count), "release", count / least))
        for count in left
        if count < least
    )
