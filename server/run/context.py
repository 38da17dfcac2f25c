"""What the round loop works with, and what comes back in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tsugiki.common.audit import AuditLog
from tsugiki.common.config.run import RunConfig
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.wire.spec import AdapterSpec
from tsugiki.server.engines.grid import RunGrid, Stop
from tsugiki.server.run.evaluate import Evaluator
from tsugiki.server.run.privacy import Privacy
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.replies import Accepted, AcceptedSum, Rejected
from tsugiki.server.run.roster import Roster


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

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

    @property
    def withholds(self) -> bool:
        """Whether it is a secret who is asked: Poisson sampling, on which the account counts."""
        return self.privacy is not None and self.privacy.plan.sampling_probability < 1

    @property
    def quorum(self) -> int:
        """How many clients a round takes. None where they are sampled: to draw again would favour who was drawn."""
        return 0 if self.withholds else self.config.strategy.min_clients


@dataclass(frozen=True)
class Collected:
    """What came back in one attempt at a round, by site name; `total` is the sum that secure aggregation opened."""

    accepted: Sequence[Accepted | AcceptedSum]
    rejected: Sequence[Rejected]
    bytes_down: int
    bytes_up: int
    wait_s: float
    total: Levels | None = None

    @property
    def clients(self) -> int:
        """How many clients are in it."""
        return sum(reply.clients for reply in self.accepted)
