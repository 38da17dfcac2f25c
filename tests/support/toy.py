"""A toy federation, whose sites answer from a formula, and forged replies: for tests that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tests.support.federation import leaks, merged
from tsugiki.common import __version__
from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import read_lines
from tsugiki.common.wire.arrays import ARRAY_KEY, decode, encode
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.messages import (
    EvaluateReply,
    HelloReply,
    HelloRequest,
    TrainReply,
    TrainRequest,
    from_record,
    to_record,
)
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec, Vector
from tsugiki.server.engines.grid import Stop
from tsugiki.server.engines.in_process import Fault, InProcessGrid
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.federation import Outcome, run_federation
from tsugiki.server.run.loop import initial_state, run_rounds
from tsugiki.server.run.replies import Asked
from tsugiki.server.run.roster import Roster

SPEC = AdapterSpec(
    "sequence-classification",
    "lora",
    "{}",
    "0" * 64,
    "float32",
    (TensorSpec("layer.lora_A", (4, 8), "adapter"), TensorSpec("layer.lora_B", (8,), "head")),
)
Update = Callable[[str, int, Vector], Vector]
"""From site, round and the received adapter to the site's update."""


def ones(site: str, round_: int, received: Vector) -> Vector:
    """The update of a site that always answers the same."""
    return np.full(SPEC.size, 0.25, np.float32)


def toy_app(
    sites: list[str],
    update: Update = ones,
    rows: int = 10,
    metrics: Callable[[str, int], Mapping[str, float]] = lambda site, round_: {"accuracy": 0.5},
    **hello: Any,
) -> ClientApp:
    """Return a ClientApp whose node n is `sites[n - 1]`.

    Args:
        sites: names.
        update: what a site sends.
        rows: of each site, to train and to evaluate on.
        metrics: of a site's evaluation, by site and round. With a NaN among them, the guard rejects the evaluation.
        hello: replaces fields of every hello.
    """
    app = ClientApp()

    def name(context: Context) -> str:
        return sites[int(context.node_config["partition-id"])]

    @app.query()
    def hello_handler(message: Message, context: Context) -> Message:
        from_record(HelloRequest, message.content)
        fields: dict[str, Any] = {
            "site": name(context),
            "version": __version__,
            "clients": 1,
            "rows": rows,
            "evaluation_rows": rows,
            "base_fingerprint": SPEC.base_fingerprint,
            "spec_sha256": SPEC.sha256,
            "libraries": "",
            "notes": "",
        }
        return Message(to_record(HelloReply(**{**fields, **hello})), reply_to=message)

    @app.train()
    def train_handler(message: Message, context: Context) -> Message:
        request = from_record(TrainRequest, message.content)
        received = decode(message.content.array_records["arrays"], SPEC)
        value = update(name(context), request.round, received)
        reply = TrainReply(name(context), request.round, request.nonce, rows, 1, 0.5, True, 0.0)
        return Message(to_record(reply, encode(value, SPEC)), reply_to=message)

    @app.evaluate()
    def evaluate_handler(message: Message, context: Context) -> Message:
        request = message.content.config_records["request"]
        reply = EvaluateReply(name(context), int(request["round"]), str(request["nonce"]), rows)  # type: ignore[arg-type]  # ours
        content = to_record(reply)
        content["metrics"] = MetricRecord(dict(metrics(name(context), int(request["round"]))))  # type: ignore[arg-type]  # ours
        return Message(content, reply_to=message)

    return app


