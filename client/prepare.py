"""A run at a site, opened for each message: policy, base model and plan are checked, rows and adapter are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, RecordDict

from tsugiki.client.cache import PreparedRows, RowsKey, SiteCache, of_process
from tsugiki.client.site.ledger import check_budget, seen_of_site, site_ledger, spend
from tsugiki.client.site.site import Site
from tsugiki.client.training import dp_sgd, validation
from tsugiki.client.training.cohort import asked_clients, row_releases
from tsugiki.client.training.features import rows_for_sums
from tsugiki.client.training.job import Job
from tsugiki.client.training.trainer import batches_per_round, groups_by_length, touched_rows
from tsugiki.common.adapters.lora import LoraSettings
from tsugiki.common.config.run import RunConfig
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ConfigError, DataError, PolicyError, Problem, SpecError, WireError
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.linear_head import LinearHead, warm_head_of
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import Adversary
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.strategies import names_with, strategy_of
from tsugiki.common.tasks.base import Encoded, Tail, Task
from tsugiki.common.wire.arrays import array_records, decode
from tsugiki.common.wire.messages import TrainRequest, split_shares
from tsugiki.common.wire.spec import Vector, sha256

Part = Literal["train", "validation", "evaluation"]

_SCHEDULE = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "local_steps",
    "local_epochs",
    "group_by_length",
}
"""The settings of [train] that decide which rows a run's batches contain."""


