"""Fuzz targets: every decoder of bytes that come from elsewhere, with hostile variants of what it takes.

Each target is a strategy and a function. Whatever the strategy draws, the function returns a value or raises a
`TsugikiError`, within bounds on time and memory (`probe`). `tests/test_fuzz.py` runs each target for a moment, with the
same examples every time; `scripts/fuzz.py` runs them for as long as it is told, with other examples every time.
"""

from __future__ import annotations

import json
import signal
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch  # noqa: F401  # a first import takes seconds, and no example is to blame
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.support.mutations import (
    FIELD_VALUES,
    mutated_bytes,
    mutated_fields,
    mutated_json,
    mutated_toml,
    mutated_value,
)
from tests.support.private import private_config
from tests.support.toy import ASKED, SPEC, of_array, train_reply
from tsugiki.client import secagg
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.records import SiteRecords
from tsugiki.client.site.site import read_site
from tsugiki.common.adapters.tensors import read_tensors
from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.config.files import commented, from_run_config, read, to_run_config
from tsugiki.common.config.parse import parse, site_config
from tsugiki.common.errors import TsugikiError
from tsugiki.common.files import read_json, read_lines
from tsugiki.common.head_sums import check_sums, numbers_of, unpack_sums
from tsugiki.common.keys import fingerprint, key_of, new_key_pair, point_of, read_private_key, read_public_key
from tsugiki.common.model.exported import EXPORTED_FILE, read_exported
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.privacy.secagg import protocol
from tsugiki.common.privacy.secagg.messages import Answer, ClientState, check_names, from_fields
from tsugiki.common.wire import messages
from tsugiki.common.wire.arrays import (
    ARRAY_KEY,
    decode,
    decode_levels,
    decode_numbers,
    encode,
    encode_levels,
    encode_numbers,
)
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.inflate import inflate
from tsugiki.common.wire.spec import unpack
from tsugiki.server.deploy.keyring import REVOKED, revoked
from tsugiki.server.report.run_files import read_run
from tsugiki.server.report.verification import verify_folder
from tsugiki.server.run import checkpoint, guard
from tsugiki.server.run.secagg import _key_reader

MOST_BYTES = 64 * 2**20
"""Most memory that one example may take: all inputs here are small."""
MOST_S = 20
"""Seconds after which an example counts as one that never ends."""


@dataclass(frozen=True)
class Target:
    """A decoder, and what it is given.

    Args:
        examples: draws inputs.
        decode: takes one of them.
    """

    examples: st.SearchStrategy[Any]
    decode: Callable[[Any], Any]


def probe(target: Target, example: Any) -> None:
    """Decode an example. Any exception but ours, too much memory, and no end are failures."""
    tracemalloc.start()
    try:
        with _ended_after(MOST_S):
            target.decode(example)
    except TsugikiError as error:
        str(error)  # it has to be shown, too
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak:,} bytes"


