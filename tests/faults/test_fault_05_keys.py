"""Fault 5: keys that are missing, extra, renamed, or look alike."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from tests.support.federation import CANARY
from tests.support.toy import ASKED, SPEC, check_only_rejected, run_with_bad_site, train_reply, with_arrays
from tsugiki.server.run.guard import check

GOOD = np.ones(SPEC.size, np.float32)

ARRAYS = {
    "missing": {},
    "renamed": {CANARY: GOOD},
    "extra": {"adapter": GOOD, CANARY: GOOD},
    "capital": {"Adapter": GOOD},
    "look-alike": {"\u0430dapter": GOOD},  # the Cyrillic letter a
    "both": {"adapter": GOOD, "\u0430dapter": GOOD},
}


def record(name):
    """Return the arrays of a case."""
    return ArrayRecord({key: Array(value) for key, value in ARRAYS[name].items()})


@pytest.mark.parametrize("name", ARRAYS)
def test_other_arrays_are_rejected(name):
    """Catches: an array found by its place, and names compared loosely."""
    rejected = check(train_reply(record(name)), ASKED, SPEC, 100.0)
    assert rejected.reason == "keys"
    assert CANARY not in rejected.detail


@pytest.mark.parametrize("name", ARRAYS)
def test_the_run_goes_on_with_the_others(tmp_path, name):
    """Catches: a run that exits, as Flower's own does, and names from a site in the operator's files."""
    ran = run_with_bad_site(tmp_path, lambda reply: with_arrays(reply, record(name)))
    check_only_rejected(ran, "keys")


RECORDS = {
    "no reply": lambda reply: {"arrays": reply.content["arrays"]},
    "no arrays": lambda reply: {"reply": reply.content["reply"]},
    "nothing": lambda reply: {},
    "more": lambda reply: {**reply.content, CANARY: MetricRecord({CANARY: 1.0})},
    "arrays are none": lambda reply: {**reply.content, "arrays": ConfigRecord({CANARY: CANARY})},
    "reply is none": lambda reply: {**reply.content, "reply": MetricRecord({"rows": 1})},
    "another reply": lambda reply: {**reply.content, "reply": ConfigRecord({CANARY: CANARY})},
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_run_goes_on_without_whoever_sends_other_records(tmp_path, name):
    """Catches: a KeyError in the server for a record that is not there or of another kind."""
    ran = run_with_bad_site(tmp_path, lambda reply: Message(RecordDict(RECORDS[name](reply)), metadata=reply.metadata))
    check_only_rejected(ran, "keys")
