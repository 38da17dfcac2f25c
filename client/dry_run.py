"""Show what a site would send: its ClientApp answers a hello, the first round and an evaluation. Nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tsugiki.client.app import make_app
from tsugiki.client.prepare import load_at
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.site import FileSite
from tsugiki.common import __version__
from tsugiki.common.config.parse import changed
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import UsageError
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.linear_head import LinearHead, warm_head_of
from tsugiki.common.model.rates import with_rates
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.settings import FIRST_TIMEOUT_S
from tsugiki.common.wire.arrays import decode, encode
from tsugiki.common.wire.flower import identify_process, set_message_id
from tsugiki.common.wire.messages import (
    EvaluateRequest,
    HeadSumsRequest,
    HelloRequest,
    TrainRequest,
    error_code,
    to_record,
)
from tsugiki.common.wire.spec import sha256

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict
    from flwr.clientapp import ClientApp


def replies(site: FileSite, config: RunConfig) -> Iterator[tuple[str, RecordDict]]:
    """Yield a title and the content of each reply.

    Args:
        site: the site. Nothing is written to its audit log or its privacy ledger.
        config: the run, as its operator would send it.

    Raises:
        TsugikiError: the site would refuse; the server would receive the error's code.
    """
    # A trial leaves no trace: without the files, nothing is logged or charged.
    policy = site.policy.model_copy(update={"ask": False})  # what is shown here is what somebody says yes to
    quiet = replace(site, site=site.site.model_copy(update={"audit": "", "ledger": ""}), policy=policy)
    app = make_app(lambda context: quiet)
    config = with_rates(config, site.model_source(config.model.name))
    yield "hello", _ask(app, "query", to_record(HelloRequest(config.for_sites(), __version__)))
    graft = load_at(site, config)
    plan = make_plan(config, graft.spec.size)
    arrays = encode(graft.initial, graft.spec)
    if config.adapter.start_from:  # the operator has it; what a site sends has the same form from any start
        config = changed(config, {"adapter.start_sha256": sha256(decode(arrays, graft.spec))})
    if config.run.rounds:
        yield from _training_replies(app, quiet, config, graft, plan, arrays)
    if config.evaluates_at_sites and site.data.evaluation:
        evaluation = EvaluateRequest(config.for_sites(plan), 1, graft.spec.sha256, "0" * 16)
        yield "evaluation at the site", _ask(app, "evaluate", to_record(evaluation, arrays))


def _training_replies(
    app: ClientApp, site: FileSite, config: RunConfig, graft: Graft, plan: Plan | None, arrays: ArrayRecord
) -> Iterator[tuple[str, RecordDict]]:
    """Yield a title and the content of each reply that comes from training rows.

    Args:
        app: of the site.
        site: whose policy decides.
        config: the run.
        graft: its model.
        plan: its privacy plan; None without privacy.
        arrays: the initial adapter, as it is sent.
    """
    # Only if this site would send them: else the server receives a code.
    if isinstance(warm_head_of(graft, config), LinearHead) and site.policy.sends_head_sums:
        sums = HeadSumsRequest(config.for_sites(plan), 0, graft.spec.sha256, "0" * 16)
        yield "sums for a head before round 1", _ask(app, "query.head_sums", to_record(sums, arrays))
    title = "round 1"
    # Masks need other sites. Show the sum below the masks, by an app whose policy does not demand masks.
    if plan and plan.secure_aggregation:
        if plan.noise_multiplier == 0:
            return  # below the masks are bare updates, which no run sends unmasked
        title = "round 1, before it is masked"
        unmasked = {"secure_aggregation": False, "target_epsilon": 0.0, "min_sites": 2}  # more sites need masks
        config = changed(config.with_plan(plan), {f"privacy.{key}": value for key, value in unmasked.items()})
        app = make_app(lambda context: replace(site, policy=SitePolicy(seeded_noise=site.policy.seeded_noise)))
    timeout_s = config.strategy.round_timeout_s
    request = TrainRequest(
        config=config.for_sites(plan),
        round=1,
        spec_sha256=graft.spec.sha256,
        schedule_start=0.0,
        schedule_stop=1.0 / config.run.rounds,
        deadline_s=FIRST_TIMEOUT_S if timeout_s == "auto" else timeout_s,
        nonce="0" * 16,
        clients="",
    )
    yield title, _ask(app, "train", to_record(request, arrays))


def _ask(app: ClientApp, kind: str, content: RecordDict) -> RecordDict:
    """Return the app's answer to a message that no server has sent."""
    from flwr.app import Context, Message, RecordDict

    identify_process()
    message = Message(content, 1, kind)
    set_message_id(message, kind)
    reply = app(message, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    if reply.has_error():
        raise UsageError(
            f"this site would refuse, with the code {error_code(reply)}",
            "a run that fits the site",
            "the line above, which says why",
            code=error_code(reply),
        )
    return reply.content
