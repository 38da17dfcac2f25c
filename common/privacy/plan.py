"""The plan of a private run: every number that its account depends on, frozen before the first round.

A site makes the same plan from the settings that it is sent, so that nothing about the noise has to be believed. It
stands in every checkpoint, and a run goes on under no other.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tsugiki.common import __version__
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.privacy.accounting import RELATION, Release, calibrate, epsilon
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import MECHANISMS, Adversary, Mechanism

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig

_WIDTHS_BITS = (32, 40, 48, 56)


@dataclass(frozen=True)
class Plan:
    """What a private run does. Symbols in brackets are those of docs/privacy.md.

    Args:
        mode: name of the mechanism.
        secure_aggregation: whether the server sees sums only.
        rounds: planned (T).
        enrolled_clients: who may ever take part (N).
        max_clients_per_site: that one site may stand for: what a site says of its clients is believed up to this.
        min_clients: the least number of clients in a sum (n_min).
        min_sites: under secure aggregation, the least number of sites that these clients are at.
        honest_fraction: of those, who add their noise and keep it to themselves (h).
        clip_norm: L2 bound of an update (C).
        noise_multiplier: standard deviation of the noise on the sum, over clip_norm (z); 0: none.
        sampling_probability: of each client in a round (q); 1 where no amplification is claimed.
        target_epsilon: the budget; 0: none.
        delta: of every epsilon.
        dimension: coordinates of an update (d).
        levels: integers of a clip norm.
        modulus_bits: integers travel and are added modulo 2^modulus_bits.
        private: False if there is no noise, or it is seeded, so that anybody can draw it too.
        relation: between neighbouring populations.
        versions: of what computed the account.
    """

    mode: str
    secure_aggregation: bool
    rounds: int
    enrolled_clients: int
    max_clients_per_site: int
    min_clients: int
    min_sites: int
    honest_fraction: float
    clip_norm: float
    noise_multiplier: float
    sampling_probability: float
    target_epsilon: float
    delta: float
    dimension: int
    levels: int
    modulus_bits: int
    private: bool
    relation: str
    versions: str

    @property
    def mechanism(self) -> type[Mechanism]:
        """Who adds which noise."""
        return MECHANISMS.get(self.mode)

    @property
    def denominator(self) -> float | None:
        """What a sum is divided by: a number known beforehand when clients are sampled, else None: those in it."""
        sampled = self.sampling_probability < 1
        return self.sampling_probability * self.enrolled_clients if sampled else None

    @property
    def sha256(self) -> str:
        """Hash over everything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def seen(self) -> dict[Adversary, Release]:
        """Return what a round shows to each adversary who sees anything of it."""
        return self.mechanism.seen(self)

    def epsilon_after(self, rounds: int) -> dict[Adversary, float]:
        """Return each adversary's epsilon after so many undisturbed rounds."""
        return {who: epsilon([release] * rounds, self.delta) for who, release in self.seen().items()}

    def mean_noise(self, clients: int) -> float:
        """Return the standard deviation of the noise on each coordinate of a mean over `clients` updates."""
        clients_variance = self.mechanism.client_variance(self) * clients
        variance = clients_variance + self.mechanism.server_variance(self)
        return math.sqrt(variance) * self.clip_norm / self.levels / clients


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
        "enrolled_clients": enrolled(config),
        "max_clients_per_site": most_clients_of_a_site(config),
    }
    if config.privacy.noise_multiplier == 0 and config.privacy.target_epsilon > 0:
        changes["noise_multiplier"] = _calibrated(config, dimension)
    return config.model_copy(update={"privacy": config.privacy.model_copy(update=changes)})


def enrolled(config: RunConfig) -> int:
    """Return how many clients may ever take part."""
    simulated = config.simulation.clients if config.simulation.data else 0
    return config.privacy.enrolled_clients or simulated or config.strategy.min_clients


def most_clients_of_a_site(config: RunConfig) -> int:
    """Return how many clients one site may stand for."""
    simulated = config.simulation.clients_per_site if config.simulation.data else 1
    return config.privacy.max_clients_per_site or simulated


def _calibrated(config: RunConfig, dimension: int) -> float:
    rounds, privacy = config.run.rounds, config.privacy

    def releases(noise_multiplier: float) -> list[Release]:
        changed = privacy.model_copy(update={"noise_multiplier": noise_multiplier})
        seen = _plan(config.model_copy(update={"privacy": changed}), dimension).seen()
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
        enrolled_clients=enrolled(config),
        max_clients_per_site=most_clients_of_a_site(config),
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
        modulus_bits=_modulus_bits(enrolled(config), privacy.noise_multiplier),
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
    problem = Problem("privacy.enrolled_clients", str(clients), "a sum that 56 bits hold", "use fewer clients")
    raise ConfigError("privacy plan", [problem])