@contextmanager
def _ended_after(seconds: int) -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@cache
def folder() -> Path:
    """Return a folder for the files that targets read, the same for all of a process."""
    keeper = tempfile.TemporaryDirectory(prefix="tsugiki-fuzz-")
    _KEPT.append(keeper)
    return Path(keeper.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, content: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Arrays, records, messages

_HALF = replace(SPEC, wire_dtype="float16")
_ONES = np.ones(SPEC.size, np.float32)
_LEVELS = np.arange(SPEC.size, dtype=np.int64) - 2
_NUMBERS = numbers_of(2, 2)
_RECORDS = {
    "float32": encode(_ONES, SPEC),
    "float16": encode(_ONES, _HALF),
    "levels": encode_levels(_LEVELS, 40),
    "numbers": encode_numbers(np.ones(_NUMBERS)),
}


@st.composite
def _arrays(draw: st.DrawFn) -> tuple[str, ArrayRecord]:
    """Draw a kind of array, and a record of it whose bytes, keys or declarations are forged."""
    kind = draw(st.sampled_from(sorted(_RECORDS)))
    array = _RECORDS[kind][ARRAY_KEY]
    data = draw(mutated_bytes([array.data, *(one[ARRAY_KEY].data for one in _RECORDS.values())]))
    dtype = draw(st.sampled_from([array.dtype, array.dtype, "float64", "object", "<f4", "", "\x00", ">f4", "V4"]))
    shape = draw(st.sampled_from([array.shape, array.shape, (), (-1,), (2**62,), (1, SPEC.size), (SPEC.size, 0)]))
    stype = draw(st.sampled_from([array.stype, array.stype, "pickle", ""]))
    key = draw(st.sampled_from([ARRAY_KEY, ARRAY_KEY, "", "x"]))
    found = {key: Array(dtype, shape, stype, data)}
    if draw(st.booleans()):
        found = {ARRAY_KEY: Array(array.dtype, array.shape, array.stype, data)}
    return kind, ArrayRecord(found)


def _decode_array(example: tuple[str, ArrayRecord]) -> Any:
    kind, record = example
    if kind == "levels":
        levels = decode_levels(record, SPEC.size, 40)
        return levels.unpacked(), levels.l2_norm()
    if kind == "numbers":
        sums = unpack_sums(decode_numbers(record, _NUMBERS), 2, 2)
        return check_sums(sums, 4)
    spec = SPEC if kind == "float32" else _HALF
    return unpack(decode(record, spec), spec)


_MESSAGES: list[Any] = [
    messages.HelloRequest("{}", "0.1.0"),
    messages.HelloReply("a", "0.1.0", 1, 10, 0, "f" * 64, "5" * 64, "python 3.11", "shard-one-class"),
    messages.TrainRequest("{}", 1, "5" * 64, 0.0, 0.5, 600.0, "nonce", ""),
    messages.TrainReply("a", 1, "nonce", 10, 5, 0.5, True, 0.1),
    messages.StageRequest("{}", 1, bytes(16), "nonce"),
    messages.PrivateReply("a", 1, "nonce"),
    messages.EvaluateRequest("{}", 1, "5" * 64, "nonce"),
    messages.EvaluateReply("a", 1, "nonce", 10),
    messages.HeadSumsRequest("{}", 0, "5" * 64, "nonce"),
    messages.HeadSumsReply("a", 0, "nonce", 10),
    messages.EndedRequest("june", "finished", 10, 9),
    messages.EndedReply("a"),
]


@st.composite
def _contents(draw: st.DrawFn) -> tuple[type[Any], RecordDict]:
    message = draw(st.sampled_from(_MESSAGES))
    content = messages.to_record(message)
    (name,) = content
    fields = draw(mutated_fields(dict(content.config_records[name])))
    return type(message), RecordDict({draw(st.sampled_from([name, name, name, "x"])): ConfigRecord(fields)})


def _decode_message(example: tuple[type[Any], RecordDict]) -> Any:
    kind, content = example
    return messages.from_record(kind, content), messages.beside(content)


@st.composite
def _replies(draw: st.DrawFn) -> tuple[str, Message]:
    """Draw a reply to `ASKED`, as the guard gets it."""
    identify_process()
    if draw(st.integers(0, 9)) == 0:
        reason = draw(st.one_of(st.text(), st.sampled_from(["policy-members:a", "client-error:X", "a:b:c"])))
        return "open", Message(Error(draw(st.sampled_from([0, 1, 1000, -1, 2**31])), reason), reply_to=train_reply())
    good = train_reply()
    fields = draw(mutated_fields(dict(good.content.config_records["reply"])))
    arrays = draw(st.one_of(_arrays().map(lambda one: one[1]), st.just(of_array(_ONES))))
    records: dict[str, Any] = {"reply": ConfigRecord(fields), "arrays": arrays}
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(["arrays", "reply", "metrics", "secagg"]))
        others = [MetricRecord({"a": 1.0}), ConfigRecord({"a": "b"}), ArrayRecord({})]
        records[name] = draw(st.sampled_from(others))
    reply = Message(RecordDict(records), metadata=good.metadata)
    return draw(st.sampled_from(["open", "private", "evaluation", "step", "sums"])), reply


@cache
def _plan() -> Any:
    config = private_config("distributed", noise_multiplier=1.0, secure_aggregation=True, clients=4)
    return make_plan(config, SPEC.size)


def _judge(example: tuple[str, Message]) -> Any:
    kind, reply = example
    if kind == "private":
        return guard.check_private(reply, ASKED, _plan())
    if kind == "evaluation":
        return guard.check_evaluation(reply, ASKED)
    if kind == "step":
        return guard.check_step(reply, ASKED, lambda fields: fields)
    if kind == "sums":
        return guard.check_head_sums(reply, ASKED, 2, 2)
    return guard.check(reply, ASKED, SPEC, 100.0)


# A message in its objects


