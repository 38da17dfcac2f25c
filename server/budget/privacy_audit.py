"""Audit the privacy of a run by attack: simulate it with planted canaries, and compare what is found with the claims.

The run is simulated as its file says, with the program's own clipping, noise, masks, sums and account, again and again
until there are enough canaries. The same is done without noise, as a control: what the attack finds there is the most
that it could find at all.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tsugiki.common.config.files import with_absolute_paths
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, Problem, TsugikiError
from tsugiki.common.files import make_folder, to_json, write_atomically
from tsugiki.common.privacy.canaries import Auditor
from tsugiki.common.privacy.mechanisms import ADVERSARIES, Adversary
from tsugiki.common.rng import generator
from tsugiki.common.settings import StrategySettings
from tsugiki.server.budget.attacker import Attacker, pooled
from tsugiki.server.budget.lower_bounds import Bounds, Trials, lower_bounds
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.federation import Outcome, run_federation
from tsugiki.server.run.progress import Progress, Record
from tsugiki.server.run.storage import AUDIT_FILE

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

CONFIDENCE = 0.99
"""Of each bound: at most one in 100 is above the true epsilon."""

CONTROL_NOISE = 1e-3
"""Noise multiplier of the control: too little to hide a canary. Most modes refuse 0."""

_PAUSE_S = 10.0  # between two lines of progress


class AuditedApp(Protocol):
    """Makes the ClientApp of simulated sites with canaries among their clients; the command line passes it."""

    def __call__(self, config: RunConfig, auditor: Auditor, /) -> tuple[ClientApp, int]:
        """Return the ClientApp and its number of nodes."""


@dataclass(frozen=True)
class LedgerAudit:
    """What was found about one ledger.

    Args:
        adversary: whose ledger.
        claimed: its epsilon after the run; None: it claims nothing.
        found: lower bounds on the true epsilon.
        control: the same without noise.
    """

    adversary: Adversary
    claimed: float | None
    found: Bounds
    control: Bounds

    @property
    def holds(self) -> bool:
        """Whether the claim is not refuted."""
        return self.claimed is None or self.found.largest <= self.claimed

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        bounds = {
            name: {"clopper_pearson": one.threshold, "one_run": one.guesses, "largest": one.largest}
            for name, one in (("found", self.found), ("control", self.control))
        }
        return {"adversary": self.adversary, "claimed": self.claimed, **bounds, "holds": self.holds}


@dataclass(frozen=True)
class PrivacyAudit:
    """The result of an audit.

    Args:
        name: of the run.
        mode: of its privacy.
        plan_sha256: hash of the plan that was audited.
        delta: of all epsilons.
        confidence: of each bound.
        rounds: of each simulated run.
        runs: number of simulated runs with noise, and of as many without.
        trials: number of canaries in all runs with noise.
        seed: of the auditor's coins.
        ledgers: what was found.
    """

    name: str
    mode: str
    plan_sha256: str
    delta: float
    confidence: float
    rounds: int
    runs: int
    trials: int
    seed: int
    ledgers: tuple[LedgerAudit, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self) | {"ledgers": [ledger.as_json() for ledger in self.ledgers]}


def audit_privacy(
    config: RunConfig,
    client: AuditedApp,
    trials: int,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
    stop: Stop | None = None,
) -> PrivacyAudit:
    """Return what an attacker finds about the clients of a run, beside what the run's ledgers claim.

    Args:
        config: of the run.
        client: makes the ClientApp of the simulated sites.
        trials: the least number of canaries, over all runs.
        seed: of the auditor's coins and directions. Privacy noise is never seeded.
        note: called with lines of progress.
        stop: set to end the audit at the next chance.

    Raises:
        ConfigError: the run has no privacy to audit, or no data to simulate it with.
        TsugikiError: a simulated run cannot start or go on.
    """
    check_auditable(config)
    stop = stop or Stop()
    clock = _Clock(note, config.run.rounds)
    with tempfile.TemporaryDirectory() as folder:
        noisy = _Series(_simulated(config, folder), client, seed, clock, stop)
        control = _Series(_simulated(config, folder, CONTROL_NOISE), client, seed, clock, stop)
        first = noisy.run()
        clock.expect(2 * math.ceil(trials / first))
        while noisy.trials < trials:
            noisy.run()
        while len(control.found) < len(noisy.found):
            control.run()
    summary = noisy.summary
    return PrivacyAudit(
        name=config.run.name,
        mode=config.privacy.mode,
        plan_sha256=summary["privacy"]["plan_sha256"],
        delta=config.privacy.delta,
        confidence=CONFIDENCE,
        rounds=summary["rounds"],
        runs=len(noisy.found),
        trials=noisy.trials,
        seed=seed,
        ledgers=tuple(
            _judge(adversary, claimed, noisy, control, config.privacy.delta, seed)
            for adversary, claimed in _claims(summary["privacy"]["epsilon"]).items()
        ),
    )


def check_auditable(config: RunConfig) -> None:
    """Check that a run claims privacy of clients, and can be simulated.

    Raises:
        ConfigError: with every problem.
    """
    privacy = config.privacy
    found = []
    if privacy.mode == "none":
        wanted = '"central", "local" or "distributed": the audit attacks clients, not rows under [privacy.examples]'
        found.append(Problem("privacy.mode", "'none'", wanted, "`tsugiki budget FILE`, which plans one"))
    elif privacy.noise_multiplier == 0 and privacy.target_epsilon == 0:
        wanted = "above 0, or privacy.noise_multiplier above 0: without noise there is no claim to audit"
        found.append(Problem("privacy.target_epsilon", "0.0", wanted, "`tsugiki budget FILE`, which plans one"))
    if privacy.insecure_noise_seed:
        wanted = "0: seeded noise hides nothing"
        found.append(Problem("privacy.insecure_noise_seed", str(privacy.insecure_noise_seed), wanted, "remove it"))
    if not config.simulation.data:
        wanted = "the file whose rows are split over simulated clients: an audit is a simulation"
        found.append(Problem("simulation.data", "''", wanted, "name it"))
    if found:
        raise ConfigError("privacy audit", found)


def write_audit(audit: PrivacyAudit, folder: Path) -> Path:
    """Write an audit into a run's folder, which may not be there yet; return the file.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_folder(folder, parents=True)
    path = folder / AUDIT_FILE
    write_atomically(path, to_json(audit.as_json(), indent=1).encode())
    return path


