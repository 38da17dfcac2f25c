"""Measure the cost of secure aggregation against open aggregation: seconds at a client, bytes, and a deployed round.

    python scripts/bench/secagg.py [--rounds 5] [--no-deployed]

In one process: 30 sites of the trivial app with 150,000 numbers run the real protocol. In every round one site drops
out after the shares, and another after its masked sum. A client's time is the sum of its four steps, without training.
Deployed: `tsugiki serve` and five `tsugiki client` on loopback, all-MiniLM with a LoRA of 147,456 numbers, one local
step. Each is compared with the same run with the same noise but without masks. Needs the extra [demo].
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench"), str(ROOT)]

import numpy as np
from figures import Figure, median, show, spread
from flwr.app import Message
from flwr.clientapp import ClientApp
from trivial import trivial_spec

import tsugiki  # first: it switches off what would phone home
from tests.support.serving import metrics, serve_and_join, started
from tsugiki.client import secagg
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.split import split
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.files import read
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.arrays import encode_levels
from tsugiki.common.wire.messages import (
    HelloReply,
    PrivateReply,
    StageRequest,
    TrainRequest,
    beside,
    from_record,
    to_record,
)
from tsugiki.common.wire.spec import AdapterSpec
from tsugiki.server.demo.demo import write_files
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.privacy import open_privacy
from tsugiki.server.run.roster import Roster

SITES, LEAST, FLOATS = 30, 26, 150_000
DEPLOYED = 5


def private_app(spec: AdapterSpec, plan: Plan, seconds: dict[str, float]) -> ClientApp:
    """Return a ClientApp that protects zeros instead of training, and adds up the seconds of its steps by site."""
    app = ClientApp()
    policy = SitePolicy()

    def name(context: Any) -> str:
        return f"site-{int(context.node_config['partition-id']):02d}"

    def timed(context: Any, started: float, answer: Any) -> Any:
        seconds[name(context)] += time.perf_counter() - started
        return answer

    def protected() -> Any:
        total = ProtectedSum.empty(plan)
        total.add(np.zeros((1, plan.dimension)))
        return total.levels

    @app.query()
    def hello(message: Any, context: Any) -> Any:
        reply = HelloReply(name(context), tsugiki.__version__, 1, 0, 0, "0" * 64, spec.sha256, "", "")
        return Message(to_record(reply), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        started, request = time.perf_counter(), from_record(TrainRequest, message.content)
        arrays = encode_levels(protected(), plan.modulus_bits)
        content = to_record(PrivateReply(name(context), request.round, request.nonce), arrays)
        return timed(context, started, Message(content, reply_to=message))

    @app.train("masked")
    def masked(message: Any, context: Any) -> Any:
        started, request = time.perf_counter(), from_record(TrainRequest, message.content)
        fields = beside(message.content)
        secagg.check_order(context.state, request, message.content.array_records["arrays"])
        secagg.open_shares(context.state, fields)
        levels = secagg.mask(context.state, fields["session"], protected(), plan.modulus_bits)
        content = to_record(
            PrivateReply(name(context), request.round, request.nonce), encode_levels(levels, plan.modulus_bits)
        )
        return timed(context, started, Message(content, reply_to=message))

    def step(which: str, message: Any, context: Any) -> Any:
        started, request = time.perf_counter(), from_record(StageRequest, message.content)
        fields, state = beside(message.content), context.state
        if which == "keys":
            sent = secagg.answer_keys(state, request, fields, name(context), plan, policy, None)
        elif which == "shares":
            terms = secagg.check_bound(state, request, plan)
            sent = secagg.answer_shares(state, request.session, fields, plan, 1, terms, policy)
        else:
            sent = secagg.answer_unmask(state, request.session, fields, plan)
        content = to_record(PrivateReply(name(context), request.round, request.nonce), None, sent)
        return timed(context, started, Message(content, reply_to=message))

    @app.query("keys")
    def keys(message: Any, context: Any) -> Any:
        return step("keys", message, context)

    @app.query("shares")
    def shares(message: Any, context: Any) -> Any:
        return step("shares", message, context)

    @app.query("unmask")
    def unmask(message: Any, context: Any) -> Any:
        return step("unmask", message, context)

    return app


def dropping(node: int, reply: Any) -> list[Any]:
    """Replace the replies of two sites by errors: one fails in training, the other when a sum is unmasked."""
    from flwr.app import Error
    from flwr.app.message import make_message

    fails = (node, reply.metadata.message_type) in ((3, "train.masked"), (3, "train"), (5, "query.unmask"))
    return [make_message(reply.metadata, error=Error(1000, "site-stopping")) if fails else reply]


def in_process(secure: bool, rounds: int, folder: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the lines of metrics.jsonl, one for each round, and each client's mean seconds in a round."""
    folder.mkdir()
    spec, seconds = trivial_spec(FLOATS), defaultdict(float)
    privacy = {"mode": "distributed", "noise_multiplier": 4.0, "secure_aggregation": secure, "enrolled_clients": SITES}
    raw = {"run": {"rounds": rounds}, "strategy": {"min_clients": LEAST}, "privacy": privacy}
    config = parse(raw)
    plan = make_plan(config, spec.size)
    if plan is None:
        raise ValueError("a private run has a plan")
    audit, stop = AuditLog(folder / "audit.jsonl"), Stop()
    grid = InProcessGrid(private_app(spec, plan, seconds), SITES, dropping)
    roster = Roster(grid, config, spec, plan, audit, stop)
    roster.wait(lambda count: None)
    private = open_privacy(plan, config, folder / "ledger.jsonl", audit)
    ctx = RunContext(config, spec, grid, roster, None, False, folder, audit, stop=stop, privacy=private)
    run_rounds(ctx, initial_state(np.zeros(spec.size, np.float32)))
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["round"]]
    return lines, [total / rounds for total in seconds.values()]


