import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.federation import hurry
from tests.support.toy import SPEC, forging, is_train, run_toy, toy_app, toy_config, toy_context, toy_state
from tsugiki.common.errors import Interrupted, NotEnoughSites, QuorumNotMet, TrainingError
from tsugiki.common.wire.spec import sha256
from tsugiki.server.run import checkpoint
from tsugiki.server.run.collect import sample
from tsugiki.server.run.loop import run_rounds

SITES = ["a", "b", "c", "d"]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


def by_site(values):
    """Return an update that is one constant for each site."""
    return lambda site, round_, received: np.full(SPEC.size, values[site], np.float32)


def scores(values, name="accuracy"):
    """Return an evaluator that gives the listed values, one a call."""
    remaining = iter(values)
    return lambda vector: {name: next(remaining)}


def test_the_model_moves_by_the_mean_update_in_every_round(tmp_path):
    """Catches: an update averaged as a model, a round applied twice or not at all, sites sent the first model."""
    received = []

    def update(site, round_, vector):
        received.append((round_, float(vector[0])))
        return np.full(SPEC.size, {"a": 1.0, "b": 3.0}[site], np.float32)

    ran = run_toy(tmp_path, toy_app(["a", "b"], update), 2)
    assert np.array_equal(ran.state.vector, np.full(SPEC.size, 6.0, np.float32))
    assert received == [(1, 0.0), (1, 0.0), (2, 2.0), (2, 2.0), (3, 4.0), (3, 4.0)]


