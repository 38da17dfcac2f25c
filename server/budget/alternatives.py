"""Plans that differ from a run's in one thing: other modes, more clients, and what would have to change to learn.

Symbols in brackets are those of docs/privacy.md. The signal-to-noise bound of a round is the clip norm over the norm of
the noise on the mean: no mean update is longer than the clip norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tsugiki.common.privacy.accounting import Release, calibrate, epsilon
from tsugiki.common.privacy.mechanisms import ADVERSARIES, MECHANISMS, Adversary, mean_noise, mechanism_of, releases_of
from tsugiki.common.privacy.plan import Plan

TABLE_CLIENTS = (100, 1_000, 10_000)

_AIM = 1.002
"""The bound that is aimed at instead of 1: calibration rounds the noise multiplier up, by at most 0.11 %."""


@dataclass(frozen=True)
class Noise:
    """The noise on the mean update of one round.

    Args:
        clients: in the mean (n').
        coordinate: standard deviation on each coordinate, in the adapter's own units.
        norm: of the whole noise vector: coordinate * sqrt(d).
        bound: of the signal-to-noise ratio: the clip norm over `norm`; infinite without noise.
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
        clients: in each sum (n = n_min).
        noise_multiplier: for the epsilon in question (z); None if no such plan is accepted.
        noise: on the mean; None likewise.
        epsilon: of each adversary who sees anything, with secure aggregation and without; infinite: no noise.
    """

    mode: str
    clients: int
    noise_multiplier: float | None
    noise: Noise | None
    epsilon: dict[Adversary, float]


@dataclass(frozen=True)
class Lever:
    """What one number alone would have to be for a bound of 1.

    Args:
        name: of the number.
        now: its value in the plan.
        needed: None if no value is enough.
        delta: other than the plan's, if so many clients need a smaller one; else None.
    """

    name: Literal["clients", "parameters", "rounds", "epsilon"]
    now: float
    needed: float | None
    delta: float | None = None


def budgeted_release(plan: Plan) -> Release:
    """Return what a round shows to the adversary against whom the mode is there first."""
    return releases_of(plan)[mechanism_of(plan).budgeted[0]]


def everything_seen(plan: Plan) -> dict[Adversary, Release]:
    """Return what a round shows to each adversary, with secure aggregation and without."""
    both = {
        **releases_of(replace(plan, secure_aggregation=False)),
        **releases_of(replace(plan, secure_aggregation=True)),
    }
    return {who: both[who] for who in ADVERSARIES if who in both}


def noise_on_mean(plan: Plan, clients: int) -> Noise:
    """Return the noise on a mean over `clients` updates.

    Source: Tsugiki's privacy notes, section 3: signal / noise <= n / (z sqrt(d)).
    """
    coordinate = mean_noise(plan, clients) * clients / (plan.denominator or clients)
    norm = coordinate * math.sqrt(plan.dimension)
    return Noise(clients, coordinate, norm, plan.clip_norm / norm if norm else math.inf)


def calibrated(plan: Plan, target_epsilon: float) -> Plan | None:
    """Return the plan with the least noise that keeps the target; None if such a plan is not accepted."""

    def releases(noise_multiplier: float) -> dict[Release, int]:
        return {budgeted_release(replace(plan, noise_multiplier=noise_multiplier)): plan.rounds}

    try:
        noise_multiplier = calibrate(releases, target_epsilon, plan.delta)
    except ValueError:
        return None
    return replace(plan, noise_multiplier=noise_multiplier, target_epsilon=target_epsilon)


def without_slack(plan: Plan, mode: str, clients: int) -> Plan:
    """Return the plan in another mode, with another number of clients, all of which have to take part.

    Only what a mode is made for goes with it: sampling stays in mode central, dishonest clients in mode distributed.
    """
    probability = plan.sampling_probability if mode == plan.mode else 1.0
    return replace(
        plan,
        mode=mode,
        min_clients=clients,
        enrolled_clients=round(clients / probability),
        sampling_probability=probability,
        honest_fraction=plan.honest_fraction if mode == "distributed" else 1.0,
    )


def table(plan: Plan, target_epsilon: float, clients: int) -> tuple[Row, ...]:
    """Return a row for each number of clients and each mode, at the plan's rounds, clip norm and delta.

    Args:
        plan: of the run.
        target_epsilon: that each mode is calibrated for.
        clients: the run's own number.
    """
    counts = sorted({clients, *TABLE_CLIENTS})
    return tuple(
        _row(without_slack(plan, mode, count), target_epsilon) for count in counts for mode in MECHANISMS.names()
    )


def _row(plan: Plan, target_epsilon: float) -> Row:
    noisy = calibrated(plan, target_epsilon)
    if noisy is None or plan.delta * plan.enrolled_clients >= 1:
        return Row(plan.mode, plan.min_clients, None, None, {})
    spent = {who: epsilon({release: plan.rounds}, plan.delta) for who, release in everything_seen(noisy).items()}
    noise = noise_on_mean(noisy, plan.min_clients)
    return Row(plan.mode, plan.min_clients, noisy.noise_multiplier, noise, spent)


def levers(plan: Plan, clients: int, target_epsilon: float) -> tuple[Lever, ...]:
    """Return what each of four numbers alone would have to be for a signal-to-noise bound of 1.

    The bound is proportional to 1 / z, to 1 / sqrt(d), and to n (in mode local, to sqrt(n)).

    Args:
        plan: with a bound below 1.
        clients: that are asked in a round.
        target_epsilon: what the noise was found for.
    """
    bound = noise_on_mean(plan, clients).bound
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
    """Return how many clients are needed, and with which delta: it has to stay below 1 / enrolled clients."""
    noisy: Plan | None = plan
    while noisy is not None:
        bound = noise_on_mean(noisy, clients).bound
        twice = noise_on_mean(scaled(noisy, 2), 2 * clients).bound
        factor = (_AIM / bound) ** (1 / math.log2(twice / bound))
        enrolled = scaled(plan, factor).enrolled_clients
        if noisy.delta * enrolled < 1:
            return math.ceil(clients * factor), noisy.delta
        noisy = calibrated(replace(plan, delta=float(f"{0.1 / enrolled:.0e}")), target_epsilon)
    return None, plan.delta


def scaled(plan: Plan, factor: float) -> Plan:
    """Return the plan with so many times its clients."""
    enrolled, least = (math.ceil(count * factor) for count in (plan.enrolled_clients, plan.min_clients))
    return replace(plan, enrolled_clients=enrolled, min_clients=least)


def most_rounds(release: Release, most_epsilon: float, plan: Plan) -> int:
    """Return how many of the plan's rounds keep to an epsilon; 0: not one."""
    low = 0
    high = plan.rounds + 1
    middle = plan.rounds  # usually all of them
    while high - low > 1:
        fits = epsilon({release: middle}, plan.delta) <= most_epsilon
        low, high = (middle, high) if fits else (low, middle)
        middle = (low + high) // 2
    return low


def _round_up(value: float, digits: int = 3) -> float:
    """Return a positive number, rounded up to so many digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")