@cache
def _objects() -> tuple[str, dict[str, bytes]]:
    identify_process()
    array = ArrayRecord({"x": Array(np.arange(100, dtype=np.float32))})
    message = Message(RecordDict({"r": ConfigRecord({"a": 1, "b": [b"x"]}), "arrays": array}), 5, "train")
    return message.object_id, {key: one.deflate() for key, one in get_all_nested_objects(message).items()}


@st.composite
def _uploads(draw: st.DrawFn) -> tuple[str, dict[str, bytes]]:
    """Draw a message's objects, one of them forged; its name and what refers to it may follow."""
    object_id, contents = _objects()
    key = draw(st.sampled_from(sorted(contents)))
    content = contents[key]
    if draw(st.booleans()) and b"arraychunk_ids" in content:
        head, body = content.split(b"\x00", 1)
        body = draw(mutated_json(json.loads(body)))
        content = b" ".join([*head.split(b" ")[:-1], str(len(body)).encode()]) + b"\x00" + body
    else:
        content = draw(mutated_bytes([content, *contents.values()]))
    if not draw(st.booleans()):
        return object_id, {**contents, key: content}
    new = get_object_id(content)
    others = {name: one.replace(key.encode(), new.encode()) for name, one in contents.items() if name != key}
    return new if key == object_id else object_id, {**others, new: content}


# Secure aggregation

_SITES = ("a", "b", "c", "d")
_SESSION = bytes(range(16))


@cache
def _keys() -> dict[str, Any]:
    return {name: protocol.start(_SESSION, name) for name in _SITES}


@cache
def _node_key() -> Any:
    return ec.generate_private_key(ec.SECP384R1())


@st.composite
def _steps(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    kind = draw(st.sampled_from(sorted(_FIELDS)))
    return kind, draw(mutated_fields(_FIELDS[kind]()))


def _listed() -> dict[str, Any]:
    keys = [_keys()[name].public_keys for name in _SITES]
    return {"keys_names": list(_SITES), "keys_values": keys, "clients": [1] * 4, "needed": 3}


_FIELDS: dict[str, Callable[[], dict[str, Any]]] = {
    "state": lambda: _keys()["a"].to_dict(),
    "answer": lambda: Answer({"a": bytes(32)}, {"b": bytes(32)}).to_dict(),
    "announced": lambda: {"public_keys": _keys()["b"].public_keys, "counts_on": 1},
    "signed": lambda: {
        "public_keys": _keys()["b"].public_keys,
        "counts_on": 1,
        "signed": point_of(_node_key().public_key()) + bytes(96),
    },
    "keys": lambda: {"order": bytes(32)},
    "shares": _listed,
    "members": lambda: {
        **_listed(),
        "signed_names": list(_SITES),
        "signed_values": [point_of(_node_key().public_key()) + bytes(96)] * 4,
    },
    "received": lambda: {"session": _SESSION, "sealed_names": ["b", "c", "d"], "sealed_values": [bytes(92)] * 3},
    "unmask": lambda: {"survivors": list(_SITES), "dropped": []},
    "names": lambda: {"x_names": list(_SITES), "x_values": [bytes(8)] * 4},
}


def _take_step(example: tuple[str, dict[str, Any]]) -> Any:
    kind, fields = example
    if kind == "state":
        return ClientState.from_dict(fields)
    if kind == "answer":
        return Answer.from_dict(fields, ["a"], ["b"])
    if kind in ("announced", "signed"):
        return _key_reader(bytes(32))("b", fields)
    if kind == "names":
        return check_names(fields.get("x_names")), from_fields("x", fields, 8)
    return _answer_step(kind, fields)


def _answer_step(kind: str, fields: dict[str, Any]) -> Any:
    """Let a site answer a step of the server, from a session as far as that."""
    state = RecordDict()
    request = messages.StageRequest("{}", 1, _SESSION, "nonce")
    policy = SitePolicy()
    if kind == "members":
        pin = fingerprint(_node_key().public_key())
        policy = SitePolicy(members=(f"b {pin}",))
    if kind == "keys":
        return secagg.answer_keys(state, request, fields, "a", _plan(), policy, _node_key())
    if kind in ("shares", "members"):
        state[secagg.STATE] = ConfigRecord(_keys()["a"].to_dict())
        return secagg.answer_shares(state, _SESSION, fields, _plan(), 1, bytes(32), policy)
    listed = {name: one.public_keys for name, one in _keys().items()}
    begun, _ = protocol.make_shares(_keys()["a"], listed, 3, bytes(32))
    if kind == "received":
        state[secagg.STATE] = ConfigRecord(begun.to_dict())
        return secagg.open_shares(state, fields)
    held = {name: bytes(64) for name in _SITES}
    masked = replace(begun, step="masked", mask_private=b"", share_private=b"", seed=b"", held=held)
    state[secagg.STATE] = ConfigRecord(masked.to_dict())
    state[secagg.COUNTS] = ConfigRecord(dict.fromkeys(_SITES, 1))
    return secagg.answer_unmask(state, _SESSION, fields, _plan())


# Settings: of a server, of a site, of an operator


def _run() -> Any:
    return private_config("distributed", noise_multiplier=1.0, secure_aggregation=True)


def _tables() -> dict[str, Any]:
    return json.loads(_run().for_sites(None))


@st.composite
def _flat_settings(draw: st.DrawFn) -> dict[str, Any]:
    flat = to_run_config(_run())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from([*sorted(flat), "x", "run.", "privacy.examples.delta"]))
        flat[key] = draw(FIELD_VALUES)
    return flat