@dataclass(frozen=True)
class SiteRun:
    """A run at a site, open for one message. The site's policy allows the run, its base model and its plan.

    Args:
        site: the site, with its rows, policy and ledger.
        config: the run, as the server sent it.
        graft: the base with the run's adapter. All sites of this process use it in turn.
        plan: the plan of a run that protects clients; None in other runs.
        rank: how many components of each LoRA pair this site trains; 0: all.
        cache: what this process keeps between messages.
        round_number: of the message's round, counted from 1; 0 if it belongs to none.
    """

    site: Site
    config: RunConfig
    graft: Graft
    plan: Plan | None
    rank: int
    cache: SiteCache
    round_number: int = 0

    @classmethod
    def open(cls, site: Site, config: RunConfig, round_number: int = 0) -> SiteRun:
        """Load the run's model and make its plan, if the site's policy allows them.

        Args:
            site: the site that received a message.
            config: the run in the message.
            round_number: counted from 1; 0 in a message that belongs to no round.

        Raises:
            PolicyError: the policy forbids the run, the base model or the plan; `policy-ask`, nobody has said yes;
                `policy-rank`, see `own_rank`.
            ConfigError: the learning rate is not a number.
            ModelError: see `load_at`.
            TrainingError: `examples-unsupported`, the run protects rows, and this model cannot; see `check_supported`.
        """
        # Names and numbers first: a run that the policy forbids loads nothing.
        _check_rates(config)
        site.policy.check_run(config, round_number)
        # Before anything depends on rows: whether settings are accepted may tell something about them.
        site.admit(config)
        graft = load_at(site, config)
        # What follows can be checked only once the model is there.
        site.policy.check_base(graft.spec.base_fingerprint)
        plan = make_plan(config, graft.spec.size)
        site.policy.check_privacy(plan, config.privacy)
        site.check_approved(config, plan)
        rank = own_rank(site, config)
        if config.privacy.examples.enabled:
            dp_sgd.check_supported(graft)
        cache = of_process()
        cache.adapter_bytes = max(cache.adapter_bytes, graft.spec.size_bytes)
        return cls(site, config, graft, plan, rank, cache, round_number)

    @property
    def hides_rows(self) -> bool:
        """Whether the run protects clients or rows: then nothing that is computed from rows leaves without noise."""
        return self.plan is not None or self.config.privacy.examples.enabled

    def rows(self, part: Part) -> Encoded | None:
        """Return tokenised rows of the site, or None if it keeps none for this part.

        Raises:
            DataError: the site's file cannot be read or is not as `[data]` says; see `validation.training_shard`.
        """
        return self._prepared(part).encoded

    def train_rows(self) -> Encoded:
        """Return the site's tokenised training rows.

        Raises:
            DataError: `shard-empty`, there are none; and as `rows`.
        """
        rows = self.rows("train")
        if rows is None or not len(rows):
            raise DataError("this site has no rows to train on", "at least one row", code="shard-empty")
        return rows

    def rows_of_clients(self) -> tuple[list[int], ...]:
        """Return the numbers of the training rows of each client of the site."""
        return self._prepared("train").clients

    def notes(self) -> tuple[str, ...]:
        """Return codes for what is unusual about the site's training rows."""
        return self._prepared("train").notes

    def count_clients(self) -> int:
        """Return the number of clients of the site: 1, or those behind a gateway.

        Raises:
            DataError: `clients`, more than the run's plan allows a site, or than its strategy can aggregate.
        """
        clients = len(self.rows_of_clients())
        if clients > 1 and strategy_of(self.config.strategy).sees_factors:
            raise DataError(
                f"this site stands for {clients} clients",
                f"one with strategy {self.config.strategy.name}, which needs the factors of each",
                "ask the operator for another strategy",
                code="clients",
            )
        if self.plan is not None and clients > self.plan.max_clients_per_site:
            raise DataError(
                f"this site stands for {clients} clients",
                f"at most privacy.max_clients_per_site = {self.plan.max_clients_per_site} of the run",
                "ask the operator to raise it",
                code="clients",
            )
        return clients

    def receive(self, spec_sha256: str, content: RecordDict) -> Vector:
        """Set the graft to the adapter in a message; return its values, shape (spec.size,).

        Args:
            spec_sha256: hash of the adapter spec that the server uses.
            content: of the message.

        Raises:
            SpecError: `spec-mismatch`, the server uses another adapter spec.
            WireError: the message has no adapter, or a malformed one.
        """
        if self.graft.spec.sha256 != spec_sha256:
            ours = self.graft.spec.sha256[:12]
            raise SpecError(f"the server's adapter has the spec {spec_sha256[:12]}", f"{ours}, this site's")
        arrays = array_records(content).get("arrays")
        if not isinstance(arrays, ArrayRecord):
            raise WireError("the message has no adapter", "one array", code="keys")
        self.graft.write(decode(arrays, self.graft.spec))
        return self.graft.read()  # as the parameters hold it: 16-bit ones have rounded it

    def job(self, request: TrainRequest, content: RecordDict) -> Job:
        """Return the training that a request asks for, after everything about the request was checked.

        Args:
            request: the round to train.
            content: of the same message; it has the adapter to start from.

        Raises:
            SpecError, WireError: see `receive`, `split_shares` and `asked_clients`.
            PolicyError: `policy-steps` or `policy-rows`, the round would take more batches or rows than the policy
                allows; `policy-rounds`, it allows no further round; `policy-epsilon` or `policy-row-epsilon`, its
                budget does not allow the upload.
            DataError: see `train_rows`.
        """
        # The adapter first: it is cheap to refuse, and rows may take long to tokenise.
        received = self.receive(request.spec_sha256, content)
        self._check_start(request, content)
        shares = split_shares(request.class_shares, len(self.graft.task.labels))
        encoded = self.train_rows()
        # A server may ask for some of a gateway's clients.
        clients = asked_clients(self.site.name, self.rows_of_clients(), request.clients)
        # The policy bounds the batches of each client, so the client with the most batches counts.
        batches = {name: batches_per_round(len(rows), self.config.train) for name, rows in clients.items()}
        most_rows = self.config.train.per_device_train_batch_size
        rows_of_round = sum(count * min(len(clients[name]), most_rows) for name, count in batches.items())
        self.site.policy.check_work(max(batches.values()), rows_of_round)
        # An upload that the site's budget does not allow is not trained for.
        self.check_budget(clients)
        # Written ahead, after all that can be refused without a trace in the count.
        self.site.begin_round(self.config.run.name, request.round)
        # Last, because it changes what is kept: the optimisers' states of this round.
        moments = self._moments(clients, request.round)
        return Job(
            graft=self.graft,
            encoded=encoded,
            clients=clients,
            config=self.config,
            request=request,
            received=received,
            watch=self.cache.watch,
            validation=self._validation_rows(),
            moments=moments,
            rank=self.rank,
            class_shares=shares,
            tail=self._tail,
        )

    def _check_start(self, request: TrainRequest, content: RecordDict) -> None:
        """Check that round 1 starts from the adapter that the run says it starts from.

        Raises:
            SpecError: `adapter-differs`, from another one.
        """
        wanted = self.config.adapter.start_sha256
        if request.round != 1 or not wanted:
            return
        # as it came: 16-bit parameters would have rounded it
        found = sha256(decode(array_records(content)["arrays"], self.graft.spec))
        if found != wanted:
            raise SpecError(
                f"round 1 starts from an adapter with the hash {found[:12]}",
                f"{wanted[:12]}, adapter.start_sha256 of the run",
                "ask the operator which adapter the run starts from",
                code="adapter-differs",
            )

    def check_budget(self, clients: Mapping[str, Sequence[int]]) -> None:
        """Check that the site's ledger allows one more upload. No-op without a ledger.

        Args:
            clients: the rows of each client that is to train, by its name; empty before they are known.

        Raises:
            PolicyError: `policy-epsilon` or `policy-row-epsilon`.
        """
        path = self.site.ledger_path()
        if path is not None:
            check_budget(self._ledger(path), self._shown(clients))

    def charge(self, job: Job) -> None:
        """Write what an upload shows into the site's ledger, before the upload leaves. No-op without a ledger.

        Args:
            job: of the round.

        Raises:
            PolicyError: the site's budget does not allow the upload.
            StorageError: the ledger cannot be written. The upload must not leave.
        """
        path = self.site.ledger_path()
        if path is None:
            return
        shown = self._shown(job.clients)
        with self.site.charging() as anchor:
            spend(self._ledger(path), shown, self.config.run.name, job.request.round, anchor)

    def _ledger(self, path: Path) -> Ledger:
        seeded = self.config.privacy.insecure_noise_seed > 0
        return site_ledger(path, self.site.policy, self.plan, seeded=seeded)

    def _shown(self, clients: Mapping[str, Sequence[int]]) -> dict[Adversary, tuple[Release, int]]:
        """Return what an upload shows, and how often, by adversary: about clients, and about rows under DP-SGD."""
        of_clients = {} if self.plan is None else seen_of_site(self.plan)
        counted = {adversary: (release, 1) for adversary, release in of_clients.items()}
        return {**counted, **row_releases(clients, self.config)}

    def _prepared(self, part: Part) -> PreparedRows:
        """Return a part of the site's rows; they are read and tokenised once for the same files and settings."""
        key = self._rows_key(part)
        if key not in self.cache.rows:
            # Rows for another run's settings are dropped: a client that stays for many runs would keep all of them.
            self.cache.rows = {other: rows for other, rows in self.cache.rows.items() if other[:2] != key[:2]}
            self.cache.rows[key] = self._prepare(part)
        return self.cache.rows[key]

    def _prepare(self, part: Part) -> PreparedRows:
        shard = self._shard(part)
        if shard is None:
            return PreparedRows(None)
        task = self.graft.task
        if part != "train":
            return PreparedRows(task.encode(shard, self.graft.base))
        # Where the run validates inside a round, some rows are held out, and the site is one client with the others.
        clients = [list(range(len(shard)))]
        if not self.config.train.validate_every_steps:
            clients = self.site.clients(shard)
        # Rows that no batch of the run contains are not tokenised; they keep their numbers.
        touched = self._touched(clients, len(shard))
        if len(touched) == len(shard):
            encoded = task.encode(shard, self.graft.base)
        else:
            encoded = task.encode(shard.take(touched), self.graft.base).spread(touched, len(shard))
        return PreparedRows(encoded, tuple(clients), shard.notes + encoded.notes)

    def _touched(self, clients: Sequence[Sequence[int]], rows: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the training rows that the batches, or the head before round 1, may need, ascending.

        These are all rows if batches do not follow from the seed alone, or if something else reads them.

        Args:
            clients: row numbers of each client.
            rows: of the site.
        """
        if not self._follows_schedule:
            return np.arange(rows)
        rounds = self.config.run.rounds
        if not rounds:
            return np.arange(1)  # nobody trains, but tokenisers take no empty list
        grouped = groups_by_length(self.graft.task, self.config.train)
        touched = [np.zeros(0, np.int64)]
        if self._sends_sums:
            touched.append(np.asarray(rows_for_sums(rows, self.config.run.seed, self.site.name), np.int64))
        for name, own in asked_clients(self.site.name, clients, "").items():
            if own:
                of_client = touched_rows(len(own), self.config.train, self.config.run.seed, name, rounds, grouped)
                touched.append(np.asarray(own, np.int64)[of_client])
        return np.unique(np.concatenate(touched))

    @property
    def _sends_sums(self) -> bool:
        """Whether the site sends sums of its rows' features before round 1."""
        return self.site.policy.sends_head_sums and isinstance(warm_head_of(self.graft, self.config), LinearHead)

    @property
    def _follows_schedule(self) -> bool:
        """Whether only the batches of the run's schedule, and sums before round 1, read the site's training rows."""
        if self.round_number > self.config.run.rounds:
            return False  # a server that asks for more rounds than it announced
        task = self.graft.task
        reads_all = type(task).tail is not Task.tail  # its features are those of all rows
        texts_only = all(column.kind != "image" for column in task.columns)
        return texts_only and not reads_all and not self.config.privacy.examples.enabled

    def _shard(self, part: Part) -> Shard | None:
        if part == "train":
            return validation.training_shard(self.site, self.graft.task, self.config)
        if part == "validation":
            return validation.validation_shard(self.site, self.graft.task, self.config)
        return self.site.evaluation_shard(self.graft.task)

    def _rows_key(self, part: Part) -> RowsKey:
        """Return the cache key of a part: everything that the tokenised rows depend on."""
        limit = getattr(self.graft.base.tokenizer, "model_max_length", 0)  # virtual tokens shorten texts
        model = self.config.model
        precision = self.config.train.precision  # of what some tasks compute from the bare base for each row
        settings = f"{self.config.task.model_dump_json()}{model.dtype}{model.quantization}{precision}{limit}"
        if self.config.train.validate_every_steps:
            settings += f" {self.config.run.seed} {self.config.train.validation_fraction}"
        if part == "train" and self._follows_schedule:
            schedule = self.config.train.model_dump_json(include=_SCHEDULE)
            settings += f" {self.config.run.seed} {self.config.run.rounds} {schedule} {self._sends_sums}"
        return self.site.identity(), part, f"{self.graft.spec.base_fingerprint}{settings}"

    def _validation_rows(self) -> Encoded | None:
        """Return the rows to validate on inside a round, or None if the run does not validate there."""
        if not self.config.train.validate_every_steps:
            return None
        return self.rows("validation")

    def _tail(self) -> Tail | None:
        return self.cache.tail(self._rows_key("train"), self.graft, self.train_rows())

    def _moments(self, clients: Iterable[str], round_number: int) -> dict[str, dict[str, Any]]:
        if not self.config.train.persist_optimizer:
            return {}
        return self.cache.moments_of(self.site.identity(), self.config.sha256, clients, round_number)


def _check_rates(config: RunConfig) -> None:
    """Check that the server has put a number in the place of a learning rate that is "auto"."""
    if config.train.learning_rate == "auto":
        hint = "ask the operator to start the run with this version"
        problem = Problem("train.learning_rate", '"auto"', "a number in a run at a site", hint)
        raise ConfigError("run received from the server", [problem])


def load_at(site: Site, config: RunConfig) -> Graft:
    """Return the base with the run's adapter on it. The site decides where the models that the run names come from.

    Raises:
        ModelError: `model-unknown`, the site does not know a name; and as `load_graft`.
    """

    def source_of(name: str) -> str:
        # `load_graft` refuses an empty name, with a message that says which setting is empty.
        if not name:
            return ""
        return site.model_source(name)

    source = site.model_source(config.model.name)
    here = {name: getattr(config, name).resolved(source_of) for name in ("task", "adapter")}
    return load_graft(config.model_copy(update=here), source, config.run.seed)


def own_rank(site: Site, config: RunConfig) -> int:
    """Return how many components of each LoRA pair the site trains; 0: all of the run's.

    Raises:
        PolicyError: `policy-rank`, the run has more than the site can train, and its strategy needs all of them.
    """
    most = site.max_rank
    adapter = config.adapter
    if not isinstance(adapter, LoraSettings) or not 0 < most < adapter.rank:
        return 0
    if not strategy_of(config.strategy).mixed_ranks:
        fitting = " or ".join(names_with(lambda strategy: strategy.mixed_ranks))
        raise PolicyError(
            f"adapter.rank = {adapter.rank} is more than this site allows",
            f"at most site.max_rank = {most} of site.toml, unless the strategy is {fitting}",
            f"raise site.max_rank, or ask the operator for a smaller rank or strategy {fitting}",
            code="policy-rank",
        )
    return most
