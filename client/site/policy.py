"""The limits that a site sets to all runs: `[policy]` of site.toml, enforced before anything is trained.

The server receives a refusal as a code, and the site's own audit log has a line for it. Every limit is off by default
but two: a model is loaded only if `[models]` names it, which `client/site/site.py` enforces, and a day has at most
`max_settings_per_day` different settings. What is counted over all runs is counted in the site's own audit log
(`client/site/records.py`), because a run's name and the numbers of its rounds are the server's words.

Each description says whom a key binds. It binds the *server* if the client enforces it whatever the server sends. It
binds an *honest server* if the client has to believe the server about it. No key binds a user of the site's own machine
who can write `site.toml` and the site's logs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import Code, PolicyError, WireCode
from tsugiki.common.keys import FINGERPRINT_PATTERN
from tsugiki.common.privacy.mechanisms import ADVERSARIES, Adversary, releases_of
from tsugiki.common.privacy.secagg.counts import check_sum, counted_on
from tsugiki.common.settings import NAME_PATTERN, Names, Section

if TYPE_CHECKING:
    from tsugiki.common.privacy.plan import Plan
    from tsugiki.common.privacy.settings import PrivacySection

ALL = "*"

TELLABLE = ("rows", "notes", "metrics")
"""The kinds of facts about its rows that a site may tell, besides updates and sums."""


class SitePolicy(Section):
    """What this site takes part in, and what may leave it besides the update."""

    tasks: Names = Field(
        default=(ALL,),
        description='Tasks that this site takes part in, as ["causal-lm"]. "*": any. Binds the server.',
    )
    adapters: Names = Field(
        default=(ALL,),
        description='Adapter methods that this site trains, as ["lora"]. "*": any. Binds the server.',
    )
    base_fingerprints: Names = Field(
        default=(ALL,),
        description="SHA-256 of the base models that this site trains, or the first 12 digits or more; `tsugiki site "
        'check` prints them. Set it if only weights that you have examined may be used. "*": any. Binds the server.',
    )
    max_rounds: int = Field(
        default=0,
        ge=0,
        description="Most rounds of training over this site's whole life, over all runs, by its own audit log. Each "
        "request to train that the site begins counts, also of a round that is voided or repeated. A run that "
        "announces more is refused at once. 0: any number. Binds the server.",
    )
    max_rounds_per_day: int = Field(
        default=0,
        ge=0,
        description="Most rounds of training in any 24 hours, counted in the same way, by this machine's clock. Set it "
        "to limit how often runs may occupy this machine. 0: any number. Binds the server.",
    )
    max_local_steps: int = Field(
        default=0,
        ge=0,
        description="Most batches of a client in a round: optimizer steps times train.gradient_accumulation_steps. Set "
        "it to limit how long a round may occupy this machine. 0: any number. Binds the server.",
    )
    max_rows_per_round: int = Field(
        default=0,
        ge=0,
        description="Most rows that this site trains on in a round, over all of its clients; a row counts once for "
        "each batch that holds it. Set it beside max_local_steps, because batches may be of any size. 0: any number. "
        "Binds the server.",
    )
    max_settings_per_day: int = Field(
        default=50,
        ge=1,
        description="Most different settings that this site answers in any 24 hours, by its own audit log. Whether a "
        "site accepts settings can tell something about its rows, so a server must not try many. Raise it if you take "
        "part in many runs a day. Binds the server. Without site.audit, nothing is counted.",
    )
    tell: Names = Field(
        default=("rows", "metrics"),
        description='Kinds of facts about its rows that this site tells in runs without privacy: "rows", their number; '
        '"notes", codes about them, as "shard-one-class" and how many texts were cut; "metrics", the training loss and '
        "those of evaluation (see metrics). A site that does not tell its number of rows counts as one row, also in "
        "the mean, and sends no sums for a head. With a privacy mode none of this leaves, whatever is set here; under "
        "DP-SGD alone, only the number of rows. Binds the server.",
    )
    metrics: Names = Field(
        default=(ALL,),
        description='Which metrics may leave this site if tell has "metrics": "loss" of training, and those of '
        'evaluation, as "accuracy". Set [] to share none. "*": all. Binds the server.',
    )
    privacy_modes: Names = Field(
        default=(ALL,),
        description='Privacy modes that this site accepts, of "none", "central", "local" and "distributed". Leave '
        '"none" out to refuse runs without privacy. "*": any; with max_epsilon, any in which no adversary sees '
        "an update without noise. Binds the server; that it adds the noise of mode "
        '"central" binds an honest server only.',
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Take part only if the server sees no single update. Set it if you do not trust the server with "
        "this site's update. Binds the server, as far as the other sites of a sum are real and do not help it.",
    )
    min_sites: int = Field(
        default=2,
        ge=2,
        le=255,
        description="Least number of sites in a sum that is opened, under secure aggregation. Raise it if some sites "
        "may help the server. Binds the server, as far as the other sites are real.",
    )
    min_noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        description='Least noise over the clip norm; in mode "distributed" without secure aggregation, the noise on '
        "this site's own update counts. Raise it to refuse runs with too little noise. Binds the server for noise that "
        'this site adds; for the shares of other sites, other members; in mode "central", an honest server only.',
    )
    max_epsilon: float = Field(
        default=0.0,
        ge=0,
        description="Most epsilon of this site over its whole life, by its own ledger. Set it to limit what all runs "
        'together can tell about this site. Runs without privacy are refused; so is mode "central", in which the '
        "server sees updates without noise, unless privacy_modes names it. 0: no limit. Binds the server and "
        'everybody who sees models or sums; in mode "central", an honest server only.',
    )
    head_sums: bool = Field(
        default=True,
        description="Send sums of the base's features over this site's rows, once before a run's first round, from "
        "which the server computes a first head. They tell how many rows of each class this site has, and about a "
        "class with a single row, its features. Set false to keep them: the site then takes part without. Binds the "
        "server.",
    )
    max_row_epsilon: float = Field(
        default=0.0,
        ge=0,
        description="Most epsilon of one row of this site over its whole life, by its own ledger. Set it if single "
        "rows need protection: runs without DP-SGD are then refused. 0: no limit. Binds everybody who sees this site's "
        "updates, the server too.",
    )
    delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Delta at which max_epsilon and max_row_epsilon are counted, whatever a run says. Set it below 1 "
        "over this site's number of rows if max_row_epsilon is used. Binds the server.",
    )
    clients_counted_per_site: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="Under secure aggregation: how many clients at each other site this site counts on at most. It "
        "cannot check their number, so above 1 it counts on the server's word for the noise of a sum. Raise it only "
        "if sites are gateways and you trust the server not to invent clients. 1 binds the server; above it, an honest "
        "server only.",
    )
    max_honest_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description='Mode "distributed": largest privacy.honest_fraction of a run, the share of a sum\'s clients whose '
        "noise the account counts on. Lower it if you believe that some of them may cheat or help the server; each "
        "client then has to add more noise. Binds the server.",
    )
    members: Names = Field(
        default=(),
        description="Under secure aggregation: the sites that this site shares a sum with, each by its name and the "
        'fingerprint of its key, as ["acme SHA256:..."]. Exchange the lines of `tsugiki keys fingerprint` with the '
        "other sites, not by way of the server. Set it if the server could invent sites; set secure_aggregation too. "
        "[]: any site that the server names. Binds the server.",
    )
    ask: bool = Field(
        default=False,
        description="Take part in a run only after somebody here has said yes to it: `tsugiki site approve RUN` shows "
        "what would leave, and asks. More rounds, another privacy plan or other settings that shape the result need "
        "another yes. Set it if runs are rare, and each one is somebody's decision. Binds the server.",
    )
    seeded_noise: bool = Field(
        default=False,
        description="For tests only: take part in runs whose noise comes from a seed and hides nothing. false binds "
        "the server.",
    )

    @field_validator("tell")
    @classmethod
    def _is_tellable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(TELLABLE):
            raise ValueError(f"a list of {', '.join(TELLABLE)}")
        return value

    @field_validator("members")
    @classmethod
    def _members_are_pins(cls, members: tuple[str, ...]) -> tuple[str, ...]:
        pins = [member.split() for member in members]
        well_formed = all(
            len(pin) == 2 and re.fullmatch(NAME_PATTERN, pin[0]) and re.fullmatch(FINGERPRINT_PATTERN, pin[1])
            for pin in pins
        )
        if not well_formed or any(len(set(values)) < len(pins) for values in zip(*pins, strict=True)):
            raise ValueError('a list of "NAME SHA256:..." with each name and each fingerprint once')
        return members

    def count_on(self, site: str, counts: Mapping[str, int], plan: Plan) -> dict[str, int]:
        """Return how many clients of each site this site counts on in a sum, by site name.

        Args:
            site: name of this site.
            counts: by site name, as the server says.
            plan: says how many clients and sites a sum needs.

        Raises:
            SecureAggregationError: `secagg-too-few`, there are too few even if the server is right.
            PolicyError: `policy-clients`, there are too few that this site counts on: a sum could have less noise than
                the plan says.
        """
        check_sum(counts, plan.min_clients, plan.min_sites)
        believed = counted_on(counts, site, self.clients_counted_per_site)
        found = sum(believed.values())
        if found < plan.min_clients:
            raise _refusal(
                f"sums of {plan.min_clients} clients, and this site counts on {found}",
                f"enough with at most clients_counted_per_site = {self.clients_counted_per_site} of [policy] at each",
                "policy-clients",
            )
        return believed

    def taken_on_trust(self) -> list[str]:
        """Return what this site takes on the server's word in secure aggregation, as sentences for its operator."""
        found = []
        if self.clients_counted_per_site > 1:
            most = self.clients_counted_per_site
            found.append(f"counts up to {most} clients at each other site, on the server's word")
        if self.secure_aggregation and not self.members:
            found.append("shares a sum with any site that the server names: policy.members is empty")
        return found

    def check_members(self, fingerprints: Mapping[str, str]) -> None:
        """Check that other sites may be in a sum with this site. Without `members`, any site may.

        Args:
            fingerprints: of the node key of each other site, by its name; empty: it has signed nothing.

        Raises:
            PolicyError: `policy-members:SITE`, with the first that is not pinned; the message has all of them.
        """
        pins = dict(member.split() for member in self.members)
        unpinned = [name for name in sorted(fingerprints) if pins and pins.get(name) != fingerprints[name]]
        if unpinned:
            shown = ", ".join(f"{name!r} (key {fingerprints[name] or 'none'})" for name in unpinned)
            raise _refusal(
                f"a sum with {shown}",
                "members of policy.members alone, by name and fingerprint",
                WireCode(f"policy-members:{unpinned[0]}"),
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

    def check_rounds(self, done: int, of_last_day: int) -> None:
        """Check that one more round of training is allowed.

        Args:
            done: rounds that this site has begun in its life, by its own audit log.
            of_last_day: those of the last 24 hours.

        Raises:
            PolicyError: `policy-rounds`.
        """
        if self.max_rounds and done >= self.max_rounds:
            most = f"at most policy.max_rounds = {self.max_rounds}"
            raise _refusal(f"a round after {done}, over all runs", most, "policy-rounds")
        if self.max_rounds_per_day and of_last_day >= self.max_rounds_per_day:
            most = f"at most policy.max_rounds_per_day = {self.max_rounds_per_day}"
            raise _refusal(f"a round after {of_last_day} in 24 hours", most, "policy-rounds")

    def check_settings(self, of_last_day: int) -> None:
        """Check that the site may answer settings that it has not answered in the last 24 hours.

        Args:
            of_last_day: how many different settings it has answered in that time.

        Raises:
            PolicyError: `policy-settings`.
        """
        if of_last_day >= self.max_settings_per_day:
            raise _refusal(
                f"other settings after {of_last_day} in 24 hours",
                f"at most policy.max_settings_per_day = {self.max_settings_per_day}",
                "policy-settings",
            )

    def check_base(self, fingerprint: str) -> None:
        """Check that a base model is allowed.

        Raises:
            PolicyError: `policy-base`.
        """
        known = any(one == ALL or (len(one) >= 12 and fingerprint.startswith(one)) for one in self.base_fingerprints)
        if not known:
            raise _refusal(f"the base model {fingerprint[:12]}", "one of policy.base_fingerprints", "policy-base")

    def check_work(self, batches: int, rows: int) -> None:
        """Check that the work of a round is allowed.

        Args:
            batches: most batches of a client; gradient accumulation counts each of a step's.
            rows: in the batches of all clients; a row counts once for each batch that holds it.

        Raises:
            PolicyError: `policy-steps` or `policy-rows`.
        """
        if self.max_local_steps and batches > self.max_local_steps:
            raise _refusal(
                f"{batches} batches in a round",
                f"at most policy.max_local_steps = {self.max_local_steps}",
                "policy-steps",
            )
        if self.max_rows_per_round and rows > self.max_rows_per_round:
            most = f"at most policy.max_rows_per_round = {self.max_rows_per_round}"
            raise _refusal(f"{rows} rows in a round", most, "policy-rows")

    def check_privacy(self, plan: Plan | None, settings: PrivacySection) -> None:
        """Check that a run protects this site as its policy demands. `client/site/ledger.py` enforces the budgets.

        Args:
            plan: of the run, made at this site; None for a run without privacy.
            settings: of the run.

        Raises:
            PolicyError: `policy-seeded-noise`, `policy-privacy-mode`, `policy-secure-aggregation`, `policy-sites`,
                `policy-noise`, `policy-honest-fraction`, `policy-epsilon`, or `policy-row-epsilon`.
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
        self._check_noise(plan)
        if self.max_epsilon and not (plan and plan.private):
            raise _refusal("no noise that hides anything", "a private run: policy.max_epsilon is set", "policy-epsilon")
        bare = unbounded_adversaries(plan) if plan and plan.private else []
        if self.max_epsilon and bare and mode not in self.privacy_modes:
            raise _refusal(
                f'mode "{mode}", which shows updates without noise to {" and ".join(ADVERSARIES[one] for one in bare)}',
                f'a mode that bounds epsilon for everybody, or "{mode}" in policy.privacy_modes',
                "policy-epsilon",
            )
        if self.max_row_epsilon and (not settings.examples.enabled or settings.insecure_noise_seed):
            raise _refusal(
                "no DP-SGD that hides anything",
                "[privacy.examples]: policy.max_row_epsilon is set",
                "policy-row-epsilon",
            )

    def _check_noise(self, plan: Plan | None) -> None:
        """Check that a run has enough noise, and counts on no more of the clients for it than this site believes in.

        Raises:
            PolicyError: `policy-noise` or `policy-honest-fraction`.
        """
        noise = guaranteed_noise(plan) if plan else 0.0
        if noise < self.min_noise_multiplier:
            least = f"at least policy.min_noise_multiplier = {self.min_noise_multiplier:g}"
            raise _refusal(f"a noise multiplier of {noise:.4g}", least, "policy-noise")
        if plan and plan.mode == "distributed" and plan.honest_fraction > self.max_honest_fraction:
            most = f"at most policy.max_honest_fraction = {self.max_honest_fraction:g}"
            raise _refusal(
                f"the noise of a share {plan.honest_fraction:g} of the clients", most, "policy-honest-fraction"
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
        if not self.sends_head_sums:
            expected = 'none: policy.head_sums is false, or policy.tell has no "rows"'
            raise _refusal("sums of features", expected, "policy-head-sums")
        if settings.mode != "none" or settings.examples.enabled:
            raise _refusal("sums of features of private rows", "none in a private run", "policy-head-sums")

    @property
    def sends_head_sums(self) -> bool:
        """Whether sums of features may leave in a run without privacy; they hold the number of rows."""
        return self.head_sums and "rows" in self.tell

    def may_leave(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that this site shares."""
        if "metrics" not in self.tell:
            return {}
        return {name: value for name, value in metrics.items() if ALL in self.metrics or name in self.metrics}

    def told_rows(self, rows: int) -> int:
        """Return the number of rows that a run without privacy learns; 1 if the site keeps it."""
        if "rows" in self.tell:
            return rows
        return 1


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


def unbounded_adversaries(plan: Plan) -> list[Adversary]:
    """Return the adversaries that see something of this site without any noise, so that no epsilon bounds it."""
    return [adversary for adversary, release in releases_of(plan).items() if release.noise_multiplier <= 0]


def _allow(name: str, allowed: tuple[str, ...], setting: str, code: Code) -> None:
    if ALL not in allowed and name not in allowed:
        raise _refusal(
            f"{setting.rstrip('s').replace('_', ' ')} {name}",
            f"one of policy.{setting} ({', '.join(allowed) or 'which is empty'})",
            code,
        )


def _refusal(problem: str, expected: str, code: Code) -> PolicyError:
    return PolicyError(f"the run asks for {problem}", expected, "change [policy] in site.toml, if you agree", code=code)
