"""Sites that answer their hello and then nothing: what they cost, and when they are asked again."""

import math
import re
from dataclasses import replace

import pytest

from tests.support.slow import Clock, rounds_asked, slow_context
from tests.support.toy import rewritten, run_toy, toy_app, toy_config, toy_state
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import QuorumNotMet
from tsugiki.common.files import read_lines
from tsugiki.common.settings import FIRST_TIMEOUT_S
from tsugiki.common.wire.messages import TrainRequest, from_record
from tsugiki.server.engines.grid import Deadline
from tsugiki.server.run.collect import evaluate_at_sites
from tsugiki.server.run.loop import run_rounds
from tsugiki.server.run.progress import Progress, describe
from tsugiki.server.run.silence import LONGEST_REST, Silence, Waiting

SITES = ["a", "b", "c"]
TIMEOUT_S = 600.0
NEVER = None


@pytest.fixture
def clock(monkeypatch):
    """Time under control."""
    return Clock().rule(monkeypatch)


def config_of(folder, rounds=20, **strategy):
    """Return a run of sites that keep no evaluation rows, with a long time-out."""
    strategy = {"round_timeout_s": TIMEOUT_S, **strategy}
    return toy_config(folder, run={"rounds": rounds}, evaluation={"at_sites": False}, strategy=strategy)


def takes(train_s, evaluate_s=1.0):
    """Return how long sites take: a number for all, or one by (site, round)."""

    def seconds(site, kind, number):
        given = {"query": 0.0, "evaluate": evaluate_s}.get(kind, train_s)
        return given(site, number) if callable(given) else given

    return seconds


def run_slow(folder, clock, train_s, config, sites=SITES, **options):
    """Run a federation to its end; return its context, and how long the rounds took."""
    ctx = slow_context(folder, sites, clock, takes(train_s, **options), config)
    begun = clock.now
    run_rounds(ctx, toy_state())
    return ctx, clock.now - begun


def lines(folder):
    """Return the lines of rounds."""
    return [line for line in read_lines(folder / "metrics.jsonl") if line["round"]]


# What a site is asked for in time


def asked_to_train(folder, clock, train_s, config, monkeypatch):
    """Run a federation; return (`partial`, `deadline_s`) of each request to train, by (site, round)."""
    ctx = slow_context(folder, SITES, clock, takes(train_s), config)
    push = ctx.grid.push_messages
    found = {}

    def watched(messages):
        for message in messages:
            if message.metadata.message_type == "train":
                request = from_record(TrainRequest, message.content)
                found[SITES[message.metadata.dst_node_id - 1], request.round] = (request.partial, request.deadline_s)
        return push(messages)

    monkeypatch.setattr(ctx.grid, "push_messages", watched)
    run_rounds(ctx, toy_state())
    return found


def test_sites_know_when_their_round_closes(tmp_path, clock, monkeypatch):
    """Catches: a slow site that trains to the time-out, though its round is closed long before."""
    config = config_of(tmp_path, rounds=3)
    found = asked_to_train(tmp_path, clock, lambda site, number: 90.0 if site == "c" else 10.0, config, monkeypatch)
    assert {partial for partial, _ in found.values()} == {True}
    # nobody's pace is known in round 1; then a site of the quorum has all the time, a slow one twice what it took
    assert {found[site, 1][1] for site in SITES} == {0.9 * TIMEOUT_S - 5.0}
    assert found["a", 2][1] == 0.9 * TIMEOUT_S - 5.0
    assert found["c", 2][1] == pytest.approx(0.9 * 180.0 - 5.0, abs=1.0)


def test_a_grace_in_seconds_is_the_time_that_slow_sites_have(tmp_path, clock, monkeypatch):
    """Catches: `grace_s` that cuts a slow site off without a word to it."""
    config = config_of(tmp_path, rounds=3, grace_s=5.0)
    found = asked_to_train(tmp_path, clock, lambda site, number: NEVER if site == "c" else 10.0, config, monkeypatch)
    assert found["c", 3][1] == pytest.approx(0.9 * 15.0 - 5.0, abs=1.0)


