"""The limits that a site sets to all runs: `[policy]` of site.toml, enforced before anything is trained.

The server receives a refusal as a code, and the site's own audit log has a line for it. Every limit is off by default
but one: a model is loaded only if `[models]` names it, which `client/site/site.py` enforces.
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

    tasks: Names = Field(default=(ALL,), description='Tasks that this site takes part in, as ["causal-lm"]. "*": any.')
    adapters: Names = Field(default=(ALL,), description='Adapter methods that this site trains, as ["lora"]. "*": any.')
    base_fingerprints: Names = Field(
        default=(ALL,),
        description="SHA-256 of the base models that this site trains, or the first 12 digits or more; `tsugiki site "
        'check` prints them. Set it if only weights that you have examined may be used. "*": any.',
    )
    max_rounds: int = Field(default=0, ge=0, description="Most rounds of a run. 0: any number.")
    max_local_steps: int = Field(
        default=0,
        ge=0,
        description="Most optimizer steps in a round. Set it to limit how long a round may occupy this machine. 0: "
        "any number.",
    )
    metrics: Names = Field(
        default=(ALL,),
        description='Metrics that may leave this site besides the update: "loss" of training, and those of '
        'evaluation, as "accuracy". Set [] to share none. "*": all.',
    )
    privacy_modes: Names = Field(
        default=(ALL,),
        description='Privacy modes that this site accepts, of "none", "central", "local" and "distributed". Leave '
        '"none" out to refuse runs without privacy. "*": any.',
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Take part only if the server sees no single update. Set it if you do not trust the server with "
        "this site's update.",
    )
    min_sites: int = Field(
        default=2,
        ge=2,
        le=255,
        description="Least number of sites in a sum that is opened, under secure aggregation. Raise it if some sites "
        "may help the server.",
    )
    min_noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        description='Least noise over the clip norm; in mode "distributed" without secure aggregation, the noise on '
        "this site's own update counts. Raise it to refuse runs with too little noise.",
    )
    max_epsilon: float = Field(
        default=0.0,
        ge=0,
        description="Most epsilon of this site over its whole life, by its own ledger. Set it to limit what all runs "
        "together can tell about this site. 0: no limit.",
    )
    head_sums: bool = Field(
        default=True,
        description="Send sums of the base's features over this site's rows, once before a run's first round, from "
        "which the server computes a first head. They tell how many rows of each class this site has, and about a "
        "class with a single row, its features. Set false to keep them: the site then takes part without.",
    )
    max_row_epsilon: float = Field(
        default=0.0,
        ge=0,
        description="Most epsilon of one row of this site over its whole life, by its own ledger. Set it if single "
        "rows need protection: runs without DP-SGD are then refused. 0: no limit.",
    )
    delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Delta at which max_epsilon and max_row_epsilon are counted, whatever a run says. Set it below 1 "
        "over this site's number of rows if max_row_epsilon is used.",
    )
    seeded_noise: bool = Field(
        default=False, description="For tests only: take part in runs whose noise comes from a seed and hides nothing."
    )

    def check_run(self, config: RunConfig, round_number: int = 0) -> None:
        """Check that a run is allowed.

        Args:
            config: the run, as the server sent it.
            round_number: the current round; a server may ask for more rounds than it announced.

        Raises:
            PolicyError: `policy-task`, `policy-adapter` or `policy-rounds`.
        """
        _allow(config.task.name, self.tasks, "tasks", "policy-task")
        _allow(config.adapter.method, self.adapters, "adapters", "policy-adapter")
        rounds = max(config.run.rounds, round_number)
        if self.max_rounds and rounds > self.max_rounds:
            raise _refusal(f"{rounds} rounds", f"at most policy.max_rounds = {self.max_rounds}", "policy-rounds")

    def check_base(self, fingerprint: str) -> None:
        """Check that a base model is allowed.

        Raises:
            PolicyError: `policy-base`.
        """
        known = any(one == ALL or (len(one) >= 12 and fingerprint.startswith(one)) for one in self.base_fingerprints)
        if not known:
            raise _refusal(f"the base model {fingerprint[:12]}", "one of policy.base_fingerprints", "policy-base")

    def check_steps(self, steps: int) -> None:
        """Check that this number of steps in a round is allowed.

        Raises:
            PolicyError: `policy-steps`.
        """
        if self.max_local_steps and steps > self.max_local_steps:
            raise _refusal(
                f"{steps} steps in a round", f"at most policy.max_local_steps = {self.max_local_steps}", "policy-steps"
            )

    def check_privacy(self, plan: Plan | None, settings: PrivacySection) -> None:
        """Check that a run protects this site as its policy demands. `client/site/ledger.py` enforces the budgets.

        Args:
            plan: of the run, made at this site; None for a run without privacy.
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
        """Check that metrics of this site's rows may be measured.

        Raises:
            PolicyError: `policy-evaluation`, the run is private: metrics have no noise, and no ledger counts them.
        """
        if settings.mode != "none" or settings.examples.enabled:
            raise _refusal("metrics of private rows", "none in a private run", "policy-evaluation")

    def check_head_sums(self, settings: PrivacySection) -> None:
        """Check that sums of this site's features may leave.

        Raises:
            PolicyError: `policy-head-sums`, the site keeps them, or the run is private: they have no noise, and no
                ledger counts them.
        """
        if not self.head_sums:
            raise _refusal("sums of features", "none: policy.head_sums is false", "policy-head-sums")
        if settings.mode != "none" or settings.examples.enabled:
            raise _refusal("sums of features of private rows", "none in a private run", "policy-head-sums")

    def may_leave(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that this site shares."""
        return {name: value for name, value in metrics.items() if ALL in self.metrics or name in self.metrics}


def guaranteed_noise(plan: Plan) -> float:
    """Return the noise multiplier that a site can rely on without trusting the server.

    In mode `distributed`, the sum has its full noise only if enough clients are in it. Under secure aggregation, this
    site checks that before it unmasks; the noise that another site of the sum knows does not count. Without secure
    aggregation, only the site's own share of the noise is certain.
    """
    if not plan.private:
        return 0.0
    if plan.mode == "distributed" and not plan.secure_aggregation:
        return releases_of(plan)["uploads"].noise_multiplier
    return releases_of(plan)["release"].noise_multiplier


def _allow(name: str, allowed: tuple[str, ...], setting: str, code: Code) -> None:
    if ALL not in allowed and name not in allowed:
        raise _refusal(
            f"{setting.rstrip('s').replace('_', ' ')} {name}",
            f"one of policy.{setting} ({', '.join(allowed) or 'which is empty'})",
            code,
        )


def _refusal(problem: str, expected: str, code: Code) -> PolicyError:
    return PolicyError(f"the run asks for {problem}", expected, "change [policy] in site.toml, if you agree", code=code)
