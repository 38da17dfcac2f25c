"""The settings of `[privacy]` and of `[privacy.examples]`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tsugiki.common.settings import Section


def _from_json(value: Any) -> Any:
    """Flower's run config carries a table as text."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


class ExamplePrivacySection(Section):
    """DP-SGD at each site: protects one row of a site, with an account of its own. See docs/privacy.md."""

    target_epsilon: float = Field(
        default=0.0, ge=0, le=1000, description="spent on a site's rows over the whole run; above 0 switches it on"
    )
    noise_multiplier: float = Field(
        default=0.0, ge=0, le=1000, description="noise over max_grad_norm; 0: found from target_epsilon"
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="should be below 1 over a site's number of rows")
    max_grad_norm: float = Field(default=1.0, gt=0, description="each row's gradient is clipped to this norm")

    @property
    def enabled(self) -> bool:
        """Whether rows are protected."""
        return self.target_epsilon > 0 or self.noise_multiplier > 0


class PrivacySection(Section):
    """What is done to updates before they leave a site, or before a model is released."""

    mode: Literal["none", "central", "local", "distributed"] = Field(
        default="none",
        description="none; central: the server adds the noise; local: each client adds all of it to its own update; "
        "distributed: each client adds a share",
    )
    clip_norm: float = Field(default=1.0, gt=0, le=1e6, description="updates are scaled down to at most this L2 norm")
    target_epsilon: float = Field(
        default=0.0, ge=0, le=1e4, description="the budget: the run stops before it is exceeded; 0: none"
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="has to be below 1 / enrolled_clients")
    noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1e4,
        description="standard deviation of the noise on the sum, over clip_norm; 0: found from target_epsilon",
    )
    honest_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="distributed: the share of the clients in a sum that really add their noise and keep it to "
        "themselves; the others are made up for",
    )
    secure_aggregation: bool = Field(
        default=False, description="distributed: the server learns the sum of the updates only, not one of them"
    )
    sampling: Literal["fixed", "poisson"] = Field(
        default="fixed",
        description="poisson, in mode central: every enrolled client is asked with probability fraction_train, which "
        "is to be kept secret, and the account counts on it",
    )
    enrolled_clients: int = Field(
        default=0,
        ge=0,
        le=10**7,
        description="clients that may ever take part, no further ones; 0: min_clients; in a simulation its clients",
    )
    min_sites: int = Field(
        default=2,
        ge=2,
        le=255,
        description="secure aggregation: the least number of sites in a sum that is opened, beside min_clients",
    )
    max_clients_per_site: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="clients that one site may stand for, as a gateway; 0: 1; in a simulation its clients_per_site",
    )
    ledger: str = Field(
        default="",
        description="file with what was spent on these clients, continued by later runs; empty: privacy-ledger.jsonl "
        "in run.output_dir, in a simulation in the run's own folder",
    )
    insecure_noise_seed: int = Field(
        default=0, ge=0, description="tests only: noise from this seed, and the run is marked as not private; 0: never"
    )
    examples: Annotated[ExamplePrivacySection, BeforeValidator(_from_json)] = Field(
        default=ExamplePrivacySection(), description="DP-SGD at each site; protects rows, not clients"
    )
