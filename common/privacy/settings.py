"""The settings of `[privacy]` and of `[privacy.examples]`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tsugiki.common.settings import Section


def _from_json(value: Any) -> Any:
    """Parse a table that comes as text, as in Flower's run config."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


class ExamplePrivacySection(Section):
    """DP-SGD at each site: protects one row of a site, with an account of its own. See docs/privacy.md."""

    target_epsilon: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Privacy budget of a site's rows over the whole run; above 0 it switches DP-SGD on. Set it if "
        "single rows need protection. 0: see noise_multiplier.",
    )
    noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Noise on the sum of a batch's gradients, over max_grad_norm; above 0 it also switches DP-SGD "
        "on. Set it if you know the noise you want. 0: found from target_epsilon.",
    )
    delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Probability with which the guarantee may fail. Set it below 1 over a site's number of rows.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="Each row's gradient is clipped to this L2 norm. Noise grows with it: set it near the typical "
        "norm of a row's gradient.",
    )

    @property
    def enabled(self) -> bool:
        """Whether rows are protected."""
        return self.target_epsilon > 0 or self.noise_multiplier > 0


class PrivacySection(Section):
    """What is done to updates before they leave a site, or before a model is released."""

    mode: Literal["none", "central", "local", "distributed"] = Field(
        default="none",
        description='"none": clients are not protected; "central": the server adds the noise; "distributed": each '
        'client adds a share; "local": each client adds all of it to its own update. Use "central" if '
        'the clients trust the server, "distributed" with secure_aggregation if they do not. "local" '
        "needs no trust, and so much noise that few models learn anything.",
    )
    clip_norm: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="Updates are scaled down to at most this L2 norm. Noise grows with it: set it near the typical "
        "norm of an update.",
    )
    target_epsilon: float = Field(
        default=0.0,
        ge=0,
        le=1e4,
        description="Privacy budget of a client; the run stops before it exceeds it. `tsugiki budget FILE` shows "
        "what a budget costs. 0: no budget.",
    )
    delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Probability with which the guarantee may fail. It must be below 1 / enrolled_clients; a tenth "
        "of that is common.",
    )
    noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1e4,
        description="Standard deviation of the noise on the sum of the updates, over clip_norm. Set it if you know "
        "the noise you want. 0: found from target_epsilon.",
    )
    honest_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description='Mode "distributed": share of the clients in a sum that really add their noise and keep it to '
        "themselves. Lower it if some clients may cheat or help the server; the others then add more "
        "noise. That a site knows its own noise is counted besides.",
    )
    secure_aggregation: bool = Field(
        default=False,
        description='Mode "distributed": the server learns the sum of the updates, and no single update. Set it if '
        "sites do not trust the server with their updates.",
    )
    sampling: Literal["fixed", "poisson"] = Field(
        default="fixed",
        description='"poisson", in mode "central": every enrolled client is asked with probability fraction_train, '
        "and the account counts on it. Use it to get by with less noise, if you can keep secret who was "
        "asked.",
    )
    enrolled_clients: int = Field(
        default=0,
        ge=0,
        le=10**7,
        description="Number of clients that may ever take part; no others can join later. Set it to the whole "
        "population if not all of them take part in each round. 0: strategy.min_clients, or "
        "simulation.clients in a simulation.",
    )
    min_sites: int = Field(
        default=2,
        ge=2,
        le=255,
        description="Secure aggregation: least number of sites in a sum that is opened, beside strategy.min_clients. "
        "Raise it if some sites may help the server.",
    )
    max_clients_per_site: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="Most clients that one site may stand for. Set it if sites are gateways. In mode "
        '"distributed", a site knows the noise of its own clients, so that the others need more. 0: 1, or '
        "simulation.clients_per_site in a simulation.",
    )
    ledger: str = Field(
        default="",
        description="File with the privacy account of these clients, which later runs continue. Name it if runs with "
        "different output folders share clients. Empty: privacy-ledger.jsonl in run.output_dir, or in "
        "the run's own folder in a simulation.",
    )
    insecure_noise_seed: int = Field(
        default=0,
        ge=0,
        description="For tests only: draw the noise from this seed; the run is marked as not private. 0: never.",
    )
    examples: Annotated[ExamplePrivacySection, BeforeValidator(_from_json)] = Field(
        default=ExamplePrivacySection(), description="DP-SGD at each site, which protects rows instead of clients."
    )
