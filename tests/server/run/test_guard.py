"""The guard by itself; the faults it stands against are in tests/faults."""

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord

from tests.support.private import plan_of
from tests.support.toy import ASKED, SPEC, of_array, of_bytes, rewritten, train_reply, with_arrays
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.wire.arrays import encode, encode_levels
from tsugiki.common.wire.messages import EvaluateReply, PrivateReply, error_reply, to_record
from tsugiki.server.run.guard import check, check_evaluation, check_private
from tsugiki.server.run.replies import Accepted, AcceptedSum, Rejected


def verdict(reply, max_update_norm=100.0):
    """Check a reply to `ASKED`."""
    return check(reply, ASKED, SPEC, max_update_norm)


def evaluation(metrics, **fields):
    """Return a reply to an evaluate request."""
    train_reply()  # gives this process an identity
    answer = {"site": "site-0", "round": 3, "nonce": ASKED.nonce, "rows": 4, **fields}
    content = to_record(EvaluateReply(**answer))
    content["metrics"] = metrics
    return Message(content, 1, "evaluate")


def test_a_good_reply_is_accepted_with_its_numbers():
    """Catches: a norm of something else than the update, bytes without the header, a field in another's place."""
    accepted = verdict(train_reply())
    assert isinstance(accepted, Accepted)
    assert (accepted.site, accepted.rows, accepted.loss, accepted.steps, accepted.seconds) == (
        "site-0",
        10,
        0.5,
        5,
        0.1,
    )
    assert np.array_equal(accepted.update, np.full(SPEC.size, 0.5, np.float32))
    assert accepted.norm == pytest.approx(0.5 * math.sqrt(SPEC.size))
    assert accepted.size_bytes == SPEC.size_bytes + 128


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"site": "site-1"}, "site"),
        ({"round": 2}, "stale"),
        ({"nonce": "fedcba9876543210"}, "stale"),
        ({"loss": math.nan}, "metrics"),
        ({"loss": math.inf}, "metrics"),
        ({"steps": 0}, "metrics"),
        ({"missed_steps": -1}, "metrics"),
        ({"seconds": -1.0}, "metrics"),
        ({"seconds": math.inf}, "metrics"),
        ({"loss": 1}, "type"),
        ({"round": True}, "type"),
        ({"nonce": None}, "keys"),
        ({"extra": 1}, "keys"),
    ],
)
def test_a_record_that_does_not_fit_is_rejected(fields, reason):
    """Catches: any field of the reply that is believed unchecked; infinite seconds would be no JSON later."""
    assert verdict(train_reply(**fields)).reason == reason


def test_missed_steps_are_those_of_the_reply():
    """Catches: a partial update that passes for a whole one in metrics.jsonl."""
    assert verdict(train_reply()).missed_steps == 0
    assert verdict(train_reply(missed_steps=7)).missed_steps == 7


def test_another_record_beside_the_reply_is_rejected():
    """Catches: content that nobody asked for, carried along."""
    reply = train_reply()
    reply.content["more"] = MetricRecord({"a": 1})
    assert verdict(reply).reason == "keys"


@pytest.mark.parametrize("record", [MetricRecord({"adapter": 1.0}), ConfigRecord({"adapter": "x"})])
def test_arrays_of_another_kind_of_record_are_rejected(record):
    """Catches: a KeyError, which would end the run, when the record named arrays holds none."""
    assert verdict(train_reply(record)).reason == "keys"


def test_a_site_has_at_most_the_rows_of_its_hello():
    """Catches: self-declared weights."""
    assert verdict(train_reply(rows=9)).rows == 9
    assert verdict(train_reply(rows=10**12)).rows == 10


def test_the_norm_is_compared_with_its_bound_inclusively():
    """Catches: a bound on the squared norm or on the largest value; a rejection of an update exactly at the bound."""
    update = np.zeros(SPEC.size, np.float32)
    update[:2] = 3.0, 4.0
    assert isinstance(verdict(train_reply(encode(update, SPEC)), 5.0), Accepted)
    rejected = verdict(train_reply(encode(update, SPEC)), 4.9)
    assert (rejected.reason, rejected.detail) == ("norm", "5, allowed 4.9")


