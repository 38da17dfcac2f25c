"""Alternatives to a run's plan: other modes, other numbers of clients, and changes that would make learning possible.

docs/privacy.md explains the symbols in brackets. The signal-to-noise bound of a round is the clip norm divided by the
norm of the noise on the mean, because no mean update is longer than the clip norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tsugiki.common.privacy.accounting import Release, calibrate, epsilon
from tsugiki.common.privacy.mechanisms import (
    ADVERSARIES,
    MECHANISMS,
    Adversary,
    mean_noise,
    mechanism_of,
    releases_of,
    secret_shares,
)
from tsugiki.common.privacy.plan import Plan

TABLE_CLIENTS = (100, 1_000, 10_000)

_AIM = 1.002
"""Target for the bound: a little above 1, because calibration rounds the noise multiplier up by at most 0.11 %."""

_PRECISION = 1e-4
_STEPS = 20
"""How exactly the number of clients is found, and the most steps; rounding to whole clients may not allow it."""


@dataclass(frozen=True)
class Noise:
    """The noise on the mean update of one round.

    Args:
        clients: number of clients in the mean (n').
        coordinate: standard deviation on each coordinate, in the adapter's own units.
        norm: norm of the whole noise vector: coordinate * sqrt(d).
        bound: upper bound of the signal-to-noise ratio: clip norm / `norm`; infinite without noise.
    """

    clients: int
    coordinate: float
    norm: float
    bound: float


@dataclass(frozen=True)
class Row:
    """One mode with one number of clients, all of which take part.

    Args:
        mode: name of the mechanism.
        clients: number of clients in each sum (n = n_min).
        noise_multiplier: the value that keeps the target epsilon (z); None if no such plan is accepted.
        noise: the noise on the mean; None if no such plan is accepted.
        epsilon: epsilon by adversary, for all who see anything with or without secure aggregation; infinite where
            there is no noise.
    """

    mode: str
    clients: int
    noise_multiplier: float | None
    noise: Noise | None
    epsilon: dict[Adversary, float]


@dataclass(frozen=True)
class Lever:
    """The value that one number of a plan needs for a bound of 1, if all others stay.

    Args:
        name: name of the number.
        now: its value in the plan.
        needed: the value needed; None if no value is enough.
        delta: a smaller delta that the needed clients require; None if the plan's own is small enough.
    """

    name: Literal["clients", "parameters", "rounds", "epsilon"]
    now: float
    needed: float | None
    delta: float | None = None


def budgeted_release(plan: Plan) -> Release:
    """Return the release of a round to the adversary that the mode mainly protects against."""
    return releases_of(plan)[mechanism_of(plan).budgeted[0]]


def everything_seen(plan: Plan) -> dict[Adversary, Release]:
    """Return the release of a round to each adversary that sees one with or without secure aggregation."""
    both = {
        **releases_of(replace(plan, secure_aggregation=False)),
        **releases_of(replace(plan, secure_aggregation=True)),
    }
    return {adversary: both[adversary] for adversary in ADVERSARIES if adversary in both}


def noise_on_mean(plan: Plan, clients: int) -> Noise:
    """Return the noise on a mean over `clients` updates.

    Source: Tsugiki's privacy notes, section 3: signal / noise <= n / (z sqrt(d)).
    """
    coordinate = mean_noise(plan, clients) * clients / (plan.denominator or clients)
    norm = coordinate * math.sqrt(plan.dimension)
    bound = plan.clip_norm / norm if norm else math.inf
    return Noise(clients, coordinate, norm, bound)


def calibrated(plan: Plan, target_epsilon: float) -> Plan | None:
    """Return the plan with the least noise that keeps the target epsilon; None if no such plan is accepted."""

    def releases(noise_multiplier: float) -> dict[Release, int]:
        return {budgeted_release(replace(plan, noise_multiplier=noise_multiplier)): plan.rounds}

    try:
        noise_multiplier = calibrate(releases, target_epsilon, plan.delta)
    except ValueError:
        return None
    return replace(plan, noise_multiplier=noise_multiplier, target_epsilon=target_epsilon)


def without_slack(plan: Plan, mode: str, clients: int) -> Plan:
    """Return the plan in another mode and with another number of clients, all of which must take part.

    Sampling is kept only if the mode stays the same, and dishonest clients only in mode distributed. With fewer clients
    than the plan's, the largest site has the same share of them; with more, as many as now.
    """
    probability = plan.sampling_probability if mode == plan.mode else 1.0
    of_a_site = math.ceil(plan.max_clients_per_site * min(1.0, clients / plan.enrolled_clients))
    return replace(
        plan,
        mode=mode,
        min_clients=clients,
        enrolled_clients=round(clients / probability),
        max_clients_per_site=of_a_site,
        sampling_probability=probability,
        honest_fraction=plan.honest_fraction if mode == "distributed" else 1.0,
    )


def table(plan: Plan, target_epsilon: float, clients: int) -> tuple[Row, ...]:
    """Return a row for each number of clients and each mode, at the plan's rounds, clip norm and delta.

    Args:
        plan: the run's plan.
        target_epsilon: epsilon that each mode is calibrated for.
        clients: the run's own number of clients in a round.
    """
    counts = sorted({clients, *TABLE_CLIENTS})
    return tuple(
        _row(without_slack(plan, mode, count), target_epsilon) for count in counts for mode in MECHANISMS.names()
    )


def _row(plan: Plan, target_epsilon: float) -> Row:
    noisy = calibrated(plan, target_epsilon)
    # At a delta of 1 / N or more, publishing one client's update would count as private.
    # In a sum where a site knows nearly all noise, nothing would hide the others.
    shared_with_one = plan.mode == "distributed" and secret_shares(plan) < 1
    if noisy is None or shared_with_one or plan.delta * plan.enrolled_clients >= 1:
        return Row(plan.mode, plan.min_clients, None, None, {})
    spent = {
        adversary: epsilon({release: plan.rounds}, plan.delta) for adversary, release in everything_seen(noisy).items()
    }
    noise = noise_on_mean(noisy, plan.min_clients)
    return Row(plan.mode, plan.min_clients, noisy.noise_multiplier, noise, spent)


def levers(plan: Plan, clients: int, target_epsilon: float) -> tuple[Lever, ...]:
    """Return the value that each of four numbers needs, if the others stay, for a signal-to-noise bound of 1.

    The bound is proportional to 1 / z, to 1 / sqrt(d), and to n (in mode local, to sqrt(n)).

    Args:
        plan: a plan with a bound below 1.
        clients: number of clients asked in a round.
        target_epsilon: epsilon that the noise was calibrated for.
    """
    bound = noise_on_mean(plan, clients).bound
    # The plan with the noise multiplier that lifts the bound to 1 at the plan's own clients and parameters.
    enough = replace(plan, noise_multiplier=plan.noise_multiplier * bound / _AIM)
    release = budgeted_release(enough)
    needed, delta = _clients_needed(plan, clients, target_epsilon)
    spent = epsilon({release: plan.rounds}, plan.delta)
    return (
        Lever("clients", clients, needed, delta if delta < plan.delta else None),
        Lever("parameters", plan.dimension, math.floor(plan.dimension * (bound / _AIM) ** 2) or None),
        Lever("rounds", plan.rounds, most_rounds(release, target_epsilon, plan) or None),
        Lever("epsilon", target_epsilon, _round_up(spent) if math.isfinite(spent) else None),
    )


def _clients_needed(plan: Plan, clients: int, target_epsilon: float) -> tuple[int | None, float]:
    """Return the number of clients needed, None if no number is enough, and a delta below 1 / enrolled clients."""
    noisy: Plan | None = plan
    while noisy is not None:
        factor = _factor_needed(noisy, clients)
        enrolled = scaled(plan, factor).enrolled_clients
        if noisy.delta * enrolled < 1:
            return math.ceil(clients * factor), noisy.delta
        # The delta is too large for the clients found: calibrate again with a smaller one.
        noisy = calibrated(replace(plan, delta=float(f"{0.1 / enrolled:.0e}")), target_epsilon)
    return None, plan.delta


def _factor_needed(plan: Plan, clients: int) -> float:
    """Return the factor of all numbers of clients that lifts the bound, now below 1, to a little above 1."""
    factor = 1.0
    for _ in range(_STEPS):
        bound = noise_on_mean(scaled(plan, factor), math.ceil(clients * factor)).bound
        if abs(bound / _AIM - 1) < _PRECISION:
            break
        # The bound grows nearly as a power of the clients; doubling them shows the exponent.
        twice = noise_on_mean(scaled(plan, 2 * factor), math.ceil(2 * clients * factor)).bound
        factor *= (_AIM / bound) ** (1 / math.log2(twice / bound))
    return factor


def scaled(plan: Plan, factor: float) -> Plan:
    """Return the plan with its numbers of clients multiplied by a factor of 1 or more and rounded up, as private."""
    larger = replace(
        plan,
        enrolled_clients=math.ceil(plan.enrolled_clients * factor),
        min_clients=math.ceil(plan.min_clients * factor),
    )
    return as_private_as(plan, larger) or larger


def as_private_as(plan: Plan, other: Plan) -> Plan | None:
    """Return another plan with the noise that hides as much as this plan's; None if no noise does.

    In mode distributed, a site knows a smaller part of the noise the more clients are in a sum.
    """
    wanted = budgeted_release(plan).noise_multiplier
    now = budgeted_release(other).noise_multiplier
    if now <= 0:
        return None
    return replace(other, noise_multiplier=other.noise_multiplier * (wanted / now))


def most_rounds(release: Release, most_epsilon: float, plan: Plan) -> int:
    """Return how many of the plan's rounds stay within an epsilon; 0 if even one round exceeds it."""
    low = 0
    high = plan.rounds + 1
    middle = plan.rounds  # all rounds usually fit, so they are tried first
    while high - low > 1:
        if epsilon({release: middle}, plan.delta) <= most_epsilon:
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return low


def _round_up(value: float, digits: int = 3) -> float:
    """Return a positive number, rounded up to a number of significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")
