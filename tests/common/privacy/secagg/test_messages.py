"""What the clients of secure aggregation keep and send, and what is done with a message that nobody vouches for."""

import dataclasses
import os

import numpy as np
import pytest

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.secagg import protocol as secagg
from tsugiki.common.privacy.secagg.messages import (
    KEYS_BYTES,
    SEALED_BYTES,
    Answer,
    ClientState,
    check_names,
    exactly,
    from_fields,
    to_fields,
)

VALUES = {"b": b"b" * 32, "a": b"a" * 32}
HOSTILE = ["", "A", "a b", "../a", "a\n", "-a", "a" * 65, "é", b"a", 7, None]


def code(function, *arguments):
    """Return the code with which a call is refused."""
    with pytest.raises(SecureAggregationError) as caught:
        function(*arguments)
    assert caught.value.exit_status == 14
    return caught.value.code


def states():
    """Return one client's state after each step of a session with another client."""
    session = secagg.new_session()
    mine, other = secagg.start(session, "a"), secagg.start(session, "b")
    keys = {one.name: one.public_keys for one in (mine, other)}
    after = {"keys": mine}
    after["shares"], _ = secagg.make_shares(mine, keys, 2, bytes(32))
    _, sealed = secagg.make_shares(other, keys, 2, bytes(32))
    after["received"] = secagg.receive_shares(after["shares"], {"b": sealed["a"]})
    after["masked"], _ = secagg.mask_vector(after["received"], np.zeros(3, np.int64), 40)
    after["answered"], _ = secagg.answer_unmask(after["masked"], ["a", "b"], [], 2)
    return after


def through_flower(fields):
    """Return the fields as they come out of Flower's record at the other side."""
    from flwr.app import ConfigRecord

    record = ConfigRecord(fields)
    assert record.count_bytes() > 0
    return ConfigRecord.inflate(record.deflate())


@pytest.mark.parametrize("step", ["keys", "shares", "received", "masked", "answered"])
def test_a_state_survives_being_stored(step):
    """Catches: a field that is not stored; a value that Flower's record cannot carry, or returns as another type."""
    state = states()[step]
    assert ClientState.from_dict(through_flower(state.to_dict())) == state
    assert ClientState.from_dict(state.to_dict()).step == step


def test_secrets_are_kept_no_longer_than_needed():
    """Catches: masks that could be made again after they were used, by whoever gets hold of the stored state."""
    kept = {
        step: {one for one in ("mask_private", "share_private", "seed", "held") if getattr(state, one)}
        for step, state in states().items()
    }
    assert kept == {
        "keys": {"mask_private", "share_private"},
        "shares": {"mask_private", "share_private", "seed", "held"},
        "received": {"mask_private", "seed", "held"},
        "masked": {"held"},
        "answered": set(),
    }


def test_secrets_are_not_shown():
    """Catches: a private key in a log or a traceback."""
    for state in states().values():
        for secret in (state.mask_private, state.share_private, state.seed, *state.held.values()):
            assert not secret or repr(secret)[2:-1] not in repr(state)
        assert not any(name in repr(state) for name in ("private", "seed", "held"))
    assert repr(Answer(VALUES, VALUES)) == "Answer()"


@pytest.mark.parametrize(
    "name", ["session", "name", "step", "context", "threshold", "mask_private", "seed", "held_names"]
)
@pytest.mark.parametrize("value", [None, b"", b"x" * 33, 1.5, "A", ["a", "a"]])
def test_a_stored_state_that_was_damaged_is_refused(name, value):
    """Catches: a key of another length taken from the disk, a KeyError or TypeError instead of a code."""
    fields = states()["received"].to_dict()
    assert code(ClientState.from_dict, fields | {name: value}) == "secagg-message"
    del fields[name]
    assert code(ClientState.from_dict, fields) == "secagg-message"


@pytest.mark.parametrize("step", ["shares", "received", "masked"])
def test_a_stored_state_without_its_shares_is_refused(step):
    """Catches: a damaged state with which a client would mask its vector for nobody but itself."""
    fields = states()[step].to_dict()
    without = {key: value for key, value in fields.items() if not key.startswith("held")}
    assert code(ClientState.from_dict, without) == "secagg-message"
    assert code(ClientState.from_dict, fields | {"name": "c"}) == "secagg-message"


