"""The plan of a private run: every number that its account depends on, frozen before the first round.

Every checkpoint contains it, and a run can be resumed only under the same plan, but for its rounds and `min_clients`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Plan:
    """The numbers of a private run. Symbols in brackets are those of docs/privacy.md.

    Args:
        mode: name of the mechanism.
        secure_aggregation: whether the server sees sums only.
        rounds: number of planned rounds (T).
        enrolled_clients: number of clients that may ever take part (N).
        max_clients_per_site: the most clients that one site may have; a site that reports more is refused. In mode
            distributed, a site knows the noise of so many clients.
        min_clients: the least number of clients in a sum (n_min).
        min_sites: under secure aggregation, the least number of sites that these clients are at.
        honest_fraction: share of the clients in a sum that add their noise and keep it to themselves (h).
        clip_norm: L2 bound of an update (C).
        noise_multiplier: standard deviation of the noise on the sum, over clip_norm (z); 0: none.
        sampling_probability: probability of each client to be in a round (q); 1: no amplification is claimed.
        target_epsilon: the budget; 0: none.
        delta: the delta of every epsilon.
        dimension: number of coordinates of an update (d).
        levels: number of integer levels in a clip norm.
        modulus_bits: integers travel and are added modulo 2^modulus_bits.
        account: version of the rules by which the releases follow from this plan.
        private: False if there is no noise, or it is seeded, so that anybody can draw it too.
        relation: the relation between neighbouring populations.
        versions: the versions of the packages that compute the account.
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
    account: int
    private: bool
    relation: str
    versions: str

    @property
    def denominator(self) -> float | None:
        """The number that a sum is divided by if clients are sampled; None: the number of clients in the sum."""
        sampled = self.sampling_probability < 1
        return self.sampling_probability * self.enrolled_clients if sampled else None

    @property
    def sha256(self) -> str:
        """Hash over everything above."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