def toy_config(folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """Return a run of three rounds and at least two sites, for the toy federation."""
    base = {
        "run": {"name": "toy", "rounds": 3, "output_dir": str(folder)},
        "task": {"name": "sequence-classification", "warm_head": "off"},
        "train": {"learning_rate": 1e-3, "head_learning_rate": 1e-3},
        # the toys' updates differ in length, and their plain mean is what most tests expect
        "strategy": {"name": "fedavg", "round_timeout_s": 30.0, "connect_timeout_s": 30.0, "norm_tolerance": 5.0},
    }
    return merged(base, sections)


def toy_context(
    folder: Path,
    app: ClientApp,
    nodes: int,
    config: RunConfig | None = None,
    fault: Fault | None = None,
    **fields: Any,
) -> RunContext:
    """Return the context of a toy run in `folder`; `fields` replaces others of `RunContext`."""
    config = config or toy_config(folder)
    if fields.get("evaluate"):
        held_out = config.evaluation.model_copy(update={"data": "held-out.csv"})  # which nobody reads
        config = config.model_copy(update={"evaluation": held_out})
    grid = InProcessGrid(app, nodes, fault)
    audit = AuditLog(folder / "audit.jsonl")
    stop = Stop()
    privacy = fields.get("privacy")
    roster = Roster(grid, config, SPEC, privacy.plan if privacy else None, audit, stop)
    known = {"folder": folder, "audit": audit, "stop": stop, "evaluate": None, "lower_is_better": False}
    return RunContext(config=config, spec=SPEC, grid=grid, roster=roster, **{**known, **fields})


def toy_state() -> State:
    """Return the state before the first toy round: all zeros."""
    return initial_state(np.zeros(SPEC.size, np.float32))


@dataclass(frozen=True)
class Ran:
    """What a toy run left: its last state, and the records in its folder."""

    folder: Path
    state: State

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl after the one before training."""
        return [line for line in read_lines(self.folder / "metrics.jsonl") if line["round"]]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The audit log, its chain verified."""
        return verify(self.folder / "audit.jsonl")


def run_toy(folder: Path, app: ClientApp, nodes: int, config: RunConfig | None = None, **options: Any) -> Ran:
    """Run a toy federation to its end; options as for `toy_context`."""
    ctx = toy_context(folder, app, nodes, config, **options)
    ctx.roster.wait(lambda count: None)
    return Ran(folder, run_rounds(ctx, toy_state()))


def federate(
    monkeypatch: pytest.MonkeyPatch,
    app: ClientApp,
    nodes: int,
    config: RunConfig,
    fault: Fault | None = None,
    **options: Any,
) -> Outcome:
    """Run a toy federation as `run_federation` does, from its start to its summary, without a model."""
    task = SimpleNamespace(lower_is_better=frozenset())
    base = SimpleNamespace(constants={})
    graft = SimpleNamespace(spec=SPEC, base=base, initial=np.zeros(SPEC.size, np.float32), task=task, device="none")
    monkeypatch.setattr("tsugiki.server.run.federation.load_graft", lambda *arguments: graft)
    return run_federation(InProcessGrid(app, nodes, fault), config, **options)


BY_SITE = {"a": 1.0, "b": 50.0, "c": 3.0}


def mostly_two(site: str, round_: int, received: Vector) -> Vector:
    """Without b, the mean of three sites a, b and c is 2."""
    return np.full(SPEC.size, BY_SITE[site], np.float32)


def run_with_bad_site(folder: Path, forge: Callable[[Message], Message | None]) -> Ran:
    """Run two rounds of sites a, b and c, where the replies of b are forged."""
    config = toy_config(folder, run={"rounds": 2}, strategy={"max_update_norm": 1000.0})
    return run_toy(folder, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=forging(2, forge))


def check_only_rejected(ran: Ran, *reasons: str) -> None:
    """Check that b was rejected in both rounds for one of the reasons, the others were averaged, nothing leaked."""
    assert [line["round"] for line in ran.rounds] == [1, 2]
    for line in ran.rounds:
        assert list(line["accepted"]) == ["a", "c"]
        assert list(line["rejected"]) == ["b"]
        assert line["rejected"]["b"]["reason"] in reasons
    rejected = [event["rejected"] for event in ran.events if event["event"] == "round"]
    assert [list(one) for one in rejected] == [["b"], ["b"]]
    assert all(one["b"] in reasons for one in rejected)
    assert np.array_equal(ran.state.vector, np.full(SPEC.size, 4.0, np.float32))
    assert leaks(ran.folder) == []


# Replies, and how they are forged

ASKED = Asked("site-0", 1, 3, "0123456789abcdef", 10)
"""What `train_reply` answers."""


def train_reply(arrays: Any = None, **fields: Any) -> Message:
    """Return a good reply to `ASKED`, with other arrays or other fields of its `reply` record; None removes a field."""
    identify_process()
    reply = TrainReply("site-0", 3, "0123456789abcdef", 10, 5, 0.5, True, 0.1)
    arrays = encode(np.full(SPEC.size, 0.5, np.float32), SPEC) if arrays is None else arrays
    return rewritten(Message(to_record(reply, arrays), 1, "train"), **fields)


def rewritten(reply: Message, **fields: Any) -> Message:
    """Return a copy of a reply whose `reply` record has other values; None removes the key."""
    record = {**reply.content.config_records["reply"], **fields}
    content = RecordDict({name: value for name, value in reply.content.items() if name != "reply"})
    content["reply"] = ConfigRecord({key: value for key, value in record.items() if value is not None})
    return Message(content, metadata=reply.metadata)


def with_arrays(reply: Message, arrays: Any) -> Message:
    """Return a copy of a reply with other arrays."""
    content = RecordDict({name: value for name, value in reply.content.items() if name != "arrays"})
    content["arrays"] = arrays
    return Message(content, metadata=reply.metadata)


def of_array(array: Any) -> ArrayRecord:
    """Return the record of an adapter that is this NumPy array."""
    return ArrayRecord({ARRAY_KEY: Array(array)})


def of_bytes(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (SPEC.size,)) -> ArrayRecord:
    """Return the record of an adapter with these bytes, whatever type and shape are declared."""
    return ArrayRecord({ARRAY_KEY: Array(dtype, shape, "numpy.ndarray", data)})


def forging(node: int, forge: Callable[[Message], Message | None]) -> Fault:
    """Return a fault that forges the training replies of one node; None loses them."""

    def fault(sender: int, reply: Message) -> list[Message]:
        if sender != node or not is_train(reply) or reply.has_error():
            return [reply]
        forged = forge(reply)
        return [] if forged is None else [forged]

    return fault


def is_train(reply: Message) -> bool:
    """Whether a message belongs to training, not to a hello or an evaluation."""
    return str(reply.metadata.message_type) == "train"