def test_the_quorum_is_not_hurried_by_its_own_pace(tmp_path, clock, monkeypatch):
    """Catches: fast sites that train less and less, because each deadline follows from the one before."""
    config = config_of(tmp_path, rounds=8, grace_s=0.0, round_timeout_s=6000.0)
    found = asked_to_train(tmp_path, clock, lambda site, number: 900.0 if site == "c" else 600.0, config, monkeypatch)
    assert {found["a", number][1] for number in range(1, 9)} == {0.9 * 6000.0 - 5.0}


def test_a_site_that_is_far_slower_is_asked_for_what_it_can_do(tmp_path, clock, monkeypatch):
    """Catches: the default, with which a site four times slower than the others is in no round."""
    config = config_of(tmp_path, rounds=4, round_timeout_s="auto")
    found = asked_to_train(tmp_path, clock, lambda site, number: 1800.0 if site == "c" else 300.0, config, monkeypatch)
    # round 1 closed after 1200 s, 900 s of its patience: 300 s are left after the others' 300 s
    assert found["c", 3][1] == pytest.approx(0.9 * 600.0 - 5.0, abs=5.0)


def test_a_partial_answer_is_no_pace(clock):
    """Catches: a quorum that was hurried, and that hurries the next one."""
    silence = Silence()
    waiting = Waiting(silence, "train", "train", {"a"}, Deadline(600.0), 600.0, 0.0, simulated=False, has_partial=True)
    clock.now += 100.0
    waiting.heard("a", accepted=True)
    waiting.settle(lambda: True)
    assert silence.deadline_s("b", 600.0, 0.0) == 600.0


def test_where_nobody_is_needed_the_time_out_stays(clock):
    """Catches: ten minutes under Poisson sampling, whose quorum is 0, whatever the work takes."""
    deadline = Deadline(FIRST_TIMEOUT_S)
    waiting = Waiting(
        Silence(), "train", "train", {"a"}, deadline, FIRST_TIMEOUT_S, math.inf, simulated=False, adapts=True
    )
    waiting.settle(lambda: True)
    assert deadline.after_s == FIRST_TIMEOUT_S


@pytest.mark.parametrize("why", ["off", "rows", "clients", "simulated", "validates"])
def test_every_step_is_waited_for(tmp_path, clock, monkeypatch, why):
    """Catches: an account of steps that were not taken; a simulation whose result depends on the machine."""
    config = config_of(tmp_path, partial_updates=why != "off")
    ctx = slow_context(tmp_path, SITES, clock, takes(1.0), config)
    assert ctx.takes_partial_updates == (why != "off")
    if why == "rows":
        ctx = replace(ctx, config=changed(config, {"privacy.examples.noise_multiplier": 1.0}))
    elif why == "clients":
        ctx = replace(ctx, privacy=object())
    elif why == "validates":
        ctx = replace(ctx, config=changed(config, {"train.validate_every_steps": 2}))
    elif why == "simulated":
        monkeypatch.setattr(ctx.grid, "simulated", True)
    assert not ctx.takes_partial_updates


# What silence costs


@pytest.mark.parametrize("work_s", [1.0, 50.0, 250.0])
@pytest.mark.parametrize("silent_from", [1, 4])
def test_a_silent_site_costs_one_time_out_in_twenty_rounds(tmp_path, clock, work_s, silent_from):
    """Catches: each round that waits for it anew, a grace that is paid whenever it is asked again."""
    ctx, seconds = run_slow(
        tmp_path,
        clock,
        lambda site, number: NEVER if site == "c" and number >= silent_from else work_s,
        config_of(tmp_path),
    )
    _, without = run_slow(tmp_path / "honest", clock, work_s, config_of(tmp_path), ["a", "b"])
    assert len(lines(tmp_path)) == 20
    assert seconds - without <= TIMEOUT_S + 20.0  # the last poll of each round may be half a second late
    assert len(rounds_asked(ctx, "c")) > 3


