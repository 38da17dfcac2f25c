"""From a run's settings to its privacy plan.

A site makes the same plan from the settings that it is sent, so that nothing about the noise has to be believed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tsugiki.common import __version__
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.privacy.accounting import RELATION, Release, calibrate
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import MECHANISMS, releases_of

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
from tsugiki.common.privacy.plan import Plan

_WIDTHS_BITS = (32, 40, 48, 56)


def resolve(config: RunConfig, dimension: int) -> RunConfig:
    """Return the configuration with the noise multiplier and the number of clients that it implies.

    Args:
        config: with a privacy mode or without one.
        dimension: coordinates of an update.

    Raises:
        ConfigError: the budget cannot be kept, or integers are too narrow for the plan.
    """
    if config.privacy.mode == "none":
        return config
    changes: dict[str, Any] = {
        "enrolled_clients": config.enrolled_clients,
        "max_clients_per_site": config.most_clients_of_a_site,
    }
    if config.privacy.noise_multiplier == 0 and config.privacy.target_epsilon > 0:
        changes["noise_multiplier"] = _calibrated(config, dimension)
    return config.model_copy(update={"privacy": config.privacy.model_copy(update=changes)})


def _calibrated(config: RunConfig, dimension: int) -> float:
    rounds, privacy = config.run.rounds, config.privacy

    def releases(noise_multiplier: float) -> list[Release]:
        changed = privacy.model_copy(update={"noise_multiplier": noise_multiplier})
        seen = releases_of(_plan(config.model_copy(update={"privacy": changed}), dimension))
        return [seen[MECHANISMS.get(privacy.mode).budgeted[0]]] * rounds

    try:
        return calibrate(releases, privacy.target_epsilon, privacy.delta)
    except ValueError as error:
        problem = Problem(
            "privacy.target_epsilon", str(privacy.target_epsilon), f"a budget that can be kept: {error}", "raise it"
        )
        raise ConfigError("privacy plan", [problem]) from error


def make_plan(config: RunConfig, dimension: int) -> Plan | None:
    """Return the plan of a run; None for a run without privacy.

    Args:
        config: from `resolve`, or not resolved yet.
        dimension: coordinates of an update.

    Raises:
        ConfigError: integers are too narrow for a sum of all clients.
    """
    if config.privacy.mode == "none":
        return None
    return _plan(resolve(config, dimension), dimension)  # settings with a budget and no noise must not mean no noise


def _plan(config: RunConfig, dimension: int) -> Plan:
    from importlib.metadata import version

    privacy, sampled = config.privacy, config.privacy.sampling == "poisson"
    probability = config.strategy.fraction_train if sampled else 1.0
    return Plan(
        mode=privacy.mode,
        secure_aggregation=privacy.secure_aggregation,
        rounds=config.run.rounds,
        enrolled_clients=config.enrolled_clients,
        max_clients_per_site=config.most_clients_of_a_site,
        min_clients=config.strategy.min_clients,
        min_sites=privacy.min_sites,
        honest_fraction=privacy.honest_fraction,
        clip_norm=privacy.clip_norm,
        noise_multiplier=privacy.noise_multiplier,
        sampling_probability=probability,
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        dimension=dimension,
        levels=LEVELS,
        modulus_bits=_modulus_bits(config.enrolled_clients, privacy.noise_multiplier),
        private=privacy.insecure_noise_seed == 0 and privacy.noise_multiplier > 0,
        relation=RELATION,
        versions=f"tsugiki {__version__}, dp-accounting {version('dp-accounting')}",
    )


def _modulus_bits(clients: int, noise_multiplier: float) -> int:
    """Return the width of integers in which a sum of all clients cannot wrap around, but for noise beyond 8 sigma.

    Every client may add noise of full strength, as in the mode `local`: no mode needs more.

    Raises:
        ConfigError: 56 bits are too few.
    """
    largest = clients * LEVELS + 8 * math.sqrt(clients) * noise_multiplier * LEVELS
    for bits in _WIDTHS_BITS:
        if 2 ** (bits - 1) > largest:
            return bits
    problem = Problem(
        "privacy.enrolled_clients", str(clients), "small enough for a sum in 56 bits", "use fewer clients"
    )
    raise ConfigError("privacy plan", [problem])