def test_the_result_does_not_depend_on_which_node_a_site_is(tmp_path):
    """Catches: sums in the order of node ids or of replies; float32 sums differ in their last bits."""

    def update(site, round_, received):
        return np.random.default_rng(ord(site)).normal(size=SPEC.size).astype(np.float32)

    hashes = set()
    for number, sites in enumerate((SITES, SITES[::-1], ["c", "a", "d", "b"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        hashes.add(sha256(run_toy(folder, toy_app(sites, update), 4).state.vector))
    assert len(hashes) == 1


def test_every_round_has_a_line_with_what_was_sent_and_received(tmp_path):
    """Catches: bytes counted for one site instead of all, lines of accepted sites left out, a round without a line."""
    ran = run_toy(tmp_path, toy_app(["a", "b"], by_site({"a": 1.0, "b": 3.0})), 2)
    assert [line["round"] for line in ran.rounds] == [1, 2, 3]
    line, bytes_ = ran.rounds[0], SPEC.size_bytes + 128
    assert (line["bytes_down"], line["bytes_up"]) == (2 * bytes_, 2 * bytes_)
    assert (line["cohort"], line["rejected"], line["dropouts"], line["train_loss"]) == (["a", "b"], {}, 0, 0.5)
    assert line["accepted"]["b"]["rows"] == 10
    assert line["accepted"]["b"]["update_norm"] == pytest.approx(3.0 * math.sqrt(SPEC.size))
    assert line["update_norm"] == pytest.approx(2.0 * math.sqrt(SPEC.size))
    assert line["adapter_sha256"] == sha256(np.full(SPEC.size, 2.0, np.float32))
    assert set(line["seconds"]) == {"wait", "aggregate", "evaluate"}
    assert [event["round"] for event in ran.events if event["event"] == "round"] == [1, 2, 3]


def test_the_cohort_is_a_function_of_seed_round_and_attempt(tmp_path):
    """Catches: a cohort drawn from global randomness or from the order of nodes, and one that never changes."""
    config = toy_config(tmp_path, strategy={"fraction_train": 0.5})

    def cohorts(folder, sites, config=config):
        folder.mkdir()
        ctx = toy_context(folder, toy_app(sites), 4, config)
        return [[member.name for member in sample(ctx, number, 0)] for number in range(1, 9)]

    first = cohorts(tmp_path / "1", SITES)
    assert first == cohorts(tmp_path / "2", SITES[::-1])
    assert all(len(cohort) == 2 and cohort == sorted(cohort) for cohort in first)
    assert len({tuple(cohort) for cohort in first}) > 1
    assert {site for cohort in first for site in cohort} == set(SITES)
    assert first != cohorts(
        tmp_path / "3", SITES, toy_config(tmp_path, run={"seed": 7}, strategy=vars(config.strategy))
    )


@pytest.mark.parametrize(("fraction", "least", "size"), [(0.01, 2, 2), (0.5, 1, 2), (1.0, 2, 4), (0.5, 3, 3)])
def test_the_cohort_is_the_asked_share_and_at_least_the_quorum(tmp_path, fraction, least, size):
    """Catches: a cohort that cannot meet its own quorum."""
    config = toy_config(tmp_path, strategy={"fraction_train": fraction, "min_clients": least})
    assert len(sample(toy_context(tmp_path, toy_app(SITES), 4, config), 1, 0)) == size


def test_too_few_connected_sites_stop_the_run(tmp_path):
    """Catches: a round that is tried with fewer sites than its quorum."""
    ctx = toy_context(tmp_path, toy_app(["a"]), 1)
    with pytest.raises(NotEnoughSites) as caught:
        sample(ctx, 1, 0)
    assert caught.value.exit_status == 4


def test_a_voided_attempt_changes_nothing_and_is_tried_once_more(tmp_path):
    """Catches: the accepted update of a voided attempt in the model, and a retry that is not recorded."""
    failures = iter([True, False, False, False])
    fault = forging(2, lambda reply: None if next(failures) else reply)
    ran = run_toy(tmp_path, toy_app(["a", "b"]), 2, fault=fault)
    assert np.array_equal(ran.state.vector, np.full(SPEC.size, 0.75, np.float32))
    assert [(line["round"], line.get("voided", False)) for line in ran.rounds] == [
        (1, True),
        (1, False),
        (2, False),
        (3, False),
    ]
    assert ran.rounds[0]["dropouts"] == 1
    voided = [event for event in ran.events if event["event"] == "round-voided"]
    assert [(event["round"], event["accepted"], event["rejected"]) for event in voided] == [(1, 1, {"b": "silent"})]


def test_a_quorum_missed_twice_stops_the_run_with_the_last_checkpoint(tmp_path):
    """Catches: an endless retry, and a checkpoint that took over something from a voided round."""
    count = iter(range(100))
    fault = forging(2, lambda reply: reply if next(count) < 1 else None)
    ctx = toy_context(tmp_path, toy_app(["a", "b"]), 2, fault=fault)
    ctx.roster.wait(lambda count: None)
    with pytest.raises(QuorumNotMet, match="Round 2 had 1 accepted replies, twice") as caught:
        run_rounds(ctx, toy_state())
    assert (caught.value.exit_status, caught.value.code) == (3, "quorum-not-met")
    assert str(tmp_path / "checkpoint") in str(caught.value)
    state = checkpoint.load(tmp_path / "checkpoint", ctx.config.fixed, SPEC.sha256)
    assert state.round == 1
    assert np.array_equal(state.vector, np.full(SPEC.size, 0.25, np.float32))


def test_a_reply_from_a_node_that_was_not_asked_is_noted_and_ignored(tmp_path):
    """Catches: a stranger's update in the average, and a KeyError that ends the run."""
    config = toy_config(tmp_path, run={"rounds": 1}, strategy={"fraction_train": 0.5})

    def fault(node, reply):
        if not is_train(reply):
            return [reply]
        reply.metadata.__dict__["_src_node_id"] = 99
        return [reply]

    with pytest.raises(QuorumNotMet):
        run_toy(tmp_path, toy_app(SITES), 4, config, fault=fault)
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [event["node"] for event in events if event["event"] == "unexpected-reply"] == ["99"] * 4


def test_the_best_adapter_is_kept(tmp_path):
    """Catches: the last adapter kept for the best one, and a later equal one in its place."""
    evaluate = scores([0.1, 0.5, 0.5, 0.3])
    state = run_toy(tmp_path, toy_app(["a", "b"]), 2, evaluate=evaluate).state
    assert (state.best_round, state.best_metric, state.evaluations_since_best) == (1, 0.5, 2)
    best = checkpoint.read_best(tmp_path / "checkpoint", state)
    assert np.array_equal(best, np.full(SPEC.size, 0.25, np.float32))


def test_where_lower_is_better_the_lowest_is_kept(tmp_path):
    """Catches: the highest loss taken for the best."""
    config = toy_config(tmp_path, evaluation={"monitor": "eval_loss"})
    options = {"evaluate": scores([0.9, 0.2, 0.5, 0.4], "loss"), "lower_is_better": True}
    assert run_toy(tmp_path, toy_app(["a", "b"]), 2, config, **options).state.best_round == 1


@pytest.mark.parametrize("values", [[math.nan, 0.1, 0.3, 0.2], [0.1, math.nan, 0.3, math.nan]])
def test_a_metric_that_is_no_number_is_never_the_best(tmp_path, values):
    """Catches: NaN kept as the best for ever, because nothing compares as better than it."""
    state = run_toy(tmp_path, toy_app(["a", "b"]), 2, evaluate=scores(values)).state
    assert (state.best_round, state.best_metric) == (2, 0.3)


def test_without_evaluation_the_last_adapter_is_the_best(tmp_path):
    """Catches: the untrained adapter exported from a run without evaluation data."""
    state = run_toy(tmp_path, toy_app(["a", "b"], evaluation_rows=0), 2).state
    assert state.best_round == 3
    assert np.array_equal(checkpoint.read_best(tmp_path / "checkpoint", state), state.vector)


def test_patience_ends_the_run(tmp_path):
    """Catches: patience counted in rounds that were not evaluated, and one evaluation too many or too few."""
    config = toy_config(
        tmp_path, run={"rounds": 20}, evaluation={"early_stopping_patience": 2, "every_rounds": 2, "data": "x"}
    )
    state = run_toy(tmp_path, toy_app(["a", "b"]), 2, config, evaluate=scores([0.1, 0.3, 0.2, 0.3, 0.9])).state
    assert (state.round, state.best_round) == (6, 2)


def test_evaluation_is_due_every_so_many_rounds_and_after_the_last(tmp_path):
    """Catches: a last round that is never evaluated."""
    config = toy_config(tmp_path, run={"rounds": 5}, evaluation={"every_rounds": 2})
    ran = run_toy(tmp_path, toy_app(["a", "b"]), 2, config, evaluate=scores([0.1] * 4))
    assert [line["round"] for line in ran.rounds if "eval" in line] == [2, 4, 5]


def test_sites_evaluate_on_their_own_rows_where_that_is_asked(tmp_path):
    """Catches: an evaluation of sites that keep no rows, and metrics without the number of rows."""
    config = toy_config(tmp_path, run={"rounds": 1}, evaluation={"at_sites": True})
    ran = run_toy(tmp_path, toy_app(["a", "b"]), 2, config)
    assert ran.rounds[0]["sites_eval"] == {site: {"accuracy": 0.5, "rows": 10} for site in ("a", "b")}
    (tmp_path / "2").mkdir()
    assert run_toy(tmp_path / "2", toy_app(["a", "b"], evaluation_rows=0), 2, config).rounds[0]["sites_eval"] == {}


def test_sites_with_rows_evaluate_unless_that_is_off(tmp_path):
    """Catches: "auto" that asks nobody, or private sites; an empty table in the lines of a run without such rows."""
    asked = {}
    private = {"mode": "central", "noise_multiplier": 1.0, "clip_norm": 1.0}
    cases = {
        "auto": ({}, 10),
        "off": ({"evaluation": {"at_sites": False}}, 10),
        "none": ({}, 0),
        "private": ({"privacy": private}, 0),
    }
    for name, (sections, rows) in cases.items():
        config = toy_config(tmp_path, run={"rounds": 1}, **sections)
        assert config.evaluates_at_sites is (name in ("auto", "none"))
        if name != "private":
            (tmp_path / name).mkdir()
            ran = run_toy(tmp_path / name, toy_app(["a", "b"], evaluation_rows=rows), 2, config)
            asked[name] = "sites_eval" in ran.rounds[0]
    assert asked == {"auto": True, "off": False, "none": False}
    by_rows = toy_config(tmp_path, privacy={"examples": {"noise_multiplier": 1.0}})
    assert not by_rows.evaluates_at_sites


def test_a_request_to_stop_keeps_the_last_checkpoint(tmp_path):
    """Catches: a stop that waits for the round to end, and one that loses what was finished."""

    def update(site, round_, received):
        ctx.stop.requested = round_ == 2 and site == "a"
        return np.full(SPEC.size, 0.25, np.float32)

    ctx = toy_context(tmp_path, toy_app(["a", "b"], update), 2)
    ctx.roster.wait(lambda count: None)
    with pytest.raises(Interrupted) as caught:
        run_rounds(ctx, toy_state())
    assert caught.value.exit_status == 130
    assert checkpoint.load(tmp_path / "checkpoint", ctx.config.fixed, SPEC.sha256).round == 1


def test_a_model_that_is_no_longer_finite_is_not_checkpointed(tmp_path):
    """Catches: a sum that overflowed, saved as the model."""
    config = toy_config(tmp_path, strategy={"max_update_norm": 1e39})
    ctx = toy_context(tmp_path, toy_app(["a", "b"], by_site({"a": 1e38, "b": 1e38})), 2, config)
    ctx.roster.wait(lambda count: None)
    start = replace(toy_state(), vector=np.full(SPEC.size, 3e38, np.float32))
    checkpoint.save(tmp_path / "checkpoint", start, ctx.config.fixed, SPEC.sha256)
    with np.errstate(over="ignore"), pytest.raises(TrainingError, match="not finite"):
        run_rounds(ctx, start)
    assert checkpoint.load(tmp_path / "checkpoint", ctx.config.fixed, SPEC.sha256).round == 0


def test_a_finished_run_goes_on_to_nothing(tmp_path):
    """Catches: a round more than the run has, when it is resumed at its end."""
    ctx = toy_context(tmp_path, toy_app(["a", "b"]), 2)
    ctx.roster.wait(lambda count: None)
    state = run_rounds(ctx, toy_state())
    assert run_rounds(ctx, state) is state
