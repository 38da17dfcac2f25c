"""Make the privacy plan of a run from its settings.

The server makes the plan once, at the start of a run. A site makes the same plan from the settings that it receives
(`RunConfig.for_sites`), so that it does not have to trust the server about the noise.
"""

from __future__ import annotations

import math
from importlib.metadata import version

from tsugiki.common import __version__
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.privacy.accounting import ACCOUNT, RELATION, Release, calibrate
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import MECHANISMS, releases_of
from tsugiki.common.privacy.plan import Plan

_WIDTHS_BITS = (32, 40, 48, 56)


def make_plan(config: RunConfig, dimension: int) -> Plan | None:
    """Return the plan of a run; None for a run without privacy.

    The noise multiplier is the one in the settings. If that is 0 and there is a budget, it is the smallest that keeps
    the budget over all rounds.

    Args:
        config: the run's configuration.
        dimension: number of coordinates of an update, at least 1.

    Raises:
        ConfigError: no noise keeps the budget, or integers are too narrow for a sum of all clients.
    """
    if config.privacy.mode == "none":
        return None
    noise_multiplier = config.privacy.noise_multiplier
    if noise_multiplier == 0 and config.privacy.target_epsilon > 0:  # a budget must never mean a run without noise
        noise_multiplier = _calibrated(config, dimension)
    return _plan(config, dimension, noise_multiplier)


def _calibrated(config: RunConfig, dimension: int) -> float:
    """Return the smallest noise multiplier that keeps the budget over all rounds."""
    privacy = config.privacy
    adversary = MECHANISMS.get(privacy.mode).budgeted[0]  # a second one sees as much noise or more, or nothing

    def releases(noise_multiplier: float) -> list[Release]:
        seen = releases_of(_plan(config, dimension, noise_multiplier))
        return [seen[adversary]] * config.run.rounds

    try:
        return calibrate(releases, privacy.target_epsilon, privacy.delta)
    except ValueError as error:
        problem = Problem(
            "privacy.target_epsilon", str(privacy.target_epsilon), f"a budget that can be kept: {error}", "raise it"
        )
        raise ConfigError("privacy plan", [problem]) from error


def _plan(config: RunConfig, dimension: int, noise_multiplier: float) -> Plan:
    """Return the plan with this noise multiplier instead of the one in the settings."""
    privacy = config.privacy
    sampled = privacy.sampling == "poisson"
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
        noise_multiplier=noise_multiplier,
        sampling_probability=config.strategy.fraction_train if sampled else 1.0,
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        dimension=dimension,
        levels=LEVELS,
        modulus_bits=_modulus_bits(config.enrolled_clients, noise_multiplier),
        account=ACCOUNT,
        private=privacy.insecure_noise_seed == 0 and noise_multiplier > 0,
        relation=RELATION,
        versions=f"tsugiki {__version__}, dp-accounting {version('dp-accounting')}",
    )


def _modulus_bits(clients: int, noise_multiplier: float) -> int:
    """Return the width of integers in which a sum of all clients cannot wrap around, unless noise exceeds 8 sigma.

    The width allows noise of full strength from every client, as in the mode `local`; no mode needs more.

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
