"""The messages between server and sites."""

import dataclasses

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from tsugiki.common.config.parse import parse, site_config
from tsugiki.common.errors import ConfigError, WireError
from tsugiki.common.wire.messages import (
    SITE_ERROR,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    TrainReply,
    TrainRequest,
    error_code,
    error_reply,
    from_record,
    join_shares,
    split_shares,
    to_record,
)

KINDS = [HelloRequest, HelloReply, TrainRequest, TrainReply, EvaluateRequest, EvaluateReply]
SAMPLES = {"str": "x", "int": 3, "float": 0.5, "bool": True}

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def example(kind):
    """Return a message of this kind."""
    return kind(**{field.name: SAMPLES[field.type] for field in dataclasses.fields(kind)})


def content(kind, **changes):
    """Return a received content with some values changed; None removes a key."""
    record = to_record(example(kind))
    name = next(iter(record))
    values = dict(record[name]) | changes
    record[name] = ConfigRecord({key: value for key, value in values.items() if value is not None})
    return record


@each_kind
def test_round_trip(kind):
    """Catches: a field lost, or a value that Flower's records do not hold."""
    message = example(kind)
    record = to_record(message)
    assert list(record) == ["request" if kind.__name__.endswith("Request") else "reply"]
    assert from_record(kind, record) == message


def test_arrays_travel_beside():
    """Catches: the adapter left behind."""
    arrays = ArrayRecord({"adapter": Array("float32", (0,), "numpy.ndarray", b"")})
    record = to_record(example(TrainReply), arrays)
    assert set(record) == {"reply", "arrays"}
    assert record.array_records["arrays"] is arrays
    assert from_record(TrainReply, record) == example(TrainReply)


@each_kind
def test_keys_are_exactly_those(kind):
    """Catches: missing keys filled with defaults; extra keys carried along."""
    first = dataclasses.fields(kind)[0].name
    for changes in ({first: None}, {"extra": 1}, {first: None, first.upper(): "x"}):
        with pytest.raises(WireError) as caught:
            from_record(kind, content(kind, **changes))
        assert caught.value.code == "keys"


@each_kind
def test_another_record_is_refused(kind):
    """Catches: an AttributeError for an empty message, or one whose record is of another kind."""
    for records in (RecordDict(), RecordDict({"reply": ArrayRecord(), "request": ArrayRecord()})):
        with pytest.raises(WireError) as caught:
            from_record(kind, records)
        assert caught.value.code == "keys"


@each_kind
def test_types_are_exactly_those(kind):
    """Catches: True for 1, 1 for True, 1 for 1.0, "10" for 10, and lists."""
    wrong = {
        "str": [3, b"x", ["x"]],
        "int": [True, 3.0, "3", [3]],
        "float": [1, True, "0.5", [0.5]],
        "bool": [1, "true"],
    }
    for field in dataclasses.fields(kind):
        for value in wrong[field.type]:
            with pytest.raises(
                WireError, match=f"^The field {field.name} in {kind.__name__} has another type"
            ) as caught:
                from_record(kind, content(kind, **{field.name: value}))
            assert caught.value.code == "type"


def test_site_config_is_parsed_once():
    """Catches: a site that validates the run anew for every message, or mixes two runs up."""
    first, second = parse({"run": {"rounds": 3}}).for_sites(), parse({"run": {"rounds": 4}}).for_sites()
    assert site_config(first) is site_config(first)
    assert (site_config(first).run.rounds, site_config(second).run.rounds) == (3, 4)


def test_site_config_refuses_what_it_does_not_know():
    """Catches: a newer server's setting ignored by an older site."""
    with pytest.raises(ConfigError) as caught:
        site_config('{"train": {"quantum": true}, "run": {"rounds": -1}}')
    assert {problem.key for problem in caught.value.problems} == {"train.quantum", "run.rounds"}


@pytest.fixture
def request_message():
    """A message to reply to."""
    from tsugiki.common.wire.flower import identify_process, set_message_id

    identify_process()
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    set_message_id(message, "1")
    return message


@pytest.mark.parametrize("code", ["shard-empty", "spec-mismatch", "client-error:ValueError", "out-of-memory"])
def test_our_codes_cross(code, request_message):
    """Catches: a code that the server does not recognise as one."""
    reply = error_reply(code, request_message)
    assert (reply.error.code, reply.error.reason) == (SITE_ERROR, code)
    assert error_code(reply) == code


@pytest.mark.parametrize(
    "reason",
    [
        "",
        "patient Jane",
        "could not read /home/jane/data.csv",
        "shard-empty: row 3",
        "shard-empty\n",
        "Shard-Empty",
        "a" * 65,
        "client-error:",
        "client-error:a.b",
        "policy-members:../a",
        "client-error:" + "x" * 65,
        "\x1b[31mred",
        "-a",
    ],
)
def test_what_is_no_code_is_not_repeated(reason, request_message):
    """Catches: a site's text, or terminal escapes, in the server's files."""
    assert error_code(Message(Error(SITE_ERROR, reason), reply_to=request_message)) == "client-error"


@pytest.mark.parametrize("number", [0, 1, 2, 3, 999])
def test_flowers_own_errors_become_a_number(number, request_message):
    """Catches: the exception's text, which Flower puts into the reason, taken over."""
    reply = Message(Error(number, "patient Jane"), reply_to=request_message)
    assert error_code(reply) == f"flower-error-{number}"


def test_shares_of_classes_cross():
    """Catches: shares in another order, or rounded to nothing."""
    shares = (0.7, 0.29999, 1e-5)
    assert split_shares(join_shares(shares), 3) == pytest.approx(shares, rel=1e-5)
    assert split_shares(join_shares(()), 3) == ()


@pytest.mark.parametrize(
    "text", ["0.5", "0.5,0.5,0", "0.5,0.4,0.4", "1,0.5,-0.5", "nan,0.5,0.5", "0.5,0.5,", "1e999,0,0", "0.5,.,0.5", " "]
)
def test_shares_that_do_not_fit_are_refused(text):
    """Catches: a traceback, or a loss that is not a number, because of what a server sent."""
    with pytest.raises(WireError) as error:
        split_shares(text, 3)
    assert error.value.code == "class-shares"
