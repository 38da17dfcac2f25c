"""Small federations: a real one over a tiny BERT, and a toy one whose sites answer from a formula.

Every training row of the real one carries `CANARY`, so that any test can ask whether something private got out.
"""

from __future__ import annotations

import atexit
import csv
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_app, simulated_app
from client.site import read_site
from common import __version__
from common.config import RunConfig, parse
from common.messages import EvaluateReply, HelloReply, HelloRequest, TrainReply, TrainRequest, from_record, to_record
from common.wire import AdapterSpec, TensorSpec, Vector, decode, encode
from server.app import Outcome
from server.audit import AuditLog, verify
from server.checkpoint import State
from server.engines.grid import Stop
from server.engines.in_process import Fault, InProcessGrid, identify_process
from server.guard import Asked
from server.loop import Parts, initial_state, run_rounds
from server.roster import Roster
from server.simulate import SimulatedApp, simulate
from server.storage import read_lines
from tests.support.tiny import tiny_bert

CANARY = "patient Jane hf_abc123"
CANARIES = ("patient Jane", "patient jane", "hf_abc123")


@functools.cache
def model_folder() -> str:
    """Return the folder of the tiny model, written once for each test process."""
    folder = tempfile.mkdtemp(prefix="tsugiki-test-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(tiny_bert(Path(folder)))


def write_rows(path: Path, count: int = 24, **extra: Callable[[int], str]) -> Path:
    """Write rows of two classes, told apart by one word, each with the canary; `extra` adds columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", *extra])
        for row in range(count):
            word = ("good", "bad")[row % 2]
            text = f"the {word} clause number {row // 2}, {CANARY}"
            writer.writerow([text, 1 - row % 2, *(value(row) for value in extra.values())])
    return path


def _merged(base: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    return parse({name: {**base.get(name, {}), **changes.get(name, {})} for name in {**base, **changes}})


def tiny_config(folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """Return a run of two sites and two rounds over the tiny model; writes its data into `folder` where they lack.

    Args:
        folder: holds train.csv, dev.csv and runs/.
        sections: settings that differ, as train={"local_steps": 1}.
    """
    if not (folder / "train.csv").exists():
        write_rows(folder / "train.csv")
        write_rows(folder / "dev.csv", 8)
    base = {
        "run": {"name": "tiny", "rounds": 2, "output_dir": str(folder / "runs")},
        "model": {"name": model_folder(), "public_name": "tsugiki-tests/tiny-bert"},
        "task": {"name": "sequence-classification", "max_length": 16},
        "adapter": {"method": "lora", "rank": 2},
        "train": {"learning_rate": 1e-2, "local_steps": 2, "per_device_train_batch_size": 4, "threads": 1},
        "evaluation": {"data": str(folder / "dev.csv")},
        "simulation": {"clients": 2, "data": str(folder / "train.csv")},
    }
    return _merged(base, sections)


def run_tiny(config: RunConfig, client: SimulatedApp = simulated_app, **options: Any) -> Outcome:
    """Run the tiny federation; options go to `server.simulate.simulate`."""
    return simulate(config, client, **options)


def site_folder(folder: Path, name: str, train: str = "train.csv") -> Path:
    """Write a real site's folder: eight rows and a site.toml; return the site.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.csv", 8)
    site = folder / "site.toml"
    site.write_text(
        f'[site]\nname = "{name}"\n[data]\ntrain = "{train}"\n[models]\n"{model_folder()}" = "{model_folder()}"\n'
    )
    return site


def app_of_sites(files: list[Path]) -> SimulatedApp:
    """Return what makes the ClientApp of real sites, each node by its own site.toml."""

    def locate(context: Context) -> Any:
        return read_site(files[int(context.node_config["partition-id"])])

    return lambda config, only="": (make_app(locate), len(files))


def leaks(folder: Path, *texts: str) -> list[str]:
    """Return where a canary is found: files under `folder` by name, and given texts by number."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(canary.encode() in path.read_bytes() for canary in CANARIES):
            found.append(str(path.relative_to(folder)))
    return found + [f"text {n}" for n, text in enumerate(texts) if any(canary in text for canary in CANARIES)]


def server_log(caplog: pytest.LogCaptureFixture) -> str:
    """Return what was logged, but for the client's own log, which stays at the site."""
    caplog.handler.setFormatter(None)
    return "\n".join(caplog.handler.format(record) for record in caplog.records if record.name != "tsugiki.client")


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass at every look at the server's clock: its waits end at once, and always alike."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), sleep=lambda pause: None)
    monkeypatch.setattr("server.engines.grid.time", clock)
    monkeypatch.setattr("server.roster.time", clock)


# The toy federation

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


def toy_app(sites: list[str], update: Update = ones, rows: int = 10, **hello: Any) -> ClientApp:
    """Return a ClientApp whose node n is `sites[n - 1]`; `hello` replaces fields of every hello."""
    app = ClientApp()

    def name(context: Context) -> str:
        return sites[int(context.node_config["partition-id"])]

    @app.query()
    def hello_handler(message: Message, context: Context) -> Message:
        from_record(HelloRequest, message.content)
        fields: dict[str, Any] = {
            "site": name(context),
            "version": __version__,
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
        reply = TrainReply(name(context), request.round, request.nonce, rows, 1, 0.5, 0.0)
        return Message(to_record(reply, encode(value, SPEC)), reply_to=message)

    @app.evaluate()
    def evaluate_handler(message: Message, context: Context) -> Message:
        request = message.content.config_records["request"]
        reply = EvaluateReply(name(context), int(request["round"]), str(request["nonce"]), rows)  # type: ignore[arg-type]  # ours
        content = to_record(reply)
        content["metrics"] = MetricRecord({"accuracy": 0.5})
        return Message(content, reply_to=message)

    return app


def toy_config(folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """Return a run of three rounds and at least two sites, for the toy federation."""
    base = {
        "run": {"name": "toy", "rounds": 3, "output_dir": str(folder)},
        "strategy": {"name": "fedavg", "round_timeout_s": 30.0, "connect_timeout_s": 30.0},
    }
    return _merged(base, sections)


def toy_parts(
    folder: Path,
    app: ClientApp,
    nodes: int,
    config: RunConfig | None = None,
    fault: Fault | None = None,
    **fields: Any,
) -> Parts:
    """Return the parts of a toy run in `folder`; `fields` replaces others of `Parts`."""
    config = config or toy_config(folder)
    grid, audit, stop = InProcessGrid(app, nodes, fault), AuditLog(folder / "audit.jsonl"), Stop()
    roster = Roster(grid, config, SPEC, audit, stop)
    known = {"evaluate": None, "lower_is_better": False, "stop": stop}
    return Parts(config=config, spec=SPEC, grid=grid, roster=roster, folder=folder, audit=audit, **{**known, **fields})


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
    """Run a toy federation to its end; options as for `toy_parts`."""
    parts = toy_parts(folder, app, nodes, config, **options)
    parts.roster.wait(lambda count: None)
    return Ran(folder, run_rounds(parts, toy_state()))


# Replies, and how they are forged

ASKED = Asked("site-0", 1, 3, "0123456789abcdef", 10)
"""What `train_reply` answers."""


def train_reply(arrays: Any = None, **fields: Any) -> Message:
    """Return a good reply to `ASKED`, with other arrays or other fields of its `reply` record; None removes a field."""
    identify_process()
    reply = TrainReply("site-0", 3, "0123456789abcdef", 10, 5, 0.5, 0.1)
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
