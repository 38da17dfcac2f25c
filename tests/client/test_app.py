import logging
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from tests.support.federation import CANARIES, CANARY, app_of_sites, site_folder, tiny_config, write_rows
from tests.support.tiny import tiny_llama
from tsugiki.client.app import simulated_app
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training import cohort
from tsugiki.common import __version__
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import DataError, SpecError
from tsugiki.common.head_sums import check_sums, numbers_of, unpack_sums
from tsugiki.common.model.linear_head import linear_head
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.arrays import decode, decode_numbers, encode
from tsugiki.common.wire.messages import (
    ENDED,
    EndedReply,
    EndedRequest,
    EvaluateReply,
    EvaluateRequest,
    HeadSumsReply,
    HeadSumsRequest,
    HelloReply,
    HelloRequest,
    TrainReply,
    TrainRequest,
    from_record,
    to_record,
)
from tsugiki.common.wire.spec import sha256
from tsugiki.server.engines.in_process import InProcessGrid

NONCE = "0123456789abcdef"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run whose sites keep a quarter of their rows for evaluation."""
    return tiny_config(tmp_path_factory.mktemp("run"), simulation={"evaluation_fraction": 0.25})


@pytest.fixture
def graft(config):
    """The shared model, at its initial values."""
    graft = load_graft(config, config.model.name, config.run.seed)
    graft.write(graft.initial)
    return graft


def ask(config, kind, content, node=1, client=simulated_app):
    """Send one message to a simulated site; return its reply."""
    grid = InProcessGrid(*client(config))
    ids = grid.push_messages([Message(content, node, kind)])
    return grid.pull_messages(ids)[0]


def train_request(config, graft, /, **fields):
    """Return the content of a train request with the initial adapter."""
    request = TrainRequest(config.for_sites(), 1, graft.spec.sha256, 0.0, 0.5, 600.0, NONCE, "")
    return to_record(replace(request, **fields), encode(graft.initial, graft.spec))


def evaluate_request(config, graft, /, **fields):
    """Return the content of an evaluate request with the initial adapter."""
    request = EvaluateRequest(config.for_sites(), 1, graft.spec.sha256, NONCE)
    return to_record(replace(request, **fields), encode(graft.initial, graft.spec))


def test_hello_says_who_is_there(config, graft):
    """Catches: rows for evaluation counted as rows to train on, another site's name, a spec of something else."""
    reply = ask(config, "query", to_record(HelloRequest(config.for_sites(), __version__)), node=2)
    hello = from_record(HelloReply, reply.content)
    assert (hello.site, hello.version, hello.rows, hello.evaluation_rows) == ("site-1", __version__, 9, 3)
    assert (hello.spec_sha256, hello.base_fingerprint) == (graft.spec.sha256, graft.spec.base_fingerprint)
    assert hello.notes == "shard-texts-cut:9"
    for library in ("python", "flwr", "torch", "transformers", "peft"):
        assert f"{library} " in hello.libraries


def test_hello_notes_what_is_unusual_about_the_training_rows(tmp_path):
    """Catches: notes of the evaluation rows in the place of those of the training rows."""
    config = tiny_config(tmp_path)
    file = site_folder(tmp_path / "acme", "acme")
    write_rows(tmp_path / "acme" / "held.csv", 8)
    (tmp_path / "acme" / "train.csv").write_text("text,label\n" + f"{CANARY},1\n" * 4)
    text = file.read_text().replace("[models]", 'evaluation = "held.csv"\n[models]')
    file.write_text(f'[policy]\ntell = ["rows", "notes"]\n{text}')
    request = to_record(HelloRequest(config.for_sites(), __version__))
    reply = ask(config, "query", request, client=app_of_sites([file]))
    hello = from_record(HelloReply, reply.content)
    assert (hello.site, hello.rows, hello.evaluation_rows) == ("acme", 4, 8)
    assert hello.notes == "shard-one-class,shard-texts-cut:4"


def test_hello_notes_what_was_cut(tmp_path):
    """Catches: notes of the file alone; a count that the tokeniser made and nobody hears of."""
    base = tiny_llama(tmp_path / "base")
    (tmp_path / "titles.txt").write_text("good clause\n\n" + "the bad clause number nine of a party\n" * 2)
    site = tmp_path / "site.toml"
    site.write_text(f'[site]\nname = "acme"\n[data]\ntrain = "titles.txt"\n[models]\nbase = "{base}"\n')
    site.write_text(site.read_text() + '[policy]\ntell = ["rows", "notes"]\n')
    config = tiny_config(tmp_path, model={"name": "base"}, task={"name": "causal-lm", "max_length": 8})
    request = to_record(HelloRequest(config.for_sites(), __version__))
    hello = from_record(HelloReply, ask(config, "query", request, client=app_of_sites([site])).content)
    assert (hello.rows, hello.notes) == (3, "shard-texts-cut:2")


