"""The ClientApp: hello, train, evaluate, and the boundary that turns every exception into a code."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tsugiki.client import prepare, secagg
from tsugiki.client.site.simulated import SimulatedSite, simulated_sites
from tsugiki.client.site.site import Site, site_of_node
from tsugiki.client.training.cohort import train_openly, train_privately
from tsugiki.client.training.job import Job
from tsugiki.common import __version__, minor
from tsugiki.common.config.parse import site_config
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import Code, DataError, SecureAggregationError, SpecError, TsugikiError, WireCode
from tsugiki.common.model.device import device_notes
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.privacy.mechanisms import releases_of
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.strategies.factors import narrow
from tsugiki.common.wire.arrays import encode, encode_levels
from tsugiki.common.wire.messages import (
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
    to_record,
)
from tsugiki.common.wire.spec import sha256

log = logging.getLogger("tsugiki.client")

Locate = Callable[[Context], Site]


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
        code: Code = error.code
        log.warning("refused: %s", error)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt raised inside training code
        name = type(error).__name__
        told = WireCode("client-error" if is_private(message.content) else f"client-error:{name}")  # it tells of rows
        code = "out-of-memory" if name in _MEMORY_ERRORS else told
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
            f"the server has the version {request.version[:32]}", f"{__version__}, as here", code="version-mismatch"
        )
    graft, plan = prepare.load(site, config)
    clients = prepare.clients(site, config, plan)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "transformers", "peft"))
    rows, kept = prepare.train_rows(site, config), prepare.desk.rows(site, config, "evaluation")
    hidden = plan is not None or config.privacy.examples.enabled
    notes = (*device_notes(config, graft.device.type), *(() if hidden else prepare.desk.notes.get(site.name, ())))
    reply = HelloReply(
        site=site.name,
        version=__version__,
        clients=clients,
        rows=0 if plan else len(rows),
        evaluation_rows=0 if kept is None or plan else len(kept),
        base_fingerprint=graft.spec.base_fingerprint,
        spec_sha256=graft.spec.sha256,
        libraries=f"python {platform.python_version()}, {libraries}",
        notes=",".join(notes),
    )
    site.record("hello", run=config.run.name, rows=len(rows), spec_sha256=reply.spec_sha256)
    return to_record(reply)


def _train(site: Site, content: RecordDict) -> RecordDict:
    request = from_record(TrainRequest, content)
    job, plan = prepare.make_job(site, request, content)
    if plan is not None:
        _only_masked(plan, False)
        levels = protected_sum(site, job, plan)
        return to_record(
            PrivateReply(site.name, request.round, request.nonce), encode_levels(levels, plan.modulus_bits)
        )
    update, trained, rows = train_openly(job)
    prepare.charge(site, job, None, {})
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
    arrays = encode(narrow(update, job.graft.spec, job.part), job.part)
    sent = {"bytes": sum(len(array.data) for array in arrays.values()), "update_sha256": sha256(update)}
    site.record("trained", run=job.config.run.name, round=request.round, steps=trained.steps, **sent)
    return to_record(reply, arrays)


def protected_sum(site: Site, job: Job, plan: Plan) -> Levels:
    """Return the protected sum of the site's updates; it is in the site's own ledger before it is returned.

    Raises:
        PolicyError: the site's budget does not allow it.
    """
    total = train_privately(job, plan)
    # A site that is asked knows that it is in the round: nothing is amplified for it.
    seen = {who: (replace(release, sampling_probability=1.0), 1) for who, release in releases_of(plan).items()}
    prepare.charge(site, job, plan, seen)
    told = {"clients": total.clients, "clipped": total.clipped, "null": total.null}
    kind = {"private": plan.private, "mode": plan.mode}
    site.record("trained", run=job.config.run.name, round=job.request.round, **told, **kind)
    return total.levels


def _only_masked(plan: Plan | None, masked: bool) -> Plan:
    """Refuse a step that the run's settings do not have: an unmasked upload under secure aggregation, above all."""
    if plan is None or plan.secure_aggregation != masked:
        raise SecureAggregationError("this step does not belong to the run", "a step that its settings name")
    return plan


def _step(step: str, state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Do one of the steps of secure aggregation in which nothing is trained."""
    request, fields = from_record(StageRequest, content), beside(content)
    config = site_config(request.config)
    plan = _only_masked(prepare.load(site, config, request.round)[1], True)
    (secagg.bind if step == "keys" else secagg.check_bound)(state, plan, request.round)
    if step == "keys":
        sent = secagg.answer_keys(state, request.session, site.name)
    elif step == "shares":
        sent = secagg.answer_shares(state, request.session, fields, plan, prepare.clients(site, config, plan))
    else:
        sent = secagg.answer_unmask(state, request.session, fields, plan)
        site.record("unmasked", run=config.run.name, round=request.round, survivors=len(fields["survivors"]))
    return to_record(PrivateReply(site.name, request.round, request.nonce), None, sent)


def _masked(state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Train, and send the protected sum under its masks."""
    request, fields = from_record(TrainRequest, content), beside(content)
    job, plan = prepare.make_job(site, request, content)
    plan = _only_masked(plan, True)
    secagg.check_bound(state, plan, request.round)
    if request.clients:
        raise SecureAggregationError(
            "the server asks some of this site's clients only", "all of them: the others' noise belongs to the sum"
        )
    secagg.open_shares(state, fields)
    levels = secagg.mask(state, fields["session"], protected_sum(site, job, plan), plan.modulus_bits)
    return to_record(PrivateReply(site.name, request.round, request.nonce), encode_levels(levels, plan.modulus_bits))


def _evaluate(site: Site, content: RecordDict) -> RecordDict:
    import torch

    request = from_record(EvaluateRequest, content)
    config = site_config(request.config)
    graft, _, _ = prepare.receive(site, config, request, content)
    site.policy.check_evaluation(config.privacy)
    rows = prepare.desk.rows(site, config, "evaluation")
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


def is_private(content: RecordDict) -> bool:
    """Return whether a request belongs to a run that protects clients or rows; also if it cannot be read."""
    try:
        privacy = site_config(str(content.config_records["request"]["config"])).privacy
    except (KeyError, TsugikiError, ValueError):
        return True
    return privacy.mode != "none" or privacy.examples.enabled
