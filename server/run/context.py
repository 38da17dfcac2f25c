"""The round loop's dependencies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from tsugiki.common.audit import AuditLog
from tsugiki.common.config.run import RunConfig
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.wire.spec import AdapterSpec
from tsugiki.server.engines.grid import RunGrid, Stop
from tsugiki.server.run.anchors import RunLogs
from tsugiki.server.run.evaluate import Evaluator
from tsugiki.server.run.late import Late
from tsugiki.server.run.measuring import Pace
from tsugiki.server.run.privacy import Privacy
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.roster import Roster
from tsugiki.server.run.suspicion import Suspicion

WAIT_FOR_QUORUM_S = 3600.0
"""How long a run of real sites waits for a quorum by default."""


@dataclass(frozen=True)
class RunContext:
    """The round loop's dependencies; none of them is replaced while a run goes on.

    Args:
        config: of the run.
        spec: of the adapter.
        grid: sends messages and receives replies.
        roster: the connected sites.
        evaluate: returns the metrics of an adapter; None: the run has no evaluation data.
        lower_is_better: whether a smaller value of the monitored metric is better.
        folder: the run's.
        audit: the run's audit log.
        progress: shows the run to its operator.
        stop: set when the user asks to stop.
        privacy: the operator's part of a private run; None: updates are averaged as they are.
        pace: when the aggregation error is measured next. It changes in the course of a run.
        suspicion: which sites spoil sums under secure aggregation. It changes in the course of a run.
        late: the requests of closed rounds that may still be answered. It changes in the course of a run.
    """

    config: RunConfig
    spec: AdapterSpec
    grid: RunGrid
    roster: Roster
    evaluate: Evaluator | None
    lower_is_better: bool
    folder: Path
    audit: AuditLog
    progress: Progress = field(default_factory=Progress)
    stop: Stop = field(default_factory=Stop)
    privacy: Privacy | None = None
    pace: Pace = field(default_factory=Pace)
    suspicion: Suspicion = field(default_factory=Suspicion)
    late: Late = field(default_factory=Late)

    @cached_property
    def logs(self) -> RunLogs:
        """The run's logs, for the anchors in its checkpoints."""
        return RunLogs(self.folder, self.audit, self.privacy.ledger.path if self.privacy else None)

    @cached_property  # each request to each site has it
    def config_for_sites(self) -> str:
        """The settings that every request carries, as JSON."""
        return self.config.for_sites(self.privacy.plan if self.privacy else None)

    @property
    def secure_plan(self) -> Plan | None:
        """The plan of a run under secure aggregation; None: of any other run."""
        if self.privacy is None or not self.privacy.plan.secure_aggregation:
            return None
        return self.privacy.plan

    @property
    def withholds(self) -> bool:
        """Whether the cohort is secret, as the accounting of Poisson sampling requires."""
        return self.privacy is not None and self.privacy.plan.sampling_probability < 1

    @property
    def grace_s(self) -> float | Literal["auto"]:
        """How long a round stays open after its quorum; under Poisson sampling to its end, as the quorum says nothing.

        With the quorum a round would be over at once, and only the fastest sites of a random cohort would be in it.
        """
        if self.withholds:
            return math.inf
        return self.config.strategy.grace_s

    @property
    def round_timeout_s(self) -> float:
        """How long a round waits for replies at most."""
        seconds = self.config.strategy.round_timeout_s
        if seconds == "auto":
            return self.roster.silence.timeout_s()
        return seconds

    @property
    def takes_partial_updates(self) -> bool:
        """Whether a site that would be late sends what it has by then.

        Not in simulations, whose sites wait for each other, and not under privacy: what a client contributes, and what
        it costs, must not depend on how fast it is.
        """
        protected = self.privacy is not None or self.config.privacy.examples.enabled
        validates = self.config.train.validate_every_steps > 0  # such a round ends with its best step
        possible = not protected and not validates and not self.grid.simulated
        return possible and self.config.strategy.partial_updates

    @property
    def takes_late_updates(self) -> bool:
        """Whether an update that comes after its round has closed counts in the next one."""
        return self.config.strategy.late_updates == "next-round" and not self.grid.simulated

    @property
    def wait_for_quorum_s(self) -> float:
        """How long the run waits for sites to come back before it ends."""
        seconds = self.config.strategy.wait_for_quorum_s
        if seconds == "auto":
            return 0.0 if self.grid.simulated else WAIT_FOR_QUORUM_S
        return seconds

    @property
    def quorum(self) -> int:
        """The least number of clients of a valid round; 0 under Poisson sampling: a second draw would be biased."""
        if self.withholds:
            return 0
        return self.config.strategy.min_clients
