"""What a site allows, whatever a run asks for: `[policy]` of site.toml, enforced before anything is trained.

A refusal is a code to the server and a line in the site's own audit log. Every limit is off by default but one: a model
is only loaded under a name that [models] has, which `client/site/site.py` sees to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import Code, PolicyError
from tsugiki.common.privacy.mechanisms import releases_of
from tsugiki.common.settings import Names, Section

if TYPE_CHECKING:
    from tsugiki.common.privacy.plan import Plan
    from tsugiki.common.privacy.settings import PrivacySection

ALL = "*"


class SitePolicy(Section):
    """What this site takes part in, and what may leave it besides the update."""

    tasks: Names = Field(default=(ALL,), description='tasks to take part in; "*": any')
    adapters: Names = Field(default=(ALL,), description='adapter methods; "*": any')
    base_fingerprints: Names = Field(
        default=(ALL,), description='SHA-256 of base models, or the first 12 digits or more; "*": any'
    )
    max_rounds: int = Field(default=0, ge=0, description="most rounds of a run; 0: any")
    max_local_steps: int = Field(default=0, ge=0, description="most optimiser steps in a round; 0: any")
    metrics: Names = Field(
        default=(ALL,), description='"loss" of training and metrics of evaluation that may leave; "*": all'
    )
    privacy_modes: Names = Field(
        default=(ALL,), description='of "none", "central", "local", "distributed"; "*": any, also none'
    )
    secure_aggregation: bool = Field(default=False, description="take part only if the server sees no single update")
    min_sites: int = Field(
        default=2, ge=2, le=255, description="least number of sites in a sum that is opened, under secure aggregation"
    )
    min_noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        description="least noise over the clip norm; in mode distributed without secure aggregation, on each upload",
    )
    max_epsilon: float = Field(
        default=0.0, ge=0, description="most epsilon of this site over its whole life, by its own ledger; 0: any"
    )
    max_row_epsilon: float = Field(
        default=0.0, ge=0, description="most epsilon of a row of this site, by DP-SGD, over its whole life; 0: any"
    )
    seeded_noise: bool = Field(default=False, description="tests only: take part in runs whose noise hides nothing")
    delta: float = Field(
        default=1e-5, gt=0, lt=1, description="of max_epsilon and max_row_epsilon, whatever a run says"
    )

    def check_run(self, config: RunConfig, round_: int = 0) -> None:
        """Do nothing if a run is allowed.

        Args:
            config: the run as the server tells it.
            round_: the round at hand; a server may ask for more than it announced.

        Raises:
            PolicyError: `policy-task`, `policy-adapter` or `policy-rounds`.
        """
        _allow(config.task.name, self.tasks, "tasks", "policy-task")
        _allow(config.adapter.method, self.adapters, "adapters", "policy-adapter")
        rounds = max(config.run.rounds, round_)
        if self.max_rounds and rounds > self.max_rounds:
            raise _refusal(f"{rounds} rounds", f"at most policy.max_rounds = {self.max_rounds}", "policy-rounds")

    def check_base(self, fingerprint: str) -> None:
        """Do nothing if a base model is allowed.

        Raises:
            PolicyError: `policy-base`.
        """
        known = any(one == ALL or (len(one) >= 12 and fingerprint.startswith(one)) for one in self.base_fingerprints)
        if not known:
            raise _refusal(f"the base model {fingerprint[:12]}", "one of policy.base_fingerprints", "policy-base")

    def check_steps(self, steps: int) -> None:
        """Do nothing if so many steps in a round are allowed.

        Raises:
            PolicyError: `policy-steps`.
        """
        if self.max_local_steps and steps > self.max_local_steps:
            raise _refusal(
                f"{steps} steps in a round", f"at most policy.max_local_steps = {self.max_local_steps}", "policy-steps"
            )

    def check_privacy(self, plan: Plan | None, settings: PrivacySection) -> None:
        """Do nothing if a run protects this site as its policy demands. The budgets are `client/site/ledger.py`'s.

        Args:
            plan: of the run, made here; None for a run without privacy.
            settings: of the run.

        Raises:
            PolicyError: `policy-seeded-noise`, `policy-privacy-mode`, `policy-secure-aggregation`, `policy-sites`,
                `policy-noise`, `policy-epsilon`, or `policy-row-epsilon`.
        """
        if settings.insecure_noise_seed and not self.seeded_noise:
            raise _refusal("noise from a seed", "noise that nobody can foretell", "policy-seeded-noise")
        mode = plan.mode if plan else "none"
        _allow(mode, self.privacy_modes, "privacy_modes", "policy-privacy-mode")
        if self.secure_aggregation and not (plan and plan.secure_aggregation):
            raise _refusal("no secure aggregation", "secure aggregation", "policy-secure-aggregation")
        if plan and plan.secure_aggregation and plan.min_sites < self.min_sites:
            least = f"at least policy.min_sites = {self.min_sites}"
            raise _refusal(f"sums of {plan.min_sites} sites", least, "policy-sites")
        noise = guaranteed_noise(plan) if plan else 0.0
        if noise < self.min_noise_multiplier:
            least = f"at least policy.min_noise_multiplier = {self.min_noise_multiplier:g}"
            raise _refusal(f"a noise multiplier of {noise:.4g}", least, "policy-noise")
        if self.max_epsilon and not (plan and plan.private):
            raise _refusal("no noise that hides anything", "a private run: policy.max_epsilon is set", "policy-epsilon")
        if self.max_row_epsilon and (not settings.examples.enabled or settings.insecure_noise_seed):
            raise _refusal(
                "no DP-SGD that hides anything",
                "[privacy.examples]: policy.max_row_epsilon is set",
                "policy-row-epsilon",
            )

    def check_evaluation(self, settings: PrivacySection) -> None:
        """Do nothing if metrics of this site's rows may be asked for.

        Raises:
            PolicyError: `policy-evaluation`, the run is private: no noise is on metrics, and no account of them.
        """
        if settings.mode != "none" or settings.examples.enabled:
            raise _refusal("metrics of private rows", "none in a private run", "policy-evaluation")

    def may_leave(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that this site shares."""
        return {name: value for name, value in metrics.items() if ALL in self.metrics or name in self.metrics}


def guaranteed_noise(plan: Plan) -> float:
    """Return the noise multiplier that a site may count on, as far as it can see itself.

    In mode `distributed` the noise on the sum is there only if enough clients are. Under secure aggregation this site
    sees to that before it unmasks; without it, nothing but the site's own share is sure.
    """
    if not plan.private:
        return 0.0
    if plan.mode == "distributed" and not plan.secure_aggregation:
        return releases_of(plan)["uploads"].noise_multiplier
    return plan.noise_multiplier


def _allow(name: str, allowed: tuple[str, ...], setting: str, code: Code) -> None:
    if ALL not in allowed and name not in allowed:
        raise _refusal(
            f"{setting.rstrip('s').replace('_', ' ')} {name}",
            f"one of policy.{setting} ({', '.join(allowed) or 'which is empty'})",
            code,
        )


def _refusal(what: str, expected: str, code: Code) -> PolicyError:
    return PolicyError(f"the run asks for {what}", expected, "change [policy] in site.toml, if you agree", code=code)
