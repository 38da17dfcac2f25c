"""Fault 8: numbers of rows that a site makes up."""

import math

import numpy as np
import pytest

from tests.support.toy import (
    ASKED,
    SPEC,
    check_only_rejected,
    forging,
    mostly_two,
    rewritten,
    run_toy,
    run_with_bad_site,
    toy_app,
    toy_config,
    train_reply,
)
from tsugiki.server.run.guard import check

WRONG = {
    "zero": (0, "weight"),
    "negative": (-9, "weight"),
    "not a number": (math.nan, "type"),
    "a fraction": (2.5, "type"),
    "true": (True, "type"),
    "text": ("10", "type"),
    "a list": ([10], "type"),
    "absent": (None, "keys"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_made_up_number_is_rejected(name):
    """Catches: a weight that turns the average round, divides by zero or ends the run."""
    rows, reason = WRONG[name]
    assert check(train_reply(rows=rows), ASKED, SPEC, 100.0).reason == reason


@pytest.mark.parametrize("name", WRONG)
def test_the_others_are_averaged(tmp_path, name):
    """Catches: Flower's ZeroDivisionError, and global weights of -35 from updates of 1 and 5."""
    rows, reason = WRONG[name]
    ran = run_with_bad_site(tmp_path, lambda reply: rewritten(reply, rows=rows))
    check_only_rejected(ran, reason)


def test_a_huge_number_counts_as_what_the_hello_said(tmp_path):
    """Catches: a site that decides alone by saying that it has 10^12 rows."""
    config = toy_config(tmp_path, run={"rounds": 1}, strategy={"max_update_norm": 1000.0})
    fault = forging(2, lambda reply: rewritten(reply, rows=10**12))
    ran = run_toy(tmp_path, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=fault)
    assert ran.rounds[0]["accepted"]["b"]["rows"] == 10
    assert np.allclose(ran.state.vector, np.full(SPEC.size, 18.0))
