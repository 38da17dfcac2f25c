"""The guard by itself; the faults it stands against are in tests/faults."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord

from common.messages import EvaluateReply, error_reply, to_record
from common.wire import encode
from server.guard import Accepted, Rejected, check, check_evaluation
from tests.support.toy import ASKED, SPEC, train_reply


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
    assert (accepted.site, accepted.weight, accepted.loss, accepted.steps, accepted.seconds) == (
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


def test_another_record_beside_the_reply_is_rejected():
    """Catches: content that nobody asked for, carried along."""
    reply = train_reply()
    reply.content["more"] = MetricRecord({"a": 1})
    assert verdict(reply).reason == "keys"


@pytest.mark.parametrize("record", [MetricRecord({"adapter": 1.0}), ConfigRecord({"adapter": "x"})])
def test_arrays_of_another_kind_of_record_are_rejected(record):
    """Catches: a KeyError, which would end the run, when the record named arrays holds none."""
    assert verdict(train_reply(record)).reason == "keys"


def test_a_site_weighs_at_most_what_it_said_in_its_hello():
    """Catches: self-declared weights."""
    assert verdict(train_reply(rows=9)).weight == 9
    assert verdict(train_reply(rows=10**12)).weight == 10


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
