"""The ClientApp: hello, train, evaluate, and the boundary that turns every exception into a code."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.site import SimulatedSite, Site, simulated_sites, site_of_node
from client.trainer import Plan, Watch, steps_per_round, train
from client.update import make_update
from common import __version__, minor
from common.config import RunConfig
from common.errors import DataError, SpecError, TsugikiError, WireError
from common.messages import (
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    TrainReply,
    TrainRequest,
    error_reply,
    from_record,
    site_config,
    to_record,
)
from common.model import Graft, load_graft
from common.tasks.base import Encoded
from common.wire import Vector, decode, encode, sha256

log = logging.getLogger("tsugiki.client")

Locate = Callable[[Context], Site]


@dataclass
class Desk:
    """What a client process keeps between messages: tokenised shards, one base model (in `common.model`)."""

    encoded: dict[tuple[str, str, str], Encoded | None] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    watch: Watch = lambda step, steps, losses: None

    def graft(self, site: Site, config: RunConfig) -> Graft:
        """Return the base with the run's adapter on it."""
        return load_graft(config, site.model_source(config.model.name), config.run.seed)

    def rows(self, site: Site, config: RunConfig, part: str) -> Encoded | None:
        """Return the site's tokenised rows for "train" or "evaluation"."""
        graft = self.graft(site, config)
        key = (site.identity(), part, f"{graft.spec.base_fingerprint}{config.task.model_dump_json()}")
        if key not in self.encoded:
            shard = site.train_shard(graft.task) if part == "train" else site.evaluation_shard(graft.task)
            self.encoded[key] = None if shard is None else graft.task.encode(shard, graft.base)
            if shard is not None and part == "train":
                self.notes[site.name] = shard.notes
        return self.encoded[key]


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
    graft = _load(site, config)
    rows, kept = _train_rows(site, config), _desk.rows(site, config, "evaluation")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "transformers", "peft"))
    reply = HelloReply(
        site=site.name,
        version=__version__,
        rows=len(rows),
        evaluation_rows=0 if kept is None else len(kept),
        base_fingerprint=graft.spec.base_fingerprint,
        spec_sha256=graft.spec.sha256,
        libraries=f"python {platform.python_version()}, {libraries}",
        notes=",".join(_desk.notes.get(site.name, ())),
    )
    site.record("hello", run=config.run.name, rows=reply.rows, spec_sha256=reply.spec_sha256)
    return to_record(reply)


def _load(site: Site, config: RunConfig, round_: int = 0) -> Graft:
    """Return the graft, if the site's policy allows the run and the base model."""
    site.policy.check_run(config, round_)
    graft = _desk.graft(site, config)
    site.policy.check_base(graft.spec.base_fingerprint)
    return graft


def _train(site: Site, content: RecordDict) -> RecordDict:
    request = from_record(TrainRequest, content)
    config = site_config(request.config)
    graft, received = _receive(site, config, request, content)
    rows = _train_rows(site, config)
    site.policy.check_steps(steps_per_round(len(rows), config.train))
    plan = Plan(
        seed=config.run.seed,
        site=site.name,
        round=request.round,
        schedule_start=request.schedule_start,
        schedule_stop=request.schedule_stop,
        proximal_mu=config.strategy.proximal_mu,
        deadline_s=request.deadline_s,
    )
    trained = train(graft, rows, config.train, plan, _desk.watch)
    update = make_update(graft.read(), received)
    shared = site.policy.may_leave({"loss": trained.loss})
    reply = TrainReply(
        site=site.name,
        round=request.round,
        nonce=request.nonce,
        rows=len(rows),
        steps=trained.steps,
        loss=shared.get("loss", 0.0),
        loss_shared="loss" in shared,
        seconds=trained.seconds,
    )
    arrays = encode(update, graft.spec)
    sent = {"bytes": sum(len(array.data) for array in arrays.values()), "update_sha256": sha256(update)}
    site.record("trained", run=config.run.name, round=request.round, steps=trained.steps, **sent)
    return to_record(reply, arrays)


def _evaluate(site: Site, content: RecordDict) -> RecordDict:
    import torch

    request = from_record(EvaluateRequest, content)
    config = site_config(request.config)
    graft, _ = _receive(site, config, request, content)
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
) -> tuple[Graft, Vector]:
    """Check that both sides mean the same adapter, and set it to the received values."""
    graft, theirs = _load(site, config, request.round), request.spec_sha256
    if graft.spec.sha256 != theirs:
        raise SpecError(f"the server's adapter spec {theirs[:12]}", f"{graft.spec.sha256[:12]}, this site's")
    arrays = content.array_records.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise WireError("no adapter in the message", "one array", code="keys")
    graft.write(decode(arrays, graft.spec))
    return graft, graft.read()  # as the parameters hold it: 16-bit ones have rounded it


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
