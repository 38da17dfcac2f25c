"""From a request to work that a site is willing to do: policy, spec and rows checked, the adapter set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flwr.app import ArrayRecord, RecordDict

from tsugiki.client.cache import Desk
from tsugiki.client.site.ledger import site_ledger, spend
from tsugiki.client.site.site import Site
from tsugiki.client.training import dp_sgd
from tsugiki.client.training.cohort import asked_clients, row_releases
from tsugiki.client.training.job import Job
from tsugiki.client.training.trainer import Watch, steps_per_round
from tsugiki.common.config.parse import site_config
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import DataError, PolicyError, SpecError, WireError
from tsugiki.common.model.graft import Graft
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.mechanisms import Adversary
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.strategies.settings import EXACT_PRODUCTS
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.wire.arrays import decode
from tsugiki.common.wire.messages import EvaluateRequest, TrainRequest
from tsugiki.common.wire.spec import Vector

desk = Desk()
"""One for each process. Ray pickles the app for every message, so it must not hang on the app."""


def watch_training(watch: Watch) -> None:
    """Let every training step of this process be seen."""
    desk.watch = watch


def load(site: Site, config: RunConfig, round_: int = 0) -> tuple[Graft, Plan | None]:
    """Return the graft and the privacy plan, if the site's policy allows the run, the base model and the plan.

    Raises:
        PolicyError: it does not.
    """
    site.policy.check_run(config, round_)
    graft = desk.graft(site, config)
    site.policy.check_base(graft.spec.base_fingerprint)
    plan = make_plan(config, graft.spec.size)
    site.policy.check_privacy(plan, config.privacy)
    own_rank(site, config)
    if config.privacy.examples.enabled:
        dp_sgd.check_supported(graft)
    return graft, plan


def make_job(site: Site, request: TrainRequest, content: RecordDict) -> tuple[Job, Plan | None]:
    """Return what the site is to do, and the privacy plan, once everything about the request was checked.

    Raises:
        SpecError, WireError, PolicyError: see `receive`; `policy-steps`, a client would take more steps than allowed.
        DataError: see `train_rows`.
    """
    config = site_config(request.config)
    graft, received, plan = receive(site, config, request, content)
    encoded = train_rows(site, config)
    clients = asked_clients(site.name, desk.rows_of_clients(site, config), request.clients)
    site.policy.check_steps(max(steps_per_round(len(rows), config.train) for rows in clients.values()))
    return Job(
        graft,
        encoded,
        clients,
        config,
        request,
        received,
        desk.watch,
        tail=partial(desk.tail, site, config),
        validation=partial(validation_rows, site, config),
        moments=partial(desk.moments_of, site, config, request.round),
        rank=own_rank(site, config),
    ), plan


def own_rank(site: Site, config: RunConfig) -> int:
    """Return how many components of LoRA the site trains; 0: as many as the run has.

    Raises:
        PolicyError: `policy-rank`, they are too many for the site, and the strategy cannot do with fewer.
    """
    most, rank = site.max_rank, getattr(config.adapter, "rank", 0)
    if config.adapter.method != "lora" or not 0 < most < rank:
        return 0
    if config.strategy.name != "svd":
        raise PolicyError(
            f"adapter.rank = {rank} is more than this site allows",
            f"at most site.max_rank = {most} of site.toml, unless the strategy is svd",
            "raise site.max_rank, or ask the operator for a smaller rank or strategy svd",
            code="policy-rank",
        )
    return most


def clients(site: Site, config: RunConfig, plan: Plan | None) -> int:
    """Return how many clients the site stands for.

    Raises:
        DataError: `clients`, more than the run's plan believes of a site, or its strategy can do with.
    """
    number = len(desk.rows_of_clients(site, config))
    if number > 1 and config.strategy.name in EXACT_PRODUCTS:
        raise DataError(
            f"this site stands for {number} clients",
            f"one with strategy {config.strategy.name}, which needs the factors of each",
            "ask the operator for another strategy",
            code="clients",
        )
    if plan is not None and number > plan.max_clients_per_site:
        raise DataError(
            f"this site stands for {number} clients",
            f"at most privacy.max_clients_per_site = {plan.max_clients_per_site} of the run",
            "ask the operator to raise it",
            code="clients",
        )
    return number


def charge(site: Site, job: Job, plan: Plan | None, seen: Mapping[Adversary, tuple[Release, int]]) -> None:
    """Write into the site's own ledger, before it leaves, what an upload shows of its clients and of their rows.

    Args:
        site: which keeps a ledger, or none.
        job: of the round.
        plan: of a private run; None without.
        seen: what the upload shows of the clients, and how often, by adversary.

    Raises:
        PolicyError: the site's budget does not allow it.
        StorageError: it cannot be written; the upload must not leave.
    """
    path, releases = site.ledger_path(), {**seen, **row_releases(job)}
    if path is not None and releases:
        ledger = site_ledger(path, site.policy, plan, seeded=job.config.privacy.insecure_noise_seed > 0)
        spend(ledger, releases, job.config.run.name, job.request.round)


def receive(
    site: Site, config: RunConfig, request: TrainRequest | EvaluateRequest, content: RecordDict
) -> tuple[Graft, Vector, Plan | None]:
    """Return the graft, set to the adapter that the server sent, these values, and the privacy plan.

    Raises:
        SpecError: the two sides do not mean the same adapter.
        WireError: there is none in the message, or it is malformed.
        PolicyError: see `load`.
    """
    (graft, plan), theirs = load(site, config, request.round), request.spec_sha256
    if graft.spec.sha256 != theirs:
        raise SpecError(f"the server's adapter has the spec {theirs[:12]}", f"{graft.spec.sha256[:12]}, this site's")
    arrays = content.array_records.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise WireError("the message has no adapter", "one array", code="keys")
    graft.write(decode(arrays, graft.spec))
    return graft, graft.read(), plan  # as the parameters hold it: 16-bit ones have rounded it


def train_rows(site: Site, config: RunConfig) -> Encoded:
    """Return the site's tokenised training rows.

    Raises:
        DataError: `shard-empty`, or what is wrong with the shard.
    """
    rows = desk.rows(site, config, "train")
    if rows is None or not len(rows):
        raise DataError("this site has no rows to train on", "at least one row", code="shard-empty")
    return rows


def validation_rows(site: Site, config: RunConfig) -> Encoded | None:
    """Return the rows to validate on inside a round; None where the run does not ask for that."""
    return desk.rows(site, config, "validation") if config.train.validate_every_steps else None
