"""The plan of a private run: every number that its account depends on, frozen before the first round.

Every checkpoint contains it, and a run is resumed under the same plan only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Plan:
    """What a private run does. Symbols in brackets are those of docs/privacy.md.

    Args:
        mode: name of the mechanism.
        secure_aggregation: whether the server sees sums only.
        rounds: planned (T).
        enrolled_clients: who may ever take part (N).
        max_clients_per_site: the most clients that one site may have; a site that says more is refused.
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
    def denominator(self) -> float | None:
        """What a sum is divided by: a number known beforehand when clients are sampled, else None: those in it."""
        sampled = self.sampling_probability < 1
        return self.sampling_probability * self.enrolled_clients if sampled else None

    @property
    def sha256(self) -> str:
        """Hash over everything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
