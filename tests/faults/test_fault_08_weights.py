"""Fault 8: numbers of rows that a site makes up."""

import math

import numpy as np
import pytest

from tests.support.toy import (
    ASKED,
    SPEC,
    check_only_rejected,
    federate,
    forging,
    is_train,
    mostly_two,
    rewritten,
    run_toy,
    run_with_bad_site,
    toy_app,
    toy_config,
    train_reply,
)
from tsugiki.server.run.at_sites import means_of
from tsugiki.server.run.guard import check
from tsugiki.server.run.progress import Progress

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
    strategy = {"max_update_norm": 1000.0, "norm_tolerance": 0.0}
    config = toy_config(tmp_path, run={"rounds": 1}, strategy=strategy)
    fault = forging(2, lambda reply: rewritten(reply, rows=10**12))
    ran = run_toy(tmp_path, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=fault)
    assert ran.rounds[0]["accepted"]["b"]["rows"] == 10
    assert np.allclose(ran.state.vector, np.full(SPEC.size, 18.0))


HUGE = 10**18


def boasting(node):
    """Return a fault by which one node has `HUGE` rows, in its hello and in all its replies."""

    def fault(sender, reply):
        if sender != node or reply.has_error():
            return [reply]
        return [rewritten(reply, rows=HUGE)]

    return fault


def boast(folder, **strategy):
    """Run a round of a, b and c, with the updates 1, 50 and 3, in which b boasts."""
    config = toy_config(
        folder, run={"rounds": 1}, strategy={"max_update_norm": 1000.0, "norm_tolerance": 0.0, **strategy}
    )
    return run_toy(folder, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=boasting(2))


def test_a_site_that_boasts_in_its_hello_too_has_at_most_its_share(tmp_path):
    """Catches: a site with 10^18 rows, which is the model."""
    ran = boast(tmp_path)
    assert np.allclose(ran.state.vector, 26.0)  # a and c have 2 together, b weighs as much as both
    assert [entry["weight"] for entry in ran.rounds[0]["accepted"].values()] == [10, 20, 10]
    assert ran.rounds[0]["accepted"]["b"]["rows"] == HUGE


@pytest.mark.parametrize(("weighting", "mean"), [("equal", 18.0), ("rows", 50.0)])
def test_the_weighting_is_the_operators_choice(tmp_path, weighting, mean):
    """Catches: a setting without effect."""
    assert np.allclose(boast(tmp_path, weighting=weighting).state.vector, mean)


def test_a_boast_is_shown_before_the_first_round(tmp_path, monkeypatch):
    """Catches: a dominant site that the operator learns of afterwards, or never."""
    told = []
    progress = Progress()
    progress.note = told.append
    config = toy_config(tmp_path, run={"rounds": 1})
    federate(monkeypatch, toy_app(["a", "b", "c"]), 3, config, boasting(2), progress=progress)
    (line,) = [line for line in told if line.startswith("rows: ")]
    assert line == f"rows: a 10, b {HUGE:,}, c 10"
    (warning,) = [line for line in told if line.startswith("warning: ")]
    assert "b (100% of all rows)" in warning


def test_a_site_with_many_evaluation_rows_does_not_decide_their_mean(tmp_path):
    """Catches: a mean over sites, in the report, that one site's number decides."""

    def fault(sender, reply):
        if sender != 2 or is_train(reply):
            return [reply]
        if str(reply.metadata.message_type) == "evaluate":
            return [rewritten(reply, rows=HUGE)]
        return [rewritten(reply, evaluation_rows=HUGE)]

    config = toy_config(tmp_path, run={"rounds": 1}, evaluation={"at_sites": True})
    line = run_toy(tmp_path, toy_app(["a", "b", "c"]), 3, config, fault=fault).rounds[0]
    assert line["sites_eval"]["b"]["rows"] == HUGE
    assert line["sites_eval_weights"] == {"a": 10, "b": 20, "c": 10}
    metrics = {site: {**entry, "accuracy": float(site == "b")} for site, entry in line["sites_eval"].items()}
    assert means_of(line | {"sites_eval": metrics}) == {"accuracy": 0.5}
