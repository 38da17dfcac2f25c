"""The ClientApp: hello, train, evaluate, and the boundary that turns every exception into a code."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tsugiki.client import secagg
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import SimulatedSite, simulated_sites
from tsugiki.client.site.site import Site, site_of_node
from tsugiki.client.training.cohort import asked_clients, train_openly, train_protecting_clients
from tsugiki.client.training.features import rows_for_sums, sum_features
from tsugiki.client.training.job import Job
from tsugiki.client.training.planted import planted
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common import __version__, minor
from tsugiki.common.config.parse import site_config
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import Code, DataError, SecureAggregationError, SpecError, TsugikiError, WireCode
from tsugiki.common.head_sums import pack_sums
from tsugiki.common.model.device import actual_precision, computing, device_notes, precision_advice
from tsugiki.common.model.linear_head import warm_head_of
from tsugiki.common.privacy.canaries import Auditor
from tsugiki.common.privacy.clipping import Levels
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.strategies.factors import narrow
from tsugiki.common.wire.arrays import array_records, encode, encode_levels, encode_numbers
from tsugiki.common.wire.messages import (
    ENDED,
    EndedReply,
    EvaluateReply,
    EvaluateRequest,
    HeadSumsReply,
    HeadSumsRequest,
    HelloReply,
    HelloRequest,
    PrivateReply,
    StageRequest,
    TrainReply,
    TrainRequest,
    beside,
    error_reply,
    from_record,
    read_ended,
    to_record,
)
from tsugiki.common.wire.spec import sha256

log = logging.getLogger("tsugiki.client")

Locate = Callable[[Context], Site]

Protect = Callable[[Job, Plan], ProtectedSum]
"""Returns the protected sum of a site's clients in a round: `train_protecting_clients`, or what an audit plants."""


def make_app(locate: Locate, protect: Protect | None = None) -> ClientApp:
    """Return a ClientApp whose nodes are the sites that `locate` finds.

    Args:
        locate: returns the site of a node.
        protect: for audits in a simulation; None: `train_protecting_clients`.
    """
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_train, protect))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _evaluate)

    @app.query("head_sums")
    def head_sums(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _head_sums)

    @app.query(ENDED)
    def ended(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), _ended)

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_keys, context.state))

    @app.query("shares")
    def shares(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_shares, context.state))

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_masked, context.state, protect))

    @app.query("unmask")
    def unmask(message: Message, context: Context) -> Message:
        return _answer(message, lambda: locate(context), partial(_unmask, context.state))

    return app


# The boundary


def _answer(message: Message, locate: Callable[[], Site], handle: Callable[[Site, RecordDict], RecordDict]) -> Message:
    """Return the handler's reply, or a code: an exception's text may hold a site's data and stays in the local log."""
    site: Site | None = None
    try:
        site = locate()
        return Message(handle(site, message.content), reply_to=message)
    except TsugikiError as error:
        code: Code = error.code
        told = _told_code(error, message.content)
        log.warning("refused: %s", error)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt raised inside training code
        code = _code_of_failure(error, message.content)
        told = code
        log.exception("failed: %s", type(error).__name__)
    # The site's own log gets the refusal too. The reply leaves even if the log cannot be written.
    try:
        if site is not None:
            site.record("refused", kind=message.metadata.message_type, code=code)
    except TsugikiError as error:
        log.warning("not logged: %s", error)
    return error_reply(told, message)


def _told_code(error: TsugikiError, content: RecordDict) -> Code:
    """Return the code that the server receives: in a private run, one code for everything that follows from rows.

    The number of clients is no such thing, because the hello of a private run says it.
    """
    follows_from_rows = isinstance(error, DataError) or error.code in _CODES_OF_ROWS
    if follows_from_rows and error.code != "clients" and is_private(content):
        return "shard-unusable"
    return error.code


_CODES_OF_ROWS = ("policy-steps", "policy-rows")
"""The codes of a round's work, which may follow from the number of rows."""


def _code_of_failure(error: BaseException, content: RecordDict) -> Code:
    """Return the code that the server receives for an exception other than a TsugikiError."""
    name = type(error).__name__
    if name in _MEMORY_ERRORS:
        return "out-of-memory"
    # A row may have raised it, so that even its class would say something about the row.
    if is_private(content):
        return "client-error"
    return WireCode(f"client-error:{name}")


_MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")