@pytest.mark.parametrize("there", [True, False])
def test_hello_says_in_which_precision_the_site_computes(tmp_path, monkeypatch, there):
    """Catches: a run that asks for bfloat16, trains in float32 on a device without it, and says nothing."""
    monkeypatch.setattr("tsugiki.common.model.device.has_bf16", lambda device: there)
    config = tiny_config(tmp_path, train={"precision": "bf16", "device": "cpu"})
    hello = from_record(
        HelloReply, ask(config, "query", to_record(HelloRequest(config.for_sites(), __version__))).content
    )
    assert ("no-bf16" in hello.notes.split(",")) == (not there)
    assert hello.precision == ("bf16" if there else "float32")
    assert "shard-texts-cut:12" in hello.notes.split(",")


def test_training_answers_with_the_update_alone(config, graft):
    """Catches: weights in the place of their change, another round's nonce, anything more in the reply."""
    reply = ask(config, "train", train_request(config, graft, round=1))
    answer = from_record(TrainReply, reply.content)
    assert (answer.site, answer.round, answer.nonce, answer.rows, answer.steps) == ("site-0", 1, NONCE, 9, 2)
    assert set(reply.content) == {"reply", "arrays"}
    update = decode(reply.content.array_records["arrays"], graft.spec)
    assert 0 < np.abs(update).max() < 0.1
    assert np.allclose(graft.read(), graft.initial + update, atol=1e-7)


def test_training_starts_from_what_was_received(config, graft):
    """Catches: training that goes on from what another site left in the shared model."""
    first = ask(config, "train", train_request(config, graft))
    graft.write(graft.initial + 1)
    second = ask(config, "train", train_request(config, graft))
    one, other = (decode(reply.content.array_records["arrays"], graft.spec) for reply in (first, second))
    assert np.array_equal(one, other)


def test_evaluation_answers_with_metrics(config, graft):
    """Catches: metrics of the training rows, or of what the shared model holds."""
    graft.write(graft.initial + 1)
    reply = ask(config, "evaluate", evaluate_request(config, graft))
    assert from_record(EvaluateReply, reply.content) == EvaluateReply("site-0", 1, NONCE, 3)
    metrics = dict(reply.content.metric_records["metrics"])
    assert set(metrics) == {"accuracy", "macro_f1", "loss"}
    site = simulated_sites(config)[0]
    encoded = graft.task.encode(site.evaluation_shard(graft.task), graft.base)
    with torch.no_grad():
        assert metrics == pytest.approx(graft.task.evaluate(graft.base, encoded, 64))
    assert np.array_equal(graft.read(), graft.initial)


def code(reply):
    """Return the code of an error reply, after checking that it is one."""
    assert reply.has_error()
    assert reply.error.code == 1000
    return reply.error.reason


def test_a_site_without_evaluation_rows_says_so(tmp_path, graft):
    """Catches: an error of Python's for a site that keeps no rows."""
    config = tiny_config(tmp_path)
    assert code(ask(config, "evaluate", evaluate_request(config, graft))) == "shard-no-evaluation"


def test_what_does_not_fit_is_answered_with_a_code(config, graft):
    """Catches: training on something else than what was agreed, and an error's text in the reply."""
    good = train_request(config, graft)
    no_arrays = RecordDict({"request": good["request"]})
    metrics = RecordDict({"request": good["request"], "arrays": ConfigRecord({"adapter": "x"})})
    empty = RecordDict({"request": good["request"], "arrays": ArrayRecord()})
    unknown = ConfigRecord({**good.config_records["request"], "more": 1})
    wrong = ConfigRecord({**good.config_records["request"], "round": "1"})
    foreign = asdict(from_record(TrainRequest, good)) | {"config": '{"task": {"name": "nonsense"}}'}
    arrays = good["arrays"]
    cases = {
        "keys": [no_arrays, metrics, empty, RecordDict(), RecordDict({"request": unknown, "arrays": arrays})],
        "type": [RecordDict({"request": wrong, "arrays": arrays})],
        "config-invalid": [RecordDict({"request": ConfigRecord(foreign), "arrays": arrays})],
        "spec-mismatch": [train_request(config, graft, spec_sha256="0" * 64)],
    }
    for expected, contents in cases.items():
        for content in contents:
            assert code(ask(config, "train", content)) == expected


