"""The ClientApp: hello, train, evaluate, and the boundary that turns every exception into a code."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client import dp_sgd, secagg
from client.budget import site_ledger, spend
from client.cohort import asked_clients, row_releases, train_openly, train_privately
from client.desk import Desk
from client.job import Job
from client.simulated import SimulatedSite, simulated_sites
from client.site import Site, site_of_node
from client.trainer import Watch, steps_per_round
from common import __version__, minor
from common.config import RunConfig
from common.errors import DataError, SecureAggregationError, SpecError, TsugikiError, WireError
from common.messages import (
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    PrivateReply,
    StageRequest,
    TrainReply,
    TrainRequest,
    beside,
    error_reply,
    from_record,
    site_config,
    to_record,
)
from common.model import Graft
from common.privacy.accounting import Release
from common.privacy.clipping import Levels
from common.privacy.mechanisms import Adversary
from common.privacy.plan import Plan, make_plan
from common.tasks.base import Encoded
from common.wire import Vector, decode, encode, encode_levels, sha256

log = logging.getLogger("tsugiki.client")

Locate = Callable[[Context], Site]


_desk = Desk()
"""One for each process. Ray pickles the app for every message, so it must not hang on the app."""


def watch_training(watch: Watch) -> None:
    """Let every training step of this process be seen."""
    _desk.watch = watch


def make_app(locate: Locate) -> ClientApp:
    """Return a ClientApp whose nodes are the sites that `locate` finds."""
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _evaluate)

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_step, "keys", context.state))

    @app.query("shares")
    def shares(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_step, "shares", context.state))

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_masked, context.state))

    @app.query("unmask")
    def unmask(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_step, "unmask", context.state))

    return app


def _answer(message: Message, locate: Callable[[], Site], handle: Callable[[Site, RecordDict], RecordDict]) -> Message:
    """Return the handler's reply, or a code: an exception's text may hold a site's data and stays in the local log."""
    site: Site | None = None
    try:
        site = locate()
        return Message(handle(site, message.content), reply_to=message)
    except TsugikiError as error:
        code = error.code
        log.warning("refused: %s", error)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt raised inside training code
        name = type(error).__name__
        code = "out-of-memory" if name in _MEMORY_ERRORS else f"client-error:{name}"
        log.exception("failed: %s", name)
    try:
        if site is not None:
            site.record("refused", kind=message.metadata.message_type, code=code)
    except TsugikiError as error:
        log.warning("not logged: %s", error)
    return error_reply(code, message)


_MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")


def _hello(site: Site, content: RecordDict) -> RecordDict:
    request = from_record(HelloRequest, content)
    config = site_config(request.config)
    if minor(request.version) != minor(__version__):
        raise SpecError(
            f"the server's version {request.version[:32]}", f"{__version__}, as here", code="version-mismatch"
        )
    graft, plan = _load(site, config)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "transformers", "peft"))
    rows, kept = _train_rows(site, config), _desk.rows(site, config, "evaluation")
    reply = HelloReply(
        site=site.name,
        version=__version__,
        clients=len(_desk.rows_of_clients(site, config)),
        rows=0 if plan else len(rows),
        evaluation_rows=0 if kept is None or plan else len(kept),
        base_fingerprint=graft.spec.base_fingerprint,
        spec_sha256=graft.spec.sha256,
        libraries=f"python {platform.python_version()}, {libraries}",
        notes="" if plan or config.privacy.examples.enabled else ",".join(_desk.notes.get(site.name, ())),
    )
    site.record("hello", run=config.run.name, rows=len(rows), spec_sha256=reply.spec_sha256)
    return to_record(reply)


def _load(site: Site, config: RunConfig, round_: int = 0) -> tuple[Graft, Plan | None]:
    """Return the graft and the privacy plan, if the site's policy allows the run, the base model and the plan."""
    site.policy.check_run(config, round_)
    graft = _desk.graft(site, config)
    site.policy.check_base(graft.spec.base_fingerprint)
    plan = make_plan(config, graft.spec.size)
    site.policy.check_privacy(plan, config.privacy)
    if config.privacy.examples.enabled:
        dp_sgd.check_supported(graft)
    return graft, plan


def _train(site: Site, content: RecordDict) -> RecordDict:
    request = from_record(TrainRequest, content)
    job, plan = _job(site, request, content)
    if plan is not None:
        _only_masked(plan, False)
        levels = protected_sum(site, job, plan)
        return to_record(
            PrivateReply(site.name, request.round, request.nonce), encode_levels(levels, plan.modulus_bits)
        )
    update, trained, rows = train_openly(job)
    _spend(site, job, None, {})
    hidden = job.config.privacy.examples.enabled  # the loss is a function of the rows, and no noise is on it
    shared = {} if hidden else site.policy.may_leave({"loss": trained.loss})
    reply = TrainReply(
        site=site.name,
        round=request.round,
        nonce=request.nonce,
        rows=rows,
        steps=trained.steps,
        loss=shared.get("loss", 0.0),
        loss_shared="loss" in shared,
        seconds=0.0 if hidden else trained.seconds,
    )
    arrays = encode(update, job.graft.spec)
    sent = {"bytes": sum(len(array.data) for array in arrays.values()), "update_sha256": sha256(update)}
    site.record("trained", run=job.config.run.name, round=request.round, steps=trained.steps, **sent)
    return to_record(reply, arrays)


def _job(site: Site, request: TrainRequest, content: RecordDict) -> tuple[Job, Plan | None]:
    """Return what the site is to do, and the privacy plan, once everything about the request was checked."""
    config = site_config(request.config)
    graft, received, plan = _receive(site, config, request, content)
    encoded = _train_rows(site, config)
    clients = asked_clients(site.name, _desk.rows_of_clients(site, config), request.clients)
    site.policy.check_steps(max(steps_per_round(len(rows), config.train) for rows in clients.values()))
    tail = partial(_desk.tail, site, config)
    return Job(graft, encoded, clients, config, request, received, _desk.watch, tail), plan