def is_private(content: RecordDict) -> bool:
    """Return whether a request belongs to a run that protects clients or rows. True if it cannot be read."""
    try:
        privacy = site_config(str(content.config_records["request"]["config"])).privacy
    except Exception:  # noqa: BLE001  # it may be anything that a server sends, as a number, or brackets without end
        return True
    return privacy.mode != "none" or privacy.examples.enabled


# The handlers


@cache  # reading a package's version takes as long as a small hello
def _libraries() -> str:
    """Return the versions that a hello reports."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "transformers", "peft"))
    return f"python {platform.python_version()}, {libraries}"


def _hello(site: Site, content: RecordDict) -> RecordDict:
    """Check that this site fits the run, and report its clients, its rows and its versions."""
    request = from_record(HelloRequest, content)
    config = site_config(request.config)
    if minor(request.version) != minor(__version__):
        raise SpecError(
            f"the server has the version {request.version[:32]}", f"{__version__}, as here", code="version-mismatch"
        )
    run = SiteRun.open(site, config)
    clients = run.count_clients()
    rows = len(run.train_rows())
    kept = run.rows("evaluation")
    evaluation_rows = 0 if kept is None else len(kept)
    # Notes about the machine may always leave, notes about the rows only where nothing protects them.
    notes = device_notes(config, run.graft.device.type)
    if not run.hides_rows and "notes" in site.policy.tell:
        notes += run.notes()
    reply = HelloReply(
        site=site.name,
        version=__version__,
        clients=clients,
        rows=0 if run.plan else site.policy.told_rows(rows),
        evaluation_rows=0 if run.plan else min(evaluation_rows, site.policy.told_rows(evaluation_rows)),
        base_fingerprint=run.graft.spec.base_fingerprint,
        spec_sha256=run.graft.spec.sha256,
        libraries=_libraries(),
        notes=",".join(notes),
        precision=actual_precision(config.train, run.graft.device.type),
    )
    if advice := precision_advice(config, run.graft.device.type):
        log.info("%s", advice)
    about: dict[str, Any] = {"run": config.run.name, "rows": rows, "spec_sha256": reply.spec_sha256}
    if config.adapter.start_sha256:
        about["start_sha256"] = config.adapter.start_sha256
    site.record("hello", site=site.name, **about)
    return to_record(reply)


def _train(protect: Protect | None, site: Site, content: RecordDict) -> RecordDict:
    """Train, and send the mean update of the site's clients, or in a private run their protected sum."""
    started = time.monotonic()
    request = from_record(TrainRequest, content)
    run = SiteRun.open(site, site_config(request.config), request.round)
    job = run.job(request, content)
    # reading the rows, in the first round also loading the model, has taken its part of the time
    left_s = max(0.0, request.deadline_s - (time.monotonic() - started))
    job = replace(job, request=replace(request, deadline_s=left_s))
    if run.plan is None:
        return _train_openly(run, job)
    plan = _plan_with_masks(run, False)
    total = protected_sum(run, job, plan, protect)
    return _private_reply(run, request, total, total.levels)


def _train_openly(run: SiteRun, job: Job) -> RecordDict:
    """Return the reply of a run that does not protect clients; it may protect their rows."""
    update, trained, rows = train_openly(job)
    run.charge(job)
    # The loss and the seconds follow from the rows, and no noise is on them.
    shared: dict[str, Any] = {}
    seconds = 0.0
    if not run.hides_rows:
        shared = run.site.policy.may_leave({"loss": trained.loss})
        seconds = trained.seconds
    steps = _told_steps(run, trained.steps)
    reply = TrainReply(
        site=run.site.name,
        round=job.request.round,
        nonce=job.request.nonce,
        rows=run.site.policy.told_rows(rows),
        steps=steps,
        loss=shared.get("loss", 0.0),
        loss_shared="loss" in shared,
        seconds=seconds,
        missed_steps=0 if _steps_follow_from_rows(run) else trained.missed_steps,
    )
    arrays = encode(narrow(update, job.graft.spec, job.part), job.part)
    sent = {"bytes": sum(len(array.data) for array in arrays.values()), "update_sha256": sha256(update)}
    run.site.record("trained", run=run.config.run.name, round=job.request.round, steps=trained.steps, **sent)
    return to_record(reply, arrays)


def _told_steps(run: SiteRun, steps: int) -> int:
    """Return the number of steps for the reply. If it follows from the rows, it leaves only with their number."""
    return 1 if _steps_follow_from_rows(run) else steps