def test_an_error_reply_is_rejected_with_its_code():
    """Catches: an error taken for content, and an error's free text let through as a reason."""
    asked = train_reply()
    assert verdict(error_reply("shard-empty", asked)) == Rejected("site-0", "shard-empty")
    assert verdict(Message(Error(1000, "ValueError: patient Jane"), reply_to=asked)).reason == "client-error"
    assert verdict(Message(Error(2, "patient Jane"), reply_to=asked)).reason == "flower-error-2"


def test_a_good_evaluation_is_accepted():
    """Catches: metrics lost, and rows above what the hello said."""
    assert check_evaluation(evaluation(MetricRecord({"accuracy": 0.5})), ASKED) == ({"accuracy": 0.5}, 4)
    assert check_evaluation(evaluation(MetricRecord({"accuracy": 0.5}), rows=99), ASKED) == ({"accuracy": 0.5}, 10)


@pytest.mark.parametrize(
    ("metrics", "fields", "reason"),
    [
        (MetricRecord({"accuracy": math.nan}), {}, "metrics"),
        (MetricRecord({"accuracy": [0.5]}), {}, "metrics"),
        (MetricRecord({"accuracy": 1}), {}, "metrics"),
        (ConfigRecord({"accuracy": 0.5}), {}, "metrics"),
        (MetricRecord({"accuracy": 0.5}), {"rows": 0}, "weight"),
        (MetricRecord({"accuracy": 0.5}), {"round": 2}, "stale"),
        (MetricRecord({"accuracy": 0.5}), {"site": "site-1"}, "site"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_rejected(metrics, fields, reason):
    """Catches: metrics that are no finite numbers, and another round's or site's metrics."""
    assert check_evaluation(evaluation(metrics, **fields), ASKED).reason == reason


def test_a_loss_that_a_site_does_not_share_is_none():
    """Catches: a placeholder taken for a measurement."""
    accepted = verdict(train_reply(loss=0.0, loss_shared=False))
    assert isinstance(accepted, Accepted)
    assert accepted.loss is None


# Private runs


def private_reply(levels=None, bits=32, *, arrays=None, **fields):
    """Return a reply to `ASKED` in a private run, with other arrays or other fields; None removes a field."""
    train_reply()  # gives this process an identity
    levels = np.zeros(SPEC.size, np.int64) if levels is None else levels
    content = to_record(
        PrivateReply("site-0", 3, ASKED.nonce), encode_levels(levels, bits) if arrays is None else arrays
    )
    return rewritten(Message(content, 1, "train"), **fields)


def spike(length):
    """Return levels of this length, in one coordinate."""
    return np.eye(1, SPEC.size, dtype=np.int64)[0] * length


CENTRAL = plan_of("central", noise_multiplier=1.0)
LOCAL = plan_of("local", noise_multiplier=1.0)


def test_a_good_private_reply_is_accepted_with_its_integers():
    """Catches: levels that lost their sign, bytes without the header, clients that the reply could choose."""
    levels = np.arange(SPEC.size) - 20
    accepted = check_private(private_reply(levels), replace(ASKED, clients=5), CENTRAL)
    assert isinstance(accepted, AcceptedSum)
    assert accepted.levels.unpacked().tolist() == levels.tolist()
    assert (accepted.site, accepted.clients, accepted.size_bytes) == ("site-0", 5, 4 * SPEC.size + 128)


@pytest.mark.parametrize("clients", [1, 3, 1000])
def test_without_noise_of_its_own_a_sum_is_within_its_clients_clip_norms(clients):
    """Catches: an update that was not clipped, at a server that adds noise for clipped ones; a bound for one client."""
    asked = replace(ASKED, clients=clients)
    assert isinstance(check_private(private_reply(spike(clients * LEVELS)), asked, CENTRAL), AcceptedSum)
    rejected = check_private(private_reply(spike(clients * LEVELS + 1)), asked, CENTRAL)
    assert rejected.reason == "norm"
    assert rejected.detail.startswith(f"{clients:.4g} clip norms, allowed {clients:.4g}")


@pytest.mark.parametrize("mode", ["local", "distributed"])
@pytest.mark.parametrize("clients", [1, 20])
def test_honest_noise_is_never_too_long_and_more_is(mode, clients):
    """Catches: a bound that rejects honest sites now and then; one that lets a boosted update through."""
    plan, asked = plan_of(mode, noise_multiplier=5.0), replace(ASKED, clients=clients)
    longest = np.full((clients, SPEC.size), 1e30)
    for _ in range(200):
        total = ProtectedSum.empty(plan)
        total.add(longest)
        assert isinstance(check_private(private_reply(total.levels), asked, plan), AcceptedSum)
    assert check_private(private_reply(total.levels * 10), asked, plan).reason == "norm"


def test_a_masked_sum_can_be_anything():
    """Catches: a bound on what is uniform, which would reject every masked upload; one for unmasked ones forgotten."""
    uniform = np.random.default_rng(0).integers(-(2**31), 2**31, SPEC.size)
    reply = private_reply(uniform)
    assert isinstance(check_private(reply, ASKED, CENTRAL, masked=True), AcceptedSum)
    assert check_private(reply, ASKED, CENTRAL).reason == "norm"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"site": "site-1"}, "site"),
        ({"round": 2}, "stale"),
        ({"nonce": "fedcba9876543210"}, "stale"),
        ({"round": "3"}, "type"),
        ({"nonce": None}, "keys"),
        ({"rows": 10}, "keys"),
        ({"loss": 0.5}, "keys"),
    ],
)
def test_a_private_record_that_does_not_fit_is_rejected(fields, reason):
    """Catches: a stale or another site's sum; numbers about private rows that a site sends all the same."""
    assert check_private(private_reply(**fields), ASKED, CENTRAL).reason == reason


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (encode_levels(np.zeros(SPEC.size, np.int64), 40), "shape"),
        (encode_levels(np.zeros(SPEC.size - 1, np.int64), 32), "shape"),
        (encode(np.zeros(SPEC.size, np.float32), SPEC), "dtype"),
        (of_array(np.zeros(SPEC.size, np.int32)), "dtype"),
        (of_bytes(b"", "uint8", (4 * SPEC.size,)), "size"),
        (of_bytes(b"\0" * (4 * SPEC.size + 128), "uint8", (4 * SPEC.size,)), "decode"),
        (MetricRecord({"adapter": 1.0}), "keys"),
    ],
)
def test_other_integers_than_agreed_are_rejected(arrays, reason):
    """Catches: integers of another width read as these; an open update taken into a private sum."""
    assert check_private(private_reply(arrays=arrays), ASKED, CENTRAL).reason == reason


