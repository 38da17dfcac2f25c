"""Private runs for tests: their plans, and a toy federation whose sites protect what they send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tests.support.toy import SPEC, Ran, Update, ones, toy_app, toy_context
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.parse import parse, site_config
from tsugiki.common.config.run import RunConfig
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.arrays import decode, encode_levels
from tsugiki.common.wire.messages import PrivateReply, TrainRequest, from_record, to_record
from tsugiki.server.engines.in_process import Fault
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.privacy import Privacy, open_privacy

LEDGER = "privacy-ledger.jsonl"


def private_config(
    mode: str,
    *,
    folder: Path | str = "runs",
    clients: int = 4,
    rounds: int = 3,
    strategy: Mapping[str, Any] | None = None,
    **privacy: Any,
) -> RunConfig:
    """Return a run in a privacy mode; a sum takes all of its clients unless `strategy` differs."""
    # A site knows the noise of its own clients, so that shares of noise allow few gateways.
    gateways = {} if mode in ("none", "distributed") else {"max_clients_per_site": 100}
    return parse(
        {
            "run": {"name": "toy", "rounds": rounds, "output_dir": str(folder)},
            "strategy": {
                "min_clients": clients,
                "round_timeout_s": 30.0,
                "connect_timeout_s": 30.0,
                **(strategy or {}),
            },
            "privacy": {"mode": mode, "enrolled_clients": clients, **gateways, **privacy},
        }
    )


def plan_of(mode: str, dimension: int = SPEC.size, **options: Any) -> Plan:
    """Return the plan of `private_config(mode, **options)`."""
    plan = make_plan(private_config(mode, **options), dimension)
    assert plan is not None
    return plan


def privacy_of(plan: Plan, folder: Path, seed: int = 0) -> Privacy:
    """Return the server's part of a plan, with a ledger of its own and no budget."""
    return Privacy(plan, Ledger(folder / LEDGER, plan.delta, {}), "toy", seed)


def private_app(
    sites: list[str], update: Update = ones, clients: int = 1, asked: list[tuple[str, int, str]] | None = None
) -> ClientApp:
    """Return a ClientApp whose node n is `sites[n - 1]`, each with so many clients; `asked` is told every request."""
    app, base = ClientApp(), toy_app(sites, update, rows=0, clients=clients)

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return base(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = from_record(TrainRequest, message.content)
        config, site = site_config(request.config), sites[int(context.node_config["partition-id"])]
        if asked is not None:
            asked.append((site, request.round, request.clients))
        plan = make_plan(config, SPEC.size)
        assert plan is not None
        total = ProtectedSum.empty(plan, config.privacy.insecure_noise_seed)
        received = decode(message.content.array_records["arrays"], SPEC)
        for client in request.clients.split(",") if request.clients else range(clients):
            total.add(update(site, request.round, received)[np.newaxis], f"{site}/{client}", request.round)
        reply = PrivateReply(site, request.round, request.nonce)
        return Message(to_record(reply, encode_levels(total.levels, plan.modulus_bits)), reply_to=message)

    return app


def private_context(
    folder: Path, app: ClientApp, nodes: int, config: RunConfig, fault: Fault | None = None
) -> RunContext:
    """Return the context of a private toy run in `folder`, with its ledger there."""
    plan = make_plan(config, SPEC.size)
    privacy = open_privacy(plan, config, folder / LEDGER, AuditLog(folder / "audit.jsonl"))
    return toy_context(folder, app, nodes, config, fault, privacy=privacy)


def run_private(folder: Path, app: ClientApp, nodes: int, config: RunConfig, fault: Fault | None = None) -> Ran:
    """Run a private toy federation to its end."""
    ctx = private_context(folder, app, nodes, config, fault)
    ctx.roster.wait(lambda count: None)
    assert ctx.privacy is not None
    return Ran(folder, run_rounds(ctx, initial_state(np.zeros(SPEC.size, np.float32), asdict(ctx.privacy.plan))))


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Check that a file is the same after a `with` block as before it, or not there both times."""
    before = path.read_bytes() if path.exists() else None
    yield
    assert (path.read_bytes() if path.exists() else None) == before