def _steps_follow_from_rows(run: SiteRun) -> bool:
    """Return whether the number of steps would tell the number of rows, which the site's policy withholds."""
    train = run.config.train
    follows = train.local_epochs > 0 or train.validate_every_steps > 0
    return follows and "rows" not in run.site.policy.tell


def protected_sum(run: SiteRun, job: Job, plan: Plan, protect: Protect | None = None) -> ProtectedSum:
    """Return the protected sum of the updates of the site's clients, after charging it to the site's ledger.

    Args:
        run: the open run.
        job: the training of the round.
        plan: the run's plan, which is not None here.
        protect: see `make_app`.

    Raises:
        PolicyError: the site's budget does not allow the upload.
    """
    total = (protect or train_protecting_clients)(job, plan)
    run.charge(job)
    return total


def _private_reply(run: SiteRun, request: TrainRequest, total: ProtectedSum, levels: Levels) -> RecordDict:
    """Return the reply of a private run, after it was written to the site's audit log.

    Args:
        run: the open run.
        request: of the round.
        total: the protected sum of the site's clients.
        levels: what is sent of it: itself, or the sum under its masks.
    """
    plan = total.plan
    arrays = encode_levels(levels, plan.modulus_bits)
    run.site.record(
        "trained",
        run=run.config.run.name,
        round=request.round,
        bytes=sum(len(array.data) for array in arrays.values()),
        clients=total.clients,
        clipped=total.clipped,
        null=total.null,
        private=plan.private,
        mode=plan.mode,
    )
    return to_record(PrivateReply(run.site.name, request.round, request.nonce), arrays)


def _evaluate(site: Site, content: RecordDict) -> RecordDict:
    """Measure the adapter on the site's own evaluation rows."""
    import torch

    request = from_record(EvaluateRequest, content)
    config = site_config(request.config)
    run = SiteRun.open(site, config, request.round)
    run.receive(request.spec_sha256, content)
    # Before the rows are read, because a private run may not learn any metric of them.
    site.policy.check_evaluation(config.privacy)
    rows = run.rows("evaluation")
    if rows is None:
        raise DataError(
            "this site keeps no evaluation rows", "data.evaluation in site.toml", code="shard-no-evaluation"
        )
    with torch.no_grad(), computing(config.train, run.graft.device.type):
        metrics = run.graft.task.evaluate(run.graft.base, rows, config.evaluation.batch_size)
    shared: dict[str, Any] = {name: float(value) for name, value in site.policy.may_leave(metrics).items()}
    result = to_record(EvaluateReply(site.name, request.round, request.nonce, site.policy.told_rows(len(rows))))
    result["metrics"] = MetricRecord(shared)
    site.record("evaluated", run=config.run.name, round=request.round, metrics=sorted(shared))
    return result


def _head_sums(site: Site, content: RecordDict) -> RecordDict:
    """Send the sums of the features that the head reads, over the site's training rows."""
    request = from_record(HeadSumsRequest, content)
    config = site_config(request.config)
    run = SiteRun.open(site, config, request.round)
    # Before the rows are read, because a private run may not learn anything about them.
    site.policy.check_head_sums(config.privacy)
    head = warm_head_of(run.graft, config)
    if isinstance(head, str):
        raise SpecError("the server asks for sums of features", "a run with such a head: " + (head or "it has none"))
    run.receive(request.spec_sha256, content)
    encoded = run.train_rows()
    rows = rows_for_sums(len(encoded), config.run.seed, site.name)
    sums = sum_features(run.graft, head, encoded, rows, config.evaluation.batch_size, config.train.threads)
    arrays = encode_numbers(pack_sums(sums))
    sent = sum(len(array.data) for array in arrays.values())
    site.record("head-sums", run=config.run.name, rows=len(rows), classes=sums.classes, bytes=sent)
    return to_record(HeadSumsReply(site.name, request.round, request.nonce, len(rows)), arrays)


def _ended(site: Site, content: RecordDict) -> RecordDict:
    """Note in the site's audit log that a run is over, as the server says."""
    said = read_ended(content)
    site.record("ended", run=said.run, outcome=said.outcome, rounds=said.rounds, rounds_in=said.rounds_in)
    return to_record(EndedReply(site.name))


# The steps of secure aggregation