def test_another_record_beside_a_private_reply_is_rejected():
    """Catches: metrics of private rows, carried along."""
    reply = private_reply()
    reply.content["metrics"] = MetricRecord({"loss": 0.5})
    assert check_private(reply, ASKED, CENTRAL).reason == "keys"


def test_an_open_reply_in_a_private_run_is_rejected_and_the_other_way_round():
    """Catches: a site that has not understood that the run is private."""
    assert check_private(train_reply(), ASKED, LOCAL).reason == "keys"
    assert verdict(private_reply()).reason == "keys"


def test_an_error_reply_in_a_private_run_is_rejected_with_its_code():
    """Catches: a site that is gone, taken for one that refuses."""
    asked = private_reply()
    assert check_private(error_reply("policy-epsilon", asked), ASKED, LOCAL) == Rejected("site-0", "policy-epsilon")
    gone = check_private(Message(Error(4, "gone"), reply_to=asked), ASKED, LOCAL)
    assert (gone.reason, gone.detail) == ("gone", "flower-error-4")


def test_a_reply_of_a_part_is_an_update_of_the_whole():
    """Catches: a part read as the whole, a whole accepted where a part was asked for, numbers in other places."""
    part = replace(SPEC, tensors=SPEC.tensors[1:])
    reply = with_arrays(train_reply(), encode(np.full(part.size, 0.5, np.float32), part))
    accepted = check(reply, ASKED, SPEC, 100.0, part)
    assert isinstance(accepted, Accepted)
    assert accepted.update.tolist() == [0.0] * SPEC.tensors[0].size + [0.5] * part.size
    refused = check(train_reply(), ASKED, SPEC, 100.0, part)
    assert isinstance(refused, Rejected)
    assert refused.reason == "shape"