def protected_sum(site: Site, job: Job, plan: Plan) -> Levels:
    """Return the protected sum of the site's updates; it is in the site's own ledger before it is returned.

    Raises:
        PolicyError: the site's budget does not allow it.
    """
    levels = train_privately(job, plan)
    # A site that is asked knows that it is in the round: nothing is amplified for it.
    seen = {who: (replace(release, sampling_probability=1.0), 1) for who, release in plan.seen().items()}
    _spend(site, job, plan, seen)
    told = {"clients": len(job.clients), "private": plan.private, "mode": plan.mode}
    site.record("trained", run=job.config.run.name, round=job.request.round, **told)
    return levels


def _spend(site: Site, job: Job, plan: Plan | None, seen: Mapping[Adversary, tuple[Release, int]]) -> None:
    """Write into the site's own ledger, before it leaves, what an upload shows of its clients and of their rows."""
    path, releases = site.ledger_path(), {**seen, **row_releases(job)}
    if path is not None and releases:
        spend(site_ledger(path, site.policy, plan), releases, job.config.run.name, job.request.round)


def _only_masked(plan: Plan | None, masked: bool) -> Plan:
    """Refuse a step that the run's settings do not have: an unmasked upload under secure aggregation, above all."""
    if plan is None or plan.secure_aggregation != masked:
        raise SecureAggregationError("a step that does not belong to the run", "what its settings say")
    return plan


def _step(step: str, state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Do one of the steps of secure aggregation in which nothing is trained."""
    request, fields = from_record(StageRequest, content), beside(content)
    config = site_config(request.config)
    plan = _only_masked(_load(site, config, request.round)[1], True)
    (secagg.bind if step == "keys" else secagg.check_bound)(state, plan, request.round)
    if step == "keys":
        sent = secagg.answer_keys(state, request.session, site.name)
    elif step == "shares":
        own = len(_desk.rows_of_clients(site, config))
        sent = secagg.answer_shares(state, request.session, fields, plan, own)
    else:
        sent = secagg.answer_unmask(state, request.session, fields, plan)
        site.record("unmasked", run=config.run.name, round=request.round, survivors=len(fields["survivors"]))
    return to_record(PrivateReply(site.name, request.round, request.nonce), None, sent)


def _masked(state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Train, and send the protected sum under its masks."""
    request, fields = from_record(TrainRequest, content), beside(content)
    job, plan = _job(site, request, content)
    plan = _only_masked(plan, True)
    secagg.check_bound(state, plan, request.round)
    if request.clients:
        raise SecureAggregationError("some of this site's clients", "all of them: the others' noise belongs to the sum")
    secagg.open_shares(state, fields)
    levels = secagg.mask(state, fields["session"], protected_sum(site, job, plan), plan.modulus_bits)
    return to_record(PrivateReply(site.name, request.round, request.nonce), encode_levels(levels, plan.modulus_bits))


def _evaluate(site: Site, content: RecordDict) -> RecordDict:
    import torch

    request = from_record(EvaluateRequest, content)
    config = site_config(request.config)
    graft, _, _ = _receive(site, config, request, content)
    site.policy.check_evaluation(config.privacy)
    rows = _desk.rows(site, config, "evaluation")
    if rows is None:
        raise DataError(
            "this site keeps no evaluation rows", "data.evaluation in site.toml", code="shard-no-evaluation"
        )
    with torch.no_grad():
        metrics = graft.task.evaluate(graft.base, rows, config.evaluation.batch_size)
    shared: dict[str, Any] = {name: float(value) for name, value in site.policy.may_leave(metrics).items()}
    result = to_record(EvaluateReply(site.name, request.round, request.nonce, len(rows)))
    result["metrics"] = MetricRecord(shared)
    site.record("evaluated", run=config.run.name, round=request.round, metrics=sorted(shared))
    return result


def _receive(
    site: Site, config: RunConfig, request: TrainRequest | EvaluateRequest, content: RecordDict
) -> tuple[Graft, Vector, Plan | None]:
    """Check that both sides mean the same adapter, and set it to the received values."""
    (graft, plan), theirs = _load(site, config, request.round), request.spec_sha256
    if graft.spec.sha256 != theirs:
        raise SpecError(f"the server's adapter spec {theirs[:12]}", f"{graft.spec.sha256[:12]}, this site's")
    arrays = content.array_records.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise WireError("no adapter in the message", "one array", code="keys")
    graft.write(decode(arrays, graft.spec))
    return graft, graft.read(), plan  # as the parameters hold it: 16-bit ones have rounded it


def _train_rows(site: Site, config: RunConfig) -> Encoded:
    rows = _desk.rows(site, config, "train")
    if rows is None or not len(rows):
        raise DataError("no rows to train on", "at least one", code="shard-empty")
    return rows


def simulated_app(config: RunConfig, only: str = "") -> tuple[ClientApp, int]:
    """Return the ClientApp of a simulation and its number of nodes; each node's `partition-id` picks its site.

    Args:
        config: the run, whose file is split over the sites.
        only: the name of a site that is to be alone.

    Raises:
        ConfigError, DataError: the simulation's file cannot be split as asked.
    """

    def locate(context: Context) -> SimulatedSite:
        sites = simulated_sites(config)
        return sites[names.index(only)] if only else sites[int(context.node_config["partition-id"])]

    names = [site.name for site in simulated_sites(config)]
    return make_app(locate), 1 if only else len(names)


app = make_app(site_of_node)