@pytest.mark.parametrize("text", ["{", "3", "null", "[1]", "[" * 100_000, '{"task": {"name": {}}}'])
def test_a_config_that_cannot_be_read_is_answered_with_a_code(config, graft, text):
    """Catches: an exception that leaves the app, also while the app looks up whether the run is private."""
    assert code(ask(config, "train", train_request(config, graft, config=text))) == "config-invalid"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(f"{CANARY} in row 3"), "client-error:ValueError"),
        (DataError(f"{CANARY}", code="shard-empty"), "shard-empty"),
        (SpecError(CANARY), "spec-mismatch"),
        (MemoryError(CANARY), "out-of-memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})(CANARY), "out-of-memory"),
        (KeyboardInterrupt(CANARY), "client-error:KeyboardInterrupt"),
        (SystemExit(CANARY), "client-error:SystemExit"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_an_exception_leaves_as_a_code_and_stays_in_the_local_log(config, graft, monkeypatch, caplog, error, expected):
    """Catches: an exception's text, which may hold a site's data, in the reply; and a reason that nobody can find."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(cohort, "train", fail)
    with caplog.at_level(logging.WARNING):
        reply = ask(config, "train", train_request(config, graft))
    assert code(reply) == expected
    assert not any(canary in repr(reply) for canary in CANARIES)
    assert {record.name for record in caplog.records} == {"tsugiki.client"}
    assert CANARY in caplog.text


def test_a_divergent_run_is_answered_with_its_code(config, graft):
    """Catches: NaN sent to the server."""
    request = train_request(config, graft)
    request["arrays"] = encode(np.full(graft.spec.size, 1e38, np.float32), graft.spec)
    assert code(ask(config, "train", request)) == "diverged"


def test_one_site_can_be_alone(config):
    """Catches: a baseline of one site that gets another site's rows, or all nodes."""
    app, nodes = simulated_app(config, "site-1")
    assert nodes == 1
    reply = ask(config, "query", to_record(HelloRequest(config.for_sites(), __version__)), client=lambda _: (app, 1))
    assert from_record(HelloReply, reply.content).site == "site-1"


def test_the_number_of_nodes_is_the_number_of_sites(tmp_path):
    """Catches: simulation.clients taken where the file decides."""
    write_rows(tmp_path / "train.csv", 9, company=lambda row: "abc"[row % 3])
    config = tiny_config(tmp_path, simulation={"partition": "by-column", "column": "company"}, evaluation={"data": ""})
    assert simulated_app(config)[1] == 3


@pytest.fixture
def acme(tmp_path):
    """Makes the app of a real site, with a policy, and returns it with the site's folder."""

    def make(policy=""):
        file = site_folder(tmp_path / "acme", "acme")
        write_rows(tmp_path / "acme" / "held.csv", 8)
        text = file.read_text().replace("[models]", 'evaluation = "held.csv"\n[models]')
        file.write_text(f"[policy]\n{policy}\n{text}")
        return app_of_sites([file]), tmp_path / "acme"

    return make


@pytest.mark.parametrize(
    ("policy", "kind", "refused"),
    [
        ('tasks = ["sentence-embedding"]', "query", "policy-task"),
        ('adapters = ["houlsby"]', "query", "policy-adapter"),
        ('base_fingerprints = ["ffffffffffff"]', "query", "policy-base"),
        ("max_rounds = 1", "query", "policy-rounds"),
        ("max_local_steps = 1", "train", "policy-steps"),
        ('tasks = ["sentence-embedding"]', "train", "policy-task"),
        ('tasks = ["sentence-embedding"]', "evaluate", "policy-task"),
    ],
)
def test_a_sites_policy_has_the_last_word(config, graft, acme, policy, kind, refused):
    """Catches: a policy that is asked in the hello only, which a server can leave out."""
    client, folder = acme(policy)
    contents = {
        "query": to_record(HelloRequest(config.for_sites(), __version__)),
        "train": train_request(config, graft),
        "evaluate": evaluate_request(config, graft),
    }
    assert code(ask(config, kind, contents[kind], client=client)) == refused
    events = verify(folder / "audit.jsonl")
    assert {event["event"] for event in events[:-1]} <= {"settings"}
    assert (events[-1]["event"], events[-1]["kind"], events[-1]["code"]) == ("refused", kind, refused)


def test_a_site_keeps_a_log_of_its_own(config, graft, acme):
    """Catches: a site that cannot tell afterwards what left it; rows in its log."""
    client, folder = acme()
    ask(config, "query", to_record(HelloRequest(config.for_sites(), __version__)), client=client)
    reply = ask(config, "train", train_request(config, graft), client=client)
    ask(config, "evaluate", evaluate_request(config, graft), client=client)
    settings, hello, begun, trained, evaluated = verify(folder / "audit.jsonl")
    events = [event["event"] for event in (settings, hello, begun, trained, evaluated)]
    assert events == ["settings", "hello", "training", "trained", "evaluated"]
    assert trained["update_sha256"] == sha256(decode(reply.content.array_records["arrays"], graft.spec))
    assert trained["bytes"] == sum(len(array.data) for array in reply.content.array_records["arrays"].values())
    assert evaluated["metrics"] == ["accuracy", "loss", "macro_f1"]
    assert not [canary for canary in CANARIES if canary in (folder / "audit.jsonl").read_text()]


def test_metrics_that_may_not_leave_stay(config, graft, acme):
    """Catches: a loss that leaves in the reply although the policy names accuracy only."""
    client, _ = acme('metrics = ["accuracy"]')
    reply = ask(config, "train", train_request(config, graft), client=client)
    answer = from_record(TrainReply, reply.content)
    assert (answer.loss, answer.loss_shared) == (0.0, False)
    reply = ask(config, "evaluate", evaluate_request(config, graft), client=client)
    assert set(reply.content.metric_records["metrics"]) == {"accuracy"}


def test_a_server_of_another_version_is_refused(config):
    """Catches: two versions that misunderstand each other in silence."""
    request = to_record(HelloRequest(config.for_sites(), "99.0.0"))
    assert code(ask(config, "query", request)) == "version-mismatch"


def test_a_failure_in_a_private_run_has_one_code_for_all(tmp_path, monkeypatch, caplog):
    """Catches: a class of exceptions, which rows may have raised, told to the server; a failure nobody can find."""

    def fail(job, plan):
        raise UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY)

    monkeypatch.setattr("tsugiki.client.app.train_protecting_clients", fail)
    private = tiny_config(tmp_path, privacy={"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3})
    loaded = load_graft(private, private.model.name, private.run.seed)
    assert code(ask(private, "train", train_request(private, loaded))) == "client-error"
    assert CANARY in caplog.text


def test_no_metrics_leave_a_private_run(tmp_path):
    """Catches: exact metrics and a number of rows for whoever asks, beside updates with noise on them."""
    privacy = {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}
    private = tiny_config(tmp_path, privacy=privacy, simulation={"evaluation_fraction": 0.25})
    loaded = load_graft(private, private.model.name, private.run.seed)
    request = EvaluateRequest(private.for_sites(), 1, loaded.spec.sha256, NONCE)
    reply = ask(private, "evaluate", to_record(request, encode(loaded.initial, loaded.spec)))
    assert code(reply) == "policy-evaluation"


def sums_request(config, loaded):
    """Return the content of a request for sums, with the initial adapter."""
    request = HeadSumsRequest(config.for_sites(), 0, loaded.spec.sha256, NONCE)
    return to_record(request, encode(loaded.initial, loaded.spec))


def test_sums_of_features_leave_with_their_number_of_rows(config):
    """Catches: sums over the rows that are kept for evaluation; another site's name or nonce."""
    warm = changed(config, {"task.warm_head": "auto"})
    loaded = load_graft(warm, warm.model.name, warm.run.seed)
    reply = ask(warm, "query.head_sums", sums_request(warm, loaded))
    answer = from_record(HeadSumsReply, reply.content)
    assert (answer.site, answer.round, answer.nonce, answer.rows) == ("site-0", 0, NONCE, 9)
    head = linear_head(loaded)
    numbers = decode_numbers(reply.content.array_records["arrays"], numbers_of(head.width, head.classes))
    check_sums(unpack_sums(numbers, head.width, head.classes), 9)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({}, "spec-mismatch"),
        ({"privacy": {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}}, "policy-head-sums"),
        ({"privacy": {"examples": {"noise_multiplier": 1.0, "delta": 1e-3}}}, "policy-head-sums"),
    ],
)
def test_sums_that_the_run_does_not_need_stay(config, changes, refusal):
    """Catches: a server that asks for exact sums in a private run, or in one that has the head off."""
    asked = changed(config, {"task.warm_head": "auto" if changes else "off", **changes})
    loaded = load_graft(asked, asked.model.name, asked.run.seed)
    assert code(ask(asked, "query.head_sums", sums_request(asked, loaded))) == refusal


def test_a_site_notes_the_end_of_a_run(config, tmp_path):
    """Catches: an end that is nowhere written down; a server's text in a site's log or on its terminal."""
    site = site_folder(tmp_path, "acme")
    client = app_of_sites([site])
    ended = EndedRequest("june", "finished", 10, 9)
    reply = ask(config, f"query.{ENDED}", to_record(ended), client=client)
    assert from_record(EndedReply, reply.content).site == "acme"
    bad = [{"run": "../june"}, {"outcome": "done\n2 of 2"}, {"rounds": -1}, {"rounds_in": 11}, {"rounds_in": -2}]
    for fields in bad:
        reply = ask(config, f"query.{ENDED}", to_record(replace(ended, **fields)), client=client)
        assert reply.error.reason == "type", fields
    events = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "ended"]
    assert [(event["run"], event["outcome"], event["rounds"], event["rounds_in"]) for event in events] == [
        ("june", "finished", 10, 9)
    ]