def deployed_config(secure: bool, rounds: int, folder: Path) -> RunConfig:
    """Return the settings of a run of five sites on loopback."""
    file, _ = write_files(folder / "data", 1)
    changes = ["adapter.rank=16", "adapter.freeze_a=no", "train.threads=1", "train.local_steps=1"]
    changes += [f"run.rounds={rounds}", f"run.name=secure-{secure}".lower(), f"run.output_dir={folder / 'runs'}"]
    changes += ["strategy.min_clients=5", "strategy.connect_timeout_s=300", "evaluation.data="]
    changes += ["simulation.partition=iid", "simulation.column=", f"simulation.clients={DEPLOYED}"]
    changes += ["privacy.mode=distributed", "privacy.noise_multiplier=4.0", "privacy.delta=1e-3"]
    return read(file, [*changes, f"privacy.secure_aggregation={str(secure).lower()}"])


def deployed(secure: bool, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of a real server with five real clients, without the first round."""
    folder.mkdir()
    config = deployed_config(secure, rounds + 1, folder)
    sites = split(config, folder / "sites")
    with started() as start:
        server, _ = serve_and_join(start, folder, config, ["--insecure", "--no-export"], ["--insecure"], sites)
        if server.wait(500) != 0:
            raise SystemExit(server.text())
    return metrics(config)[1:]


def traffic(lines: list[dict[str, Any]]) -> float:
    """Return the median bytes of a round, both ways."""
    return median([line["bytes_up"] + line["bytes_down"] for line in lines])


def compare(title: str, secure: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[Figure]:
    """Return the figures of rounds with masks, compared with rounds without."""
    waits = [[line["seconds"]["wait"] for line in lines] for lines in (secure, plain)]
    accepted = {len(line["accepted"]) for line in secure}
    megabytes = [traffic(lines) / 1e6 for lines in (secure, plain)]
    return [
        Figure(f"{title}: bytes against no masks", traffic(secure) / traffic(plain), "ratio", "<= 3"),
        Figure(f"{title}: bytes of a round", megabytes[0], "MB", "", f"no masks {megabytes[1]:.2f} MB"),
        Figure(f"{title}: seconds of a round", median(waits[0]), "s", "", f"{spread(waits[0])}; in the sum {accepted}"),
        Figure(f"{title}: seconds of a round, no masks", median(waits[1]), "s", "", spread(waits[1])),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deployed", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        secure, plain, clients, bare = [], [], [], []
        for pair in range(2):
            lines, seconds = in_process(True, options.rounds, folder / f"secure-{pair}")
            secure, clients = secure + lines, clients + seconds
            lines, seconds = in_process(False, options.rounds, folder / f"plain-{pair}")
            plain, bare = plain + lines, bare + seconds
        note = f"largest {max(clients):.3f}, n = {len(clients)}; without masks {median(bare):.3f}"
        figures.append(Figure(f"a client's time in a round, {SITES} sites", median(clients), "s", "<= 1", note))
        figures += compare(f"{SITES} sites in one process, 2 drop out", secure, plain)
        if options.deployed:
            secure = deployed(True, options.rounds, folder / "deployed-secure")
            plain = deployed(False, options.rounds, folder / "deployed-plain")
            figures += compare(f"{DEPLOYED} real clients on loopback", secure, plain)
    show(f"Secure aggregation, {FLOATS:,} numbers", figures)


if __name__ == "__main__":
    main()