def _plan_with_masks(run: SiteRun, masked: bool) -> Plan:
    """Return the run's plan, if its uploads are masked as this step needs. A bare upload must not leave a masked run.

    Raises:
        SecureAggregationError: the step does not belong to the run.
    """
    if run.plan is None or run.plan.secure_aggregation != masked:
        raise SecureAggregationError("this step does not belong to the run", "a step that its settings name")
    return run.plan


def _go_on(state: RecordDict, site: Site, request: StageRequest | TrainRequest) -> tuple[SiteRun, Plan, bytes]:
    """Open the run for a step of a session that has begun; return it with its plan and the hash of its terms.

    Raises:
        SecureAggregationError: the run has no such step, or the session began with another round, settings or plan.
    """
    run = SiteRun.open(site, site_config(request.config), request.round)
    plan = _plan_with_masks(run, True)
    return run, plan, secagg.check_bound(state, request, plan)


def _keys(state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Begin a session, bound to all that this site is asked to do in it; send this site's public keys."""
    request = from_record(StageRequest, content)
    fields = beside(content)
    run = SiteRun.open(site, site_config(request.config), request.round)
    plan = _plan_with_masks(run, True)
    run.check_budget({})  # a member that cannot afford the sum must not be missed in its middle
    answer = secagg.answer_keys(state, request, fields, site.name, plan, site.policy, site.node_key())
    return _stage_reply(site, request, answer)


def _shares(state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Send shares of this site's secrets to all sites of the session, each sealed for its receiver."""
    request = from_record(StageRequest, content)
    fields = beside(content)
    run, plan, terms = _go_on(state, site, request)
    clients = run.count_clients()
    sealed = secagg.answer_shares(state, request.session, fields, plan, clients, terms, site.policy)
    return _stage_reply(site, request, sealed)


def _masked(state: RecordDict, protect: Protect | None, site: Site, content: RecordDict) -> RecordDict:
    """Train, and send the protected sum under its masks."""
    request = from_record(TrainRequest, content)
    fields = beside(content)
    run, plan, _ = _go_on(state, site, request)
    # What can be refused is checked before training, which costs the most, and before anything is charged.
    secagg.check_order(state, request, array_records(content).get("arrays"))
    if request.clients:
        raise SecureAggregationError(
            "the server asks some of this site's clients only", "all of them: the others' noise belongs to the sum"
        )
    # Before the round is counted: a member that seals garbage must not use up the rounds of this site's policy.
    secagg.open_shares(state, fields)
    job = run.job(request, content)
    total = protected_sum(run, job, plan, protect)
    levels = secagg.mask(state, fields["session"], total.levels, plan.modulus_bits)
    return _private_reply(run, request, total, levels)


def _unmask(state: RecordDict, site: Site, content: RecordDict) -> RecordDict:
    """Send this site's shares of what opens the sum."""
    request = from_record(StageRequest, content)
    fields = beside(content)
    run, plan, _ = _go_on(state, site, request)
    sent = secagg.answer_unmask(state, request.session, fields, plan)
    site.record("unmasked", run=run.config.run.name, round=request.round, survivors=len(fields["survivors"]))
    return _stage_reply(site, request, sent)


def _stage_reply(site: Site, request: StageRequest, fields: dict[str, Any]) -> RecordDict:
    return to_record(PrivateReply(site.name, request.round, request.nonce), None, fields)


# The apps


def simulated_app(config: RunConfig, only: str = "") -> tuple[ClientApp, int]:
    """Return the ClientApp of a simulation and its number of nodes; each node's `partition-id` picks its site.

    Args:
        config: the run. Its file is split over the sites.
        only: the name of the single site to simulate; empty: all sites.

    Raises:
        ConfigError, DataError: the simulation's file cannot be split as asked.
    """

    def locate(context: Context) -> SimulatedSite:
        sites = simulated_sites(config)
        if only:
            return sites[names.index(only)]
        return sites[int(context.node_config["partition-id"])]

    names = [site.name for site in simulated_sites(config)]
    return make_app(locate), 1 if only else len(names)


def audited_app(config: RunConfig, auditor: Auditor) -> tuple[ClientApp, int]:
    """Return what `simulated_app` returns, with the auditor's marked clients among the sites' own.

    Raises:
        ConfigError, DataError: see `simulated_app`.
    """
    sites = simulated_sites(config)
    auditor.meet({site.name: list(asked_clients(site.name, site.parts, "")) for site in sites})
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])], planted(auditor))
    return app, len(sites)


app = make_app(site_of_node)
