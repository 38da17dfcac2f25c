"""Sites that are waited for: at the start, between rounds, and when a round has too few."""

import pytest

from tests.support.federation import hurry
from tests.support.private import privacy_of, private_config
from tests.support.slow import Clock, SlowGrid, rounds_asked, slow_context
from tests.support.toy import SPEC, federate, rewritten, toy_app, toy_config, toy_state
from tsugiki.common.audit import verify
from tsugiki.common.errors import NotEnoughSites, QuorumNotMet
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.planning import make_plan
from tsugiki.server.run.collect import sample
from tsugiki.server.run.loop import run_rounds
from tsugiki.server.run.progress import Progress

SITES = ["a", "b", "c"]


class Notes(Progress):
    """What the operator was told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        """Keep it."""
        self.notes.append(text)


@pytest.fixture
def clock(monkeypatch):
    """Time under control."""
    return Clock().rule(monkeypatch)


def quick(site, kind, number):
    """Answer hellos at once, and all else in a second."""
    return 0.0 if kind == "query" else 1.0


def config_of(folder, **strategy):
    """Return a run of three rounds with an hour to wait for sites."""
    return toy_config(folder, evaluation={"at_sites": False}, strategy={"connect_timeout_s": 100.0, **strategy})


# At the start


@pytest.mark.parametrize("start_with", [3, ["c"], ["a", "b", "c"]])
def test_a_run_starts_with_the_sites_that_it_was_told_to_wait_for(tmp_path, clock, start_with):
    """Catches: a start with the quorum, without the site that connects a second later; a number compared to names."""
    config = config_of(tmp_path, start_with=start_with)
    ctx = slow_context(tmp_path, SITES, clock, quick, config, away=lambda now: "c" if now < 60 else "")
    assert list(ctx.roster.members()) == SITES
    assert 60 <= clock.now < 70
    assert ctx.roster.missing() == {}


@pytest.mark.parametrize("start_with", [4, ["a", "zeta"]])
def test_a_run_starts_without_who_does_not_come_in_time(tmp_path, clock, start_with):
    """Catches: a run that fails, or waits for ever, because one of many sites is missing."""
    ctx = slow_context(tmp_path, SITES, clock, quick, config_of(tmp_path, start_with=start_with))
    assert list(ctx.roster.members()) == SITES
    assert clock.now == pytest.approx(100.0, abs=1.0)
    assert ctx.roster.missing() == ({} if start_with == 4 else {"zeta": "not connected"})


def test_without_the_setting_a_run_starts_with_its_quorum(tmp_path, clock):
    """Catches: old run files that now wait for somebody."""
    ctx = slow_context(tmp_path, SITES, clock, quick, away=lambda now: "c" if now < 60 else "")
    assert list(ctx.roster.members()) == ["a", "b"]
    assert clock.now < 10


def test_fewer_than_a_quorum_do_not_start(tmp_path, clock):
    """Catches: a start with those who are there once the time is up."""
    with pytest.raises(NotEnoughSites, match="1 of 2 clients are connected after 100 s"):
        slow_context(tmp_path, ["a"], clock, quick, config_of(tmp_path, start_with=3))


@pytest.mark.parametrize("start_with", [0, 3])
def test_a_site_that_does_not_answer_its_hello_does_not_prevent_the_start(tmp_path, clock, start_with):
    """Catches: one hello that is waited for to the end, while those that connect in the meantime are not greeted."""
    ctx = slow_context(
        tmp_path,
        [*SITES, "d"],
        clock,
        lambda site, kind, number: None if site == "d" else 0.0,
        config_of(tmp_path, start_with=start_with),
        away=lambda now: SITES if now < 10 else (),
    )
    assert list(ctx.roster.members()) == SITES
    assert clock.now < 50


def test_sites_that_connect_at_the_last_moment_are_greeted(tmp_path, clock):
    """Catches: a start that fails while the hello of a silent site takes the last seconds."""
    ctx = slow_context(
        tmp_path,
        [*SITES, "d"],
        clock,
        lambda site, kind, number: None if site == "d" else 5.0,
        config_of(tmp_path),
        away=lambda now: SITES if now < 98 else (),
    )
    assert list(ctx.roster.members()) == SITES


def test_a_site_that_is_slow_at_its_first_hello_is_in_the_start(tmp_path, clock):
    """Catches: a site that prepares its rows for longer than a hello is waited for, and is not asked again in time."""
    asked_at = []

    def takes(site, kind, number):
        if site != "c":
            return 0.0
        asked_at.append(clock.now)
        return max(0.5, asked_at[0] + 50.0 - clock.now)

    ctx = slow_context(tmp_path, SITES, clock, takes, config_of(tmp_path, start_with=SITES))
    assert list(ctx.roster.members()) == SITES
    assert len(asked_at) > 1
    assert clock.now < 80


def test_who_is_missing_at_the_start_is_named(tmp_path, monkeypatch):
    """Catches: a site that misses a whole run unsaid: not connected, refused, or silent at its hello."""
    hurry(monkeypatch)
    progress = Notes()

    def fault(node, reply):
        if reply.metadata.message_type == "query" and node > 2:
            return [rewritten(reply, rows=0)] if node == 3 else []
        return [reply]

    config = toy_config(tmp_path, strategy={"start_with": ["a", "zeta"]})
    keys = {1: "a", 2: "b", 3: "c", 4: "d", 99: "e"}
    federate(monkeypatch, toy_app([*SITES, "d"]), 4, config, fault, progress=progress, names=lambda: keys)
    missing = {
        "c": "shard-empty",
        "d": "no answer to the hello",
        "e": "not connected",
        "zeta": "not connected",
    }
    told = [note for note in progress.notes if "starting with 2 sites" in note]
    assert len(told) == 1
    assert all(f"{site} ({why})" in told[0] for site, why in missing.items())
    events = [event for event in verify(tmp_path / "toy" / "audit.jsonl") if event["event"] == "missing-at-start"]
    assert [event["sites"] for event in events] == [missing]


# Between rounds


def run_away(folder, clock, until, **strategy):
    """Run three rounds, with b away from time 10 until a time, and a quorum of two; return the context."""
    progress = Notes()
    ctx = slow_context(
        folder,
        ["a", "b"],
        clock,
        lambda site, kind, number: 0.0 if kind == "query" else 10.0,
        config_of(folder, **strategy),
        away=lambda now: "b" if 15 <= now < until else "",
        progress=progress,
    )
    run_rounds(ctx, toy_state())
    return ctx


def test_a_run_waits_for_its_sites_to_come_back(tmp_path, clock):
    """Catches: a run of days that ends because one site was cut off for a minute."""
    ctx = run_away(tmp_path, clock, 1500.0)
    assert 1500 < clock.now < 1600
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["round"]]
    assert [sorted(line["accepted"]) for line in lines] == [["a", "b"]] * 3
    waited = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "waiting-for-quorum"]
    assert [(event["round"], event["connected"]) for event in waited] == [(3, ["a"])]
    assert any("waiting for others, for 3600 s at most" in note for note in ctx.progress.notes)


def test_the_wait_has_an_end(tmp_path, clock):
    """Catches: a server that waits for ever for a site that has left the federation."""
    with pytest.raises(NotEnoughSites, match="Round 3: 1 clients at 1 sites are connected after 200 s"):
        run_away(tmp_path, clock, 1500.0, wait_for_quorum_s=200.0)
    assert clock.now < 300


def test_nobody_is_waited_for_where_the_setting_says_so(tmp_path, clock):
    """Catches: a wait that cannot be switched off."""
    with pytest.raises(NotEnoughSites):
        run_away(tmp_path, clock, 1500.0, wait_for_quorum_s=0)
    assert clock.now < 60


@pytest.mark.parametrize("back_s", [1500.0, 10**6])
def test_an_honest_site_is_waited_for_while_a_liar_is_connected(tmp_path, clock, back_s):
    """Catches: sites counted with the one that is left out, so that a run ends at once instead of after an hour."""
    config = private_config("distributed", folder=tmp_path, secure_aggregation=True, noise_multiplier=1.0)
    plan = make_plan(config, SPEC.size)
    honest = ["a", "b", "c", "d"]  # as many as a sum takes
    ctx = slow_context(
        tmp_path,
        [*honest, "liar"],
        clock,
        quick,
        config,
        away=lambda now: "d" if 15 <= now < back_s else "",
        privacy=privacy_of(plan, tmp_path),
        progress=Notes(),
    )
    ctx.suspicion.learn([("a", "b", "c", "liar"), ("a", "b", "d", "liar"), ("a", "c", "d", "liar")], [], 1)
    ctx.suspicion.learn([("b", "c", "d", "liar")], [], 1)
    assert ctx.suspicion.left_out(9) == {"liar"}
    clock.now = 20.0
    if back_s < 3600:
        assert [member.name for member in sample(ctx, 9, 0)] == honest
        assert 1500 <= clock.now < 1600
    else:
        with pytest.raises(NotEnoughSites, match=r"3 clients at 3 sites are connected, without 1 that .* after 3600 s"):
            sample(ctx, 9, 0)
        assert clock.now > 3600
    assert any("without 1 that spoiled sums; waiting for others" in note for note in ctx.progress.notes)


# In a round


def run_hanging(folder, clock, hangs, **strategy):
    """Run three rounds of two sites, of which b hangs in its first attempts at round 2; return the context."""
    left = iter(range(hangs))

    def takes(site, kind, number):
        if (site, kind, number) == ("b", "train", 2) and next(left, None) is not None:
            return None
        return quick(site, kind, number)

    ctx = slow_context(folder, ["a", "b"], clock, takes, config_of(folder, **strategy))
    run_rounds(ctx, toy_state())
    return ctx


def test_a_round_is_tried_until_its_sites_are_back(tmp_path, clock):
    """Catches: a run that ends after two attempts, both lost to one site that hung for some minutes."""
    ctx = run_hanging(tmp_path, clock, 5)
    assert rounds_asked(ctx, "b") == [1, 2, 2, 2, 2, 2, 2, 3]
    voided = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "round-voided"]
    assert [event["attempt"] for event in voided] == list(range(5))


def test_a_round_is_not_tried_for_ever(tmp_path, clock):
    """Catches: a wait that begins anew with each attempt."""
    with pytest.raises(QuorumNotMet, match="1 accepted replies, at the last of"):
        run_hanging(tmp_path, clock, 10**6, wait_for_quorum_s=500.0)
    assert clock.now < 700


def test_a_round_whose_replies_are_bad_is_tried_twice(tmp_path, clock):
    """Catches: an hour of attempts with a site that answers, and is rejected each time."""

    def fault(node, reply):
        bad = reply.metadata.message_type == "train" and node == 2
        return [rewritten(reply, rows=-1)] if bad else [reply]

    ctx = slow_context(tmp_path, ["a", "b"], clock, quick, config_of(tmp_path), fault=fault)
    with pytest.raises(QuorumNotMet, match="twice"):
        run_rounds(ctx, toy_state())
    assert rounds_asked(ctx, "b") == [1, 1]


def test_a_simulation_waits_for_nobody(tmp_path, monkeypatch):
    """Catches: a simulation that stands still for an hour when a site fails."""
    clock = Clock().rule(monkeypatch)
    monkeypatch.setattr(SlowGrid, "simulated", True)
    with pytest.raises(QuorumNotMet, match="twice"):
        run_hanging(tmp_path, clock, 10**6)
