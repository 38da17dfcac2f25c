"""What a site allows, whatever a run asks for: `[policy]` of site.toml, enforced before anything is trained.

A refusal is a code to the server and a line in the site's own audit log. Every limit is off by default but one: a model
is only loaded under a name that [models] has, which `client.site` sees to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from common.config import RunConfig
from common.errors import PolicyError
from common.settings import Names, Section

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

    def may_leave(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that this site shares."""
        return {name: value for name, value in metrics.items() if ALL in self.metrics or name in self.metrics}


def _allow(name: str, allowed: tuple[str, ...], setting: str, code: str) -> None:
    if ALL not in allowed and name not in allowed:
        raise _refusal(
            f"{setting.rstrip('s')} {name}", f"one of policy.{setting}: {', '.join(allowed) or 'none'}", code
        )


def _refusal(what: str, expected: str, code: str) -> PolicyError:
    return PolicyError(f"the run asks for {what}", expected, "if you agree, change [policy] in site.toml", code=code)