_SITE = """[site]
name = "acme"
audit = "audit.jsonl"
max_rank = 4
[data]
train = "train.csv"
columns = { text = "sentence" }
[server]
address = "127.0.0.1:9092"
[policy]
tasks = ["causal-lm"]
max_epsilon = 8.0
members = ["bolt SHA256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
[models]
"a" = "/models/a"
"""


def _read_settings(content: bytes) -> Any:
    return site_config(content.decode("utf-8", "surrogateescape"))


# Exports and keys


def _manifest() -> dict[str, Any]:
    return {
        "format": 1,
        "task": {"name": "sequence-classification", "labels": ["a", "b"]},
        "adapter": {"method": "lora", "rank": 4, "target_modules": ["query"]},
        "heads": ["classifier"],
        "base_name": "org/model",
        "base_fingerprint": "f" * 64,
        "dtype": "float32",
        "spec_sha256": "5" * 64,
        "constants": {"pooling": "mean"},
        "head_file": "",
    }


def _read_export(content: bytes) -> Any:
    path = _file(f"export/{EXPORTED_FILE}", content)
    exported = read_exported(path.parent)
    return exported.make_task(), exported.make_method(path.parent)


_TENSORS = save({"lora_A.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)})


@cache
def _pair() -> tuple[bytes, bytes]:
    path = folder() / "pair"
    new_key_pair(path)
    return path.read_bytes(), path.with_name("pair.pub").read_bytes()


def _read_keys(content: bytes) -> Any:
    private = _file("node.key", content)
    private.chmod(0o600)
    tries: list[Callable[[], Any]] = [
        lambda: read_private_key(private),
        lambda: fingerprint(read_public_key(private)),
        lambda: key_of(content[:49]),
    ]
    return [_tried(one) for one in tries]


def _tried(call: Callable[[], Any]) -> Any:
    """Return the result of one of several decoders of one example, or its error of ours."""
    try:
        return call()
    except TsugikiError as error:
        return error.code


# Logs


@cache
def _records() -> dict[str, list[dict[str, Any]]]:
    """Return the lines of a site's audit log and ledger, without their chain."""
    place = folder() / "seed"
    place.mkdir(exist_ok=True)
    records = SiteRecords(place / "audit.jsonl", place / "ledger.jsonl", "acme")
    policy = SitePolicy()
    records.write("hello", site="acme", run="one", rows=8, spec_sha256="5" * 64)
    records.admit("a" * 64, policy)
    records.begin_round("one", 1, policy)
    with records.charging() as anchor:
        Ledger(place / "ledger.jsonl", 1e-5, {}).charge(
            "release", Release("gaussian", 4.0), run="one", round=1, **anchor
        )
    records.write("trained", run="one", round=1, bytes=100)
    return {name: verify(place / f"{name}.jsonl") for name in ("audit", "ledger")}


@st.composite
def _logs(draw: st.DrawFn) -> dict[str, bytes]:
    """Draw a site's two logs: with other bytes, or with other values in a chain that is whole."""
    found = {}
    for name, lines in _records().items():
        plain = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if draw(st.booleans()):
            found[name] = draw(mutated_bytes([plain]))
            continue
        index = draw(st.integers(0, len(lines) - 1))
        changed = draw(mutated_value({key: lines[index][key] for key in lines[index] if key not in _CHAIN}))
        other = changed if isinstance(changed, dict) else {}
        found[name] = _chained([*lines[:index], other, *lines[index + 1 :]])
    return found


_CHAIN = ("sequence", "previous", "hash")


def _chained(lines: list[dict[str, Any]]) -> bytes:
    """Return lines with an intact chain, as somebody writes them who knows how it is made."""
    path = _file("chained.jsonl", b"")
    bodies = [{key: value for key, value in line.items() if key not in (*_CHAIN, "event")} for line in lines]
    AuditLog(path).write_all((line.get("event", "x"), body) for line, body in zip(lines, bodies, strict=True))
    return path.read_bytes()


def _read_logs(example: dict[str, bytes]) -> Any:
    place = folder() / "logs"
    paths = {name: _file(f"logs/{name}.jsonl", content) for name, content in example.items()}
    _file("logs/site.toml", b'[site]\nname = "acme"\nledger = "ledger.jsonl"\n')
    tries: list[Callable[[], Any]] = [
        lambda: SiteRecords(paths["audit"], paths["ledger"], "acme").check(),
        lambda: Ledger(paths["ledger"], 1e-5, {}).epsilons(),
        lambda: Ledger(paths["ledger"], 1e-5, {}).rounds("one"),
        lambda: verify_folder(place),
    ]
    return [_tried(one) for one in tries]


_LINE = {
    "round": 1,
    "accepted": {"a": {"rows": 3, "norm": 0.5}},
    "rejected": {},
    "train_loss": 0.5,
    "seconds": {"wait": 1.0},
}
_SUMMARY = {"name": "one", "rounds": 1, "before": {"accuracy": 0.1}, "after": {"accuracy": 0.2}, "best_round": 1}


def _read_run(example: tuple[bytes, bytes]) -> Any:
    lines, summary = example
    place = _file("read/metrics.jsonl", lines + b"\n").parent
    path = _file("read/summary.json", summary)
    tries: list[Callable[[], Any]] = [
        lambda: read_run(place),
        lambda: read_lines(path),
        lambda: read_json(path),
        lambda: verify_folder(place),
    ]
    return [_tried(one) for one in tries]


@cache
def _checkpoint() -> tuple[str, bytes]:
    """Return a checkpoint's name and bytes."""
    from tests.support.toy import toy_state

    place = folder() / "checkpoint"
    checkpoint.save(place, toy_state(), {"train.seed": 1}, SPEC.sha256)
    (path,) = place.glob("*.safetensors")
    return path.name, path.read_bytes()


def _read_checkpoint(content: bytes) -> Any:
    path = _file(f"resumed/{_checkpoint()[0]}", content)
    tries = [
        lambda: checkpoint.load(path.parent, {"train.seed": 1}, SPEC.sha256),
        lambda: checkpoint.read_anchors(path.parent),
    ]
    return [_tried(one) for one in tries]


_REVOKED = {"event": "revoked", "fingerprint": "SHA256:x", "name": "acme", "date": "2026-01-01"}


TARGETS: dict[str, Target] = {
    "arrays": Target(_arrays(), _decode_array),
    "messages": Target(_contents(), _decode_message),
    "replies": Target(_replies(), _judge),
    "objects": Target(_uploads(), lambda example: inflate(*example, 1_000_000)),
    "secure aggregation": Target(_steps(), _take_step),
    "settings of a server": Target(st.deferred(lambda: mutated_json(_tables())), _read_settings),
    "Flower's run config": Target(_flat_settings(), from_run_config),
    "run file": Target(
        st.deferred(lambda: mutated_toml(commented("sequence-classification", "lora", "fedavg"))),
        lambda content: read(_file("run.toml", content)),
    ),
    "tables": Target(
        st.deferred(lambda: mutated_value(_tables())), lambda raw: parse(raw if isinstance(raw, dict) else {})
    ),
    "site.toml": Target(mutated_toml(_SITE), lambda content: read_site(_file("site.toml", content))),
    "export": Target(mutated_json(_manifest()), _read_export),
    "tensors": Target(
        mutated_bytes([_TENSORS]), lambda content: read_tensors(_file("export/adapter_model.safetensors", content))
    ),
    "keys": Target(st.deferred(lambda: mutated_bytes(_pair())), _read_keys),
    "logs of a site": Target(_logs(), _read_logs),
    "files of a run": Target(st.tuples(mutated_json(_LINE), mutated_json(_SUMMARY)), _read_run),
    "checkpoint": Target(st.deferred(lambda: mutated_bytes([_checkpoint()[1]])), _read_checkpoint),
    "revoked keys": Target(
        mutated_json(_REVOKED), lambda content: revoked(_file(f"keyring/{REVOKED}", content + b"\n").parent)
    ),
}