def test_a_silent_site_is_asked_at_growing_intervals(tmp_path, clock):
    """Catches: a site that is asked each round, or never again; intervals that grow without end."""
    ctx, _ = run_slow(
        tmp_path, clock, lambda site, number: NEVER if site == "c" else 1.0, config_of(tmp_path, rounds=70)
    )
    assert rounds_asked(ctx, "c") == [1, 3, 6, 11, 20, 37, 54]
    assert LONGEST_REST == 16


def test_who_is_not_asked_is_named(tmp_path, clock):
    """Catches: a site left out in silence."""
    run_slow(tmp_path, clock, lambda site, number: NEVER if site == "c" else 1.0, config_of(tmp_path, rounds=6))
    found = lines(tmp_path)
    assert [line.get("not_asked") for line in found] == [None, {"c": 3}, None, {"c": 6}, {"c": 6}, None]
    assert [list(line["rejected"]) for line in found] == [["c"], [], ["c"], [], [], ["c"]]
    assert "c not asked until round 6 (silent)" in describe(found[3])
    events = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "round"]
    assert [event.get("not_asked") for event in events] == [None, ["c"], None, ["c"], ["c"], None]


def test_an_answer_ends_it(tmp_path, clock):
    """Catches: a site that stays at its long interval after it has come back to life."""
    ctx, _ = run_slow(
        tmp_path,
        clock,
        lambda site, number: NEVER if site == "c" and number in (1, 3, 8) else 1.0,
        config_of(tmp_path, rounds=11),
    )
    assert rounds_asked(ctx, "c") == [1, 3, 6, 7, 8, 10, 11]


def test_why_a_site_did_not_answer(tmp_path, clock):
    """Catches: a dead line, a slow machine and a site that never trained, which the operator cannot tell apart."""

    def seconds(site, number):
        silent = site == "c" or (number >= 2 and site in ("d", "e"))
        return NEVER if silent else 1.0

    ctx = slow_context(
        tmp_path,
        [*SITES, "d", "e"],
        clock,
        takes(seconds),
        config_of(tmp_path, rounds=2),
        away=lambda now: ["e"] if now > 2.0 + TIMEOUT_S else [],
    )
    run_rounds(ctx, toy_state())
    reasons = [{site: one["reason"] for site, one in line["rejected"].items()} for line in lines(tmp_path)]
    assert reasons == [{"c": "silent"}, {"d": "slow", "e": "gone"}]


def test_a_silent_site_is_asked_where_there_is_no_round_without_it(tmp_path, clock):
    """Catches: a quorum missed because the site that it needs was not even asked."""
    config = config_of(tmp_path, rounds=3, min_clients=3)
    once = iter([NEVER])
    ctx, _ = run_slow(tmp_path, clock, lambda site, number: next(once, 1.0) if site == "c" else 1.0, config)
    assert rounds_asked(ctx, "c") == [1, 1, 2, 3]


def test_nothing_of_it_outlives_the_process(tmp_path, clock):
    """Catches: a resumed run that leaves out a site which may be well by now."""
    config = config_of(tmp_path, rounds=2)
    run_slow(tmp_path, clock, lambda site, number: NEVER if site == "c" else 1.0, config)
    ctx = slow_context(tmp_path, SITES, clock, takes(1.0), config)
    assert ctx.roster.silence.resting("train", 3) == {}


# How long a round stays open