def check_claims(audit: PrivacyAudit) -> None:
    """Check that nothing was found that a ledger rules out.

    Raises:
        TsugikiError: `claim-broken`.
    """
    for ledger in audit.ledgers:
        if not ledger.holds:
            raise TsugikiError(
                f"epsilon is at least {ledger.found.largest:.3g} for {ADVERSARIES[ledger.adversary]}, with "
                f"{audit.confidence:.0%} confidence",
                f"at most {ledger.claimed:.3g}, as its ledger claims",
                "the same with another --seed; if that finds as much, release nothing and report it (SECURITY.md)",
                code="claim-broken",
            )


class _Series:
    """Simulated runs with the same settings, and what the attacker found in each.

    Args:
        config: of each run.
        client: makes the ClientApp.
        seed: of the auditor.
        clock: shows the time left.
        stop: ends a run at the next chance.
    """

    def __init__(self, config: RunConfig, client: AuditedApp, seed: int, clock: _Clock, stop: Stop) -> None:
        self._config = config
        self._client = client
        self._seed = seed
        self._clock = clock
        self._stop = stop
        self.found: list[Mapping[Adversary, Trials]] = []
        self.summary: dict[str, Any] = {}

    @property
    def trials(self) -> int:
        """The number of canaries in all runs so far."""
        return sum(len(run["release"].scores) for run in self.found)

    def run(self) -> int:
        """Simulate one more run; return its number of canaries."""
        # The control has the same canaries and coins as the runs with noise.
        attacker = Attacker(generator(self._seed, "canaries", len(self.found)))
        app, nodes = self._client(self._config, attacker)
        outcome: Outcome = run_federation(
            InProcessGrid(app, nodes), self._config, progress=self._clock, stop=self._stop, simulated=True
        )
        shutil.rmtree(outcome.folder)  # the next run has the same settings, so that the rows are read and split once
        self._clock.run_ends()
        self.summary = outcome.summary
        self.found.append(attacker.trials(outcome.state.vector))
        return len(self.found[-1]["release"].scores)


def _simulated(config: RunConfig, folder: str, noise_multiplier: float | None = None) -> RunConfig:
    """Return the run as it is audited, in another folder, with its own noise or another.

    It is not evaluated, has a ledger of its own, and its strategy is the plain mean: what others do with the mean
    costs nothing, and can only tell less.
    """
    kept = set(StrategySettings.model_fields) - {"name"}
    strategy = {"name": "fedavg", **config.strategy.model_dump(mode="json", include=kept)}
    changes: dict[str, Any] = {
        "run.output_dir": folder,
        "strategy": strategy,
        "evaluation": {"batch_size": config.evaluation.batch_size},
        "privacy.ledger": "",
        "simulation.engine": "in-process",
    }
    if noise_multiplier is not None:
        changes |= {"privacy.noise_multiplier": noise_multiplier, "privacy.target_epsilon": 0.0}
    return changed(with_absolute_paths(config), changes)


def _claims(epsilons: Mapping[str, float | None]) -> dict[Adversary, float | None]:
    """Return the claims about clients, in the order of `ADVERSARIES`."""
    return {adversary: epsilons[adversary] for adversary in ADVERSARIES if adversary in epsilons}


def _judge(
    adversary: Adversary, claimed: float | None, noisy: _Series, control: _Series, delta: float, seed: int
) -> LedgerAudit:
    """Return what was found about a ledger."""
    found, without = (
        lower_bounds(pooled(series.found, adversary), delta, CONFIDENCE, generator(seed, "halves"))
        for series in (noisy, control)
    )
    return LedgerAudit(adversary, claimed, found, without)


class _Clock(Progress):
    """Writes every few seconds how far the audit is, and how long the rest will take.

    Args:
        note: called with each line.
        rounds: of each run.
    """

    def __init__(self, note: Callable[[str], None], rounds: int) -> None:
        self._note = note
        self._rounds = rounds
        self._started = time.monotonic()
        self._shown = self._started
        self._runs = 0
        self._done = 0

    def expect(self, runs: int) -> None:
        """Learn the number of all runs, which is known after the first."""
        self._runs = runs

    def run_ends(self) -> None:
        """Count a run."""
        self._done += 1

    def round_ends(self, record: Record) -> None:
        """Write a line, unless the last one is only seconds old."""
        now = time.monotonic()
        if now - self._shown < _PAUSE_S:
            return
        self._shown = now
        line = f"run {self._done + 1}, round {record['round']} of {self._rounds}"
        share = (self._done + record["round"] / self._rounds) / max(self._runs, 1)
        if self._runs and share > 0:
            left_s = (now - self._started) * (1 - share) / share
            line = f"run {self._done + 1} of {self._runs}, round {record['round']} of {self._rounds}, {_left(left_s)}"
        self._note(line)


def _left(seconds: float) -> str:
    """Return in words how long it will take."""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left"