def test_fields_survive_the_way():
    """Catches: values that stand beside another client's name; an empty list that Flower cannot carry."""
    fields = to_fields("keys", VALUES)
    assert fields == {"keys_names": ["a", "b"], "keys_values": [b"a" * 32, b"b" * 32]}
    assert from_fields("keys", through_flower(fields), 32) == VALUES
    assert from_fields("keys", through_flower(to_fields("keys", {}) | {"round": 1}), 32) == {}
    assert from_fields("keys", {"keys_names": [], "keys_values": []}, 32) == {}


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_values_of_another_size_are_refused(size):
    """Catches: a share or key that is padded or cut."""
    fields = to_fields("keys", VALUES | {"a": bytes(size)})
    assert code(from_fields, "keys", fields, 32) == "secagg-message"


@pytest.mark.parametrize("values", [None, b"a" * 32, [b"a" * 32], [b"a" * 32] * 3, ["a" * 32] * 2, [1, 2], ()])
def test_values_of_another_kind_or_number_are_refused(values):
    """Catches: a value that is dropped by a zip that stops at the shorter list; text for bytes."""
    assert code(from_fields, "keys", {"keys_names": ["a", "b"], "keys_values": values}, 32) == "secagg-message"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name):
    """Catches: a name that leads out of a folder, breaks a log line, or ends in a line break that `$` lets pass."""
    assert code(check_names, ["a", name]) == "secagg-message"
    assert code(secagg.start, bytes(16), name) == "secagg-message"
    assert code(from_fields, "keys", {"keys_names": [name], "keys_values": [b"a" * 32]}, 32) == "secagg-message"


@pytest.mark.parametrize("names", [None, "ab", ("a", "b"), {"a": 1}, ["a", "b", "a"], [f"s{n}" for n in range(256)]])
def test_hostile_lists_of_names_are_refused(names):
    """Catches: a name twice in a list, so that two count as three; more clients than there are indices."""
    assert code(check_names, names) == "secagg-message"


def test_good_names():
    """Catches: a check that refuses what a site may be called, or 255 of them."""
    names = ["a", "0", "site-1.example_x", "a" * 64, *(f"s{n}" for n in range(251))]
    assert check_names(names) == names
    assert check_names([]) == []


@pytest.mark.parametrize("value", [None, "a" * 32, bytearray(32), [0] * 32, bytes(31), bytes(33)])
def test_only_bytes_of_the_right_size(value):
    """Catches: text or a list of numbers with the right length."""
    assert code(exactly, value, 32) == "secagg-message"
    assert exactly(bytes(32), 32) == bytes(32)


def test_sizes():
    """Catches: messages that have grown without anybody noticing."""
    session = secagg.new_session()
    mine, other = secagg.start(session, "a"), secagg.start(session, "b")
    _, sealed = secagg.make_shares(mine, {"a": mine.public_keys, "b": other.public_keys}, 2, bytes(32))
    assert (len(session), len(mine.public_keys), len(sealed["b"])) == (16, KEYS_BYTES, SEALED_BYTES) == (16, 64, 92)
    assert code(secagg.start, os.urandom(15), "a") == "secagg-message"


def test_an_answer_is_about_whom_it_was_asked():
    """Catches: an answer that leaves out a client, adds one, or gives a share of the wrong kind."""
    answer = Answer({"a": b"1" * 32, "b": b"2" * 32}, {"c": b"3" * 32})
    fields = through_flower(answer.to_dict())
    assert Answer.from_dict(fields, ["b", "a"], ["c"]) == answer
    whole = Answer({"a": b"1" * 32}, {})
    assert Answer.from_dict(through_flower(whole.to_dict()), {"a"}, []) == whole
    for survivors, dropped in ((["a"], ["c"]), (["a", "b", "d"], ["c"]), (["a", "b"], []), (["c"], ["a", "b"])):
        assert code(Answer.from_dict, fields, survivors, dropped) == "secagg-message"
    short = dataclasses.replace(answer, mask_keys={"c": b"3" * 31})
    assert code(Answer.from_dict, short.to_dict(), ["a", "b"], ["c"]) == "secagg-message"