@pytest.mark.parametrize(
    ("grace_s", "took_s"),
    [(0.0, 10.0), (5.0, 15.0), (100.0, 110.0), (1000.0, TIMEOUT_S)],
)
def test_a_number_closes_a_round_so_long_after_its_quorum(tmp_path, clock, grace_s, took_s):
    """Catches: a grace counted from the start, a grace beyond the time-out, or none at all."""
    config = config_of(tmp_path, rounds=1, grace_s=grace_s)
    _, seconds = run_slow(tmp_path, clock, lambda site, number: NEVER if site == "c" else 10.0, config)
    assert seconds == pytest.approx(took_s, abs=1.0)


@pytest.mark.parametrize(("work_s", "took_s"), [(2.0, 32.0), (100.0, 200.0)])
def test_a_site_that_has_answered_is_waited_for_as_long_again_as_the_quorum_took(tmp_path, clock, work_s, took_s):
    """Catches: the whole time-out for a site that is known to be fast; no least grace for short rounds."""
    config = config_of(tmp_path, rounds=2)
    _, seconds = run_slow(tmp_path, clock, lambda site, number: NEVER if (site, number) == ("c", 2) else work_s, config)
    assert seconds - work_s == pytest.approx(took_s, abs=2.0)


def test_a_slow_site_is_in_every_round(tmp_path, clock):
    """Catches: a default that shuts out the site with the most rows, which takes longer than two small ones."""
    config = config_of(tmp_path, rounds=4)
    run_slow(tmp_path, clock, lambda site, number: {"c": 200.0 + 40.0 * number}.get(site, 5.0), config)
    assert [sorted(line["accepted"]) for line in lines(tmp_path)] == [SITES] * 4


def test_a_site_that_has_become_slow_gets_a_second_chance(tmp_path, clock):
    """Catches: a bound from its earlier pace that it can never meet again."""
    config = config_of(tmp_path, rounds=5)
    run_slow(tmp_path, clock, lambda site, number: 200.0 if site == "c" and number > 1 else 5.0, config)
    assert ["c" in line["accepted"] for line in lines(tmp_path)] == [True, False, False, True, True]


@pytest.mark.parametrize(("work_s", "closes_s"), [(1.0, 600.0), (300.0, 1200.0), (2000.0, 8000.0)])
def test_the_time_out_suits_the_work(tmp_path, clock, work_s, closes_s):
    """Catches: a fixed time-out: rounds of half an hour that are void, short ones that wait for hours."""
    config = config_of(tmp_path, rounds=2, round_timeout_s="auto")
    _, seconds = run_slow(tmp_path, clock, lambda site, number: NEVER if site == "c" else work_s, config)
    assert [sorted(line["accepted"]) for line in lines(tmp_path)] == [["a", "b"]] * 2
    assert seconds - work_s == pytest.approx(closes_s, abs=2.0)


def test_the_time_out_follows_the_slowest_site():
    """Catches: a time-out by the fastest site, or one that is shorter than a site's usual time."""
    silence = Silence()
    assert silence.timeout_s() == FIRST_TIMEOUT_S
    silence.answered("evaluate", "c", 5000.0)
    assert silence.timeout_s() == FIRST_TIMEOUT_S
    silence.answered("train", "a", 10.0)
    assert silence.timeout_s() == 600.0
    silence.answered("train.masked", "b", 1000.0)
    assert silence.timeout_s() == 4000.0


def test_the_operator_is_shown_the_time_out(tmp_path, clock):
    """Catches: a time-out that nobody can know."""
    shown = Shown()
    config = config_of(tmp_path, rounds=3, round_timeout_s="auto")
    ctx = slow_context(tmp_path, SITES, clock, takes(200.0), config, progress=shown)
    run_rounds(ctx, toy_state())
    found = [note for note in shown.notes if "round_timeout_s" in note]
    assert len(found) == 1
    assert re.search(r"for 80[0-4] s at most", found[0])


class Shown(Progress):
    """Keeps the notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        """Keep it."""
        self.notes.append(text)


TEN = [f"s{index}" for index in range(10)]


def first_too_slow(then_s):
    """Return how long sites take: in their first attempt longer than the time-out, then `then_s(index)`."""
    seen = set()

    def seconds(site, number):
        if site not in seen:
            seen.add(site)
            return TIMEOUT_S + 100.0
        return then_s(TEN.index(site))

    return seconds


def test_an_attempt_in_which_nobody_answers_shuts_no_slow_site_out(tmp_path, clock):
    """Catches: the whole time-out charged to all sites, so that each later round closes with the fastest."""
    train_s = first_too_slow(lambda index: 100.0 + 10.0 * index)
    config = config_of(tmp_path, rounds=4, min_clients=3)
    run_slow(tmp_path, clock, train_s, config, TEN)
    valid = [line for line in lines(tmp_path) if not line.get("voided")]
    assert [sorted(line["accepted"]) for line in valid] == [TEN] * 4


def test_an_evaluation_in_which_nobody_answers_shuts_no_slow_site_out(tmp_path, clock):
    """Catches: sites that are never waited for again, in training too, because their first evaluation was slow."""
    evaluating(tmp_path, clock, first_too_slow(lambda index: 100.0), lambda site, number: 100.0, rounds=4, sites=TEN)
    found = lines(tmp_path)
    assert [sorted(line["accepted"]) for line in found] == [TEN] * 4
    assert [sorted(line.get("sites_eval", {})) for line in found] == [[], TEN, TEN, TEN]


def test_before_the_quorum_a_round_stays_open(tmp_path, clock):
    """Catches: a grace that ends a round which could still be valid."""
    config = config_of(tmp_path, rounds=1, grace_s=0.0, min_clients=3)
    _, seconds = run_slow(tmp_path, clock, lambda site, number: {"c": 500.0}.get(site, 1.0), config)
    assert seconds == pytest.approx(500.0, abs=1.0)
    assert sorted(lines(tmp_path)[0]["accepted"]) == SITES


def test_everybody_silent_ends_the_run(tmp_path, clock):
    """Catches: a wait without end when nobody is left."""
    with pytest.raises(QuorumNotMet):
        run_slow(tmp_path, clock, lambda site, number: NEVER, config_of(tmp_path, rounds=1))


def test_simulated_sites_are_waited_for_and_asked_each_round(tmp_path, monkeypatch):
    """Catches: results that depend on how busy the machine is."""
    Clock().rule(monkeypatch)
    ran = run_toy(tmp_path, toy_app(SITES), 3, config_of(tmp_path, rounds=3, grace_s=0.0))
    assert [sorted(line["accepted"]) for line in ran.rounds] == [SITES] * 3


# At-site evaluation


def evaluating(folder, clock, evaluate_s, train_s=1.0, rounds=20, sites=SITES):
    """Run with evaluation at sites; return the context and the seconds."""
    config = toy_config(folder, run={"rounds": rounds}, strategy={"round_timeout_s": TIMEOUT_S})
    return run_slow(folder, clock, train_s, config, sites, evaluate_s=evaluate_s)


def test_a_site_that_hangs_in_evaluation_costs_one_time_out(tmp_path, clock):
    """Catches: `round_timeout_s` again in each evaluation; a site that no longer trains because it cannot evaluate."""
    ctx, seconds = evaluating(tmp_path, clock, lambda site, number: NEVER if site == "c" else 1.0)
    assert seconds <= TIMEOUT_S + 20 * (1.0 + 1.0 + 2.0)
    assert rounds_asked(ctx, "c", "evaluate") == [0, 2, 5, 10, 19]
    assert rounds_asked(ctx, "c") == list(range(1, 21))
    assert sorted(lines(tmp_path)[0]["sites_eval"]) == ["a", "b"]
    assert lines(tmp_path)[0]["sites_eval_not_asked"] == {"c": 2}
    assert "c not asked to evaluate until round 2 (silent)" in describe(lines(tmp_path)[0])
    rejected = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "evaluation-rejected"]
    assert [(event["site"], event["round"], event["code"]) for event in rejected][:2] == [
        ("c", 0, "silent"),
        ("c", 2, "slow"),
    ]


def test_a_site_that_is_wholly_silent_costs_one_time_out_evaluations_included(tmp_path, clock):
    """Catches: one time-out for the first evaluation, and another for the first round."""
    _, seconds = evaluating(
        tmp_path,
        clock,
        lambda site, number: NEVER if site == "c" else 1.0,
        lambda site, number: NEVER if site == "c" else 1.0,
    )
    assert seconds <= TIMEOUT_S + 20 * (1.0 + 1.0 + 2.0)


def test_a_site_that_is_silent_in_training_is_not_asked_to_evaluate(tmp_path, clock):
    """Catches: an evaluation that waits for a site which has just cost the round its time-out."""
    config = toy_config(tmp_path, strategy={"round_timeout_s": TIMEOUT_S})
    ctx = slow_context(tmp_path, SITES, clock, takes(1.0), config)
    ctx.roster.silence.missed("train", "c", 1, 10.0)
    assert sorted(evaluate_at_sites(ctx, toy_state())) == ["a", "b"]


def test_a_site_that_does_not_evaluate_for_its_silence_in_training_is_named(tmp_path, clock):
    """Catches: a site that is missing from an evaluation, and no record says why; one named that keeps no rows."""

    def fault(node, reply):
        return (
            [rewritten(reply, evaluation_rows=0)] if node == 4 and reply.metadata.message_type == "query" else [reply]
        )

    config = toy_config(tmp_path, run={"rounds": 4}, strategy={"round_timeout_s": TIMEOUT_S})
    train_s = takes(lambda site, number: NEVER if site in "cd" else 1.0)
    run_rounds(slow_context(tmp_path, [*SITES, "d"], clock, train_s, config, fault=fault), toy_state())
    found = lines(tmp_path)
    assert [sorted(line["sites_eval"]) for line in found] == [["a", "b"]] * 4
    assert [line.get("sites_eval_not_asked") for line in found] == [{"c": 3}, {"c": 3}, {"c": 6}, {"c": 6}]


# The book of silence


def test_a_site_that_comes_back_is_asked_at_once_with_half_the_patience():
    """Catches: a mended site left out for 16 rounds; one that reconnects each round to be waited for each round."""
    silence = Silence()
    for number in (1, 3, 6):
        silence.missed("train", "c", number, 100.0)
    assert silence.resting("train", 7) == {"c": 11}
    assert silence.patience_s("train", "c", TIMEOUT_S) == 300.0
    silence.said_hello("c")
    assert silence.resting("train", 7) == {}
    assert silence.patience_s("train", "c", TIMEOUT_S) == 300.0
    silence.missed("train", "c", 7, 300.0)
    silence.said_hello("c")
    assert silence.patience_s("train", "c", TIMEOUT_S) == 150.0
    silence.answered("train", "c", 5.0)
    assert silence.patience_s("train", "c", TIMEOUT_S) == TIMEOUT_S


def test_attempts_at_one_round_are_one_miss():
    """Catches: a site that is not asked for 16 rounds, because one round was tried five times."""
    silence = Silence()
    for _ in range(5):
        silence.missed("train", "c", 3, 20.0)
    assert silence.resting("train", 4) == {"c": 5}
    assert silence.patience_s("train", "c", TIMEOUT_S) == TIMEOUT_S - 100.0


def test_only_the_last_step_of_a_sum_shows_that_a_site_does_its_duty():
    """Catches: a site that sends its keys, never a sum, and is waited for anew in each round."""
    silence = Silence()
    silence.missed("train", "c", 1, 100.0)
    silence.answered("query.keys", "c", 0.1)
    silence.answered("train.masked", "c", 5.0)
    assert silence.is_silent("train", "c")
    silence.answered("query.unmask", "c", 0.1)
    assert not silence.is_silent("train", "c")
