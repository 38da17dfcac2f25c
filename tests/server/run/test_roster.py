import dataclasses
import itertools
import os

import pytest

from tests.support.federation import hurry
from tests.support.slow import Clock, slow_context
from tests.support.toy import SPEC, rewritten, toy_app, toy_config, toy_context
from tsugiki.common import __version__
from tsugiki.common.audit import verify
from tsugiki.common.errors import NotEnoughSites, StorageError
from tsugiki.common.wire.messages import error_reply
from tsugiki.server.engines.in_process import InProcessGrid


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


def forging_hello(node, **fields):
    """Return a fault that replaces fields of one node's hello."""

    def fault(sender, reply):
        return [rewritten(reply, **fields) if sender == node and not reply.has_error() else reply]

    return fault


def greeted(folder, sites, fault=None, **settings):
    """Return the context of a run after its hello."""
    ctx = toy_context(folder, toy_app(sites), len(sites), toy_config(folder, **settings), fault)
    ctx.roster.refresh()
    return ctx


def test_sites_are_known_by_name_whatever_node_they_are(tmp_path):
    """Catches: an order by node id, and node ids mixed up between sites."""
    members = greeted(tmp_path, ["retail", "clinic", "bank"]).roster.members()
    assert [(member.name, member.node_id, member.rows) for member in members.values()] == [
        ("bank", 3, 10),
        ("clinic", 2, 10),
        ("retail", 1, 10),
    ]
    assert list(members) == ["bank", "clinic", "retail"]


def test_a_hello_lives_as_long_as_it_is_waited_for(tmp_path, monkeypatch):
    """Catches: a site that takes longer to load its model than a round may last, and is never let in."""
    ctx = toy_context(tmp_path, toy_app(["bank"]), 1, toy_config(tmp_path, strategy={"round_timeout_s": 2.0}))
    sent, push = [], ctx.grid.push_messages
    monkeypatch.setattr(ctx.grid, "sequential", False)
    monkeypatch.setattr(ctx.grid, "push_messages", lambda messages: push(sent.extend(messages) or messages))
    ctx.roster.refresh(50.0)
    assert [message.metadata.ttl >= 50.0 for message in sent] == [True]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"site": "Site 1"}, "site-name"),
        ({"site": "../../etc/x"}, "site-name"),
        ({"site": "site-0\n"}, "site-name"),
        ({"site": "site-0"}, "site-name-taken"),
        ({"version": "9.9.0"}, "version-mismatch"),
        ({"base_fingerprint": "1" * 64}, "base-mismatch"),
        ({"spec_sha256": "1" * 64}, "spec-mismatch"),
        ({"rows": 0}, "shard-empty"),
        ({"rows": -5}, "shard-empty"),
        ({"evaluation_rows": -1}, "shard-empty"),
        ({"rows": "10"}, "type"),
        ({"rows": None}, "keys"),
    ],
)
def test_a_site_that_does_not_fit_is_refused_with_a_code(tmp_path, fields, code):
    """Catches: any part of the hello that is believed unchecked, and a refusal that takes the others with it."""
    ctx = greeted(tmp_path, ["site-0", "site-1"], forging_hello(2, **fields))
    assert list(ctx.roster.members()) == ["site-0"]
    assert ctx.roster.refused() == {2: code}
    assert [event["code"] for event in verify(tmp_path / "audit.jsonl") if event["event"] == "refused"] == [code]


def test_a_mismatch_is_recorded_with_both_values(tmp_path):
    """Catches: a refusal that tells the operator neither side's value."""
    greeted(tmp_path, ["site-0", "site-1"], forging_hello(2, base_fingerprint="abcdef" * 11))
    event = verify(tmp_path / "audit.jsonl")[-1]
    assert (event["theirs"], event["ours"]) == ("abcdefabcdef", SPEC.base_fingerprint[:12])


def test_only_what_looks_like_a_note_is_kept(tmp_path):
    """Catches: a site that writes what it likes on the operator's terminal."""
    said = "no-bf16,shard-one-class,shard-texts-cut:12,\x1b[2Jgone,All is well,:3"
    member = greeted(tmp_path, ["clinic"], forging_hello(1, notes=said)).roster.members()["clinic"]
    assert member.notes == ("no-bf16", "shard-one-class", "shard-texts-cut:12")


def test_another_patch_version_fits(tmp_path):
    """Catches: versions compared in full, which would make every patch release a flag day."""
    patched = ".".join([*__version__.split(".")[:2], "99"])
    assert len(greeted(tmp_path, ["site-0"], forging_hello(1, version=patched)).roster.members()) == 1


def test_of_two_namesakes_the_lower_node_id_wins_whoever_answers_first(tmp_path):
    """Catches: a name given to the one that happens to answer first."""
    ctx = toy_context(tmp_path, toy_app(["bank", "bank"]), 2)
    grid = ctx.grid
    ids = grid.get_node_ids
    grid.get_node_ids = lambda: list(reversed(ids()))
    ctx.roster.refresh()
    assert ctx.roster.members()["bank"].node_id == 1
    assert ctx.roster.refused() == {2: "site-name-taken"}


def test_a_refused_node_is_not_asked_again(tmp_path):
    """Catches: a hello to a node that does not fit, in every round."""
    ctx = greeted(tmp_path, ["site-0", "site-1"], forging_hello(2, rows=0))
    before = len(verify(tmp_path / "audit.jsonl"))
    ctx.roster.refresh()
    assert len(verify(tmp_path / "audit.jsonl")) == before
    assert ctx.roster.refused() == {2: "shard-empty"}


def test_a_greeting_flushes_its_events_once_and_before_its_sites_are_members(tmp_path, monkeypatch):
    """Catches: a flush for each hello; a site that trains although a crash could make the log forget its hello."""
    flushed = []
    ctx = toy_context(tmp_path, toy_app(["a", "b", "c", "b"]), 4, toy_config(tmp_path))
    real = os.fsync

    def flush(descriptor):
        flushed.append(list(ctx.roster.members()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    ctx.roster.refresh()
    assert flushed == [[], []]  # the new file once, and the folder that has its name
    assert list(ctx.roster.members()) == ["a", "b", "c"]
    events = [(event["event"], event.get("site")) for event in verify(tmp_path / "audit.jsonl")]
    assert events == [("hello", "a"), ("hello", "b"), ("hello", "c"), ("refused", None)]


def test_sites_whose_hello_cannot_be_written_down_do_not_join(tmp_path, monkeypatch):
    """Catches: members that the audit log does not know."""
    ctx = toy_context(tmp_path, toy_app(["a", "b"]), 2, toy_config(tmp_path))

    def fail(*arguments):
        raise StorageError("no disk", code="disk-full")

    monkeypatch.setattr("tsugiki.common.audit.append_lines", fail)
    with pytest.raises(StorageError):
        ctx.roster.refresh()
    assert ctx.roster.members() == {}


def test_the_names_of_keys_are_asked_for_once_in_a_greeting(tmp_path):
    """Catches: a list of all registered keys made anew for each hello."""
    asked = []
    ctx = toy_context(tmp_path, toy_app(["a", "b", "c"]), 3, toy_config(tmp_path))
    ctx.roster._names = lambda: asked.append(1) or {1: "a", 2: "b", 3: "c"}
    ctx.roster.refresh()
    assert list(ctx.roster.members()) == ["a", "b", "c"]
    assert len(asked) == 1


def test_a_node_that_does_not_answer_is_asked_again(tmp_path):
    """Catches: a site that is lost for good because it was slow at its first hello."""
    silent = [True]
    ctx = greeted(tmp_path, ["site-0", "site-1"], lambda node, reply: [] if silent[0] and node == 2 else [reply])
    assert list(ctx.roster.members()) == ["site-0"]
    silent[0] = False
    ctx.roster.refresh()
    assert list(ctx.roster.members()) == ["site-0", "site-1"]


def with_nodes(ctx, nodes):
    """Let the grid show only these nodes."""
    ctx.grid.get_node_ids = lambda: list(nodes)
    ctx.roster.refresh()
    return list(ctx.roster.members().values())


def test_a_site_that_left_is_no_member(tmp_path):
    """Catches: a node sampled after it was gone."""
    ctx = greeted(tmp_path, ["site-0", "site-1"])
    assert [member.name for member in with_nodes(ctx, [1])] == ["site-0"]


def test_a_site_that_comes_back_says_hello_again(tmp_path):
    """Catches: the old number of rows believed of a site that was restarted with other data."""
    rows = [10]
    ctx = greeted(tmp_path, ["site-0"], lambda node, reply: [rewritten(reply, rows=rows[0])])
    with_nodes(ctx, [])
    rows[0] = 7
    assert [member.rows for member in with_nodes(ctx, [1])] == [7]


def test_a_restarted_site_gets_its_name_back_once_its_old_node_is_gone(tmp_path):
    """Catches: a site refused for good because it reconnected before its old node was noticed to be dead."""
    ctx = toy_context(tmp_path, toy_app(["site-0", "site-1", "site-1"]), 3)
    assert len(with_nodes(ctx, [1, 2])) == 2
    assert [member.node_id for member in with_nodes(ctx, [1, 2, 3])] == [1, 2]
    assert [(member.name, member.node_id) for member in with_nodes(ctx, [1, 3])] == [("site-0", 1), ("site-1", 3)]


def test_waiting_ends_with_the_counts_and_the_codes(tmp_path):
    """Catches: an endless wait, and an error that does not tell how many are missing or why."""
    config = toy_config(tmp_path, strategy={"min_clients": 3})
    ctx = toy_context(tmp_path, toy_app(["a", "b", "c"]), 3, config, forging_hello(2, rows=0))
    with pytest.raises(NotEnoughSites, match=r"2 of 3 clients .*1 refused: shard-empty") as caught:
        ctx.roster.wait(lambda count: None)
    assert caught.value.exit_status == 4


class Growing(InProcessGrid):
    """A grid whose nodes connect one after another, one at every third look."""

    sequential = False
    looks = 0

    def get_node_ids(self):
        """Return the nodes that are there by now."""
        self.looks += 1
        return super().get_node_ids()[: self.looks // 3]


def growing(folder, sites, fault=None, **settings):
    """Return the context of a run whose sites connect slowly."""
    config = toy_config(folder, **settings)
    ctx = toy_context(folder, toy_app(sites), len(sites), config)
    grid = Growing(toy_app(sites), len(sites), fault)
    roster = type(ctx.roster)(grid, config, SPEC, None, ctx.audit, ctx.stop)
    return dataclasses.replace(ctx, grid=grid, roster=roster)


def test_waiting_sees_sites_that_come_late(tmp_path):
    """Catches: a look at the start only."""
    seen = []
    ctx = growing(tmp_path, ["a", "b", "c"], strategy={"min_clients": 3})
    ctx.roster.wait(seen.append)
    assert list(ctx.roster.members()) == ["a", "b", "c"]
    assert seen[-1] == 3


def test_waiting_goes_on_when_one_of_the_first_is_refused(tmp_path):
    """Catches: a run that gives up at once, with time left, because an unfit site connected before a fit one."""
    ctx = growing(tmp_path, ["a", "b", "c"], forging_hello(1, rows=0), strategy={"min_clients": 2})
    ctx.roster.wait(lambda count: None)
    assert list(ctx.roster.members()) == ["b", "c"]


def test_waiting_where_no_more_can_come_ends_at_once(tmp_path):
    """Catches: a simulation that waits two minutes for sites that its file does not have."""
    ctx = toy_context(tmp_path, toy_app(["a"]), 1, toy_config(tmp_path, strategy={"connect_timeout_s": 1e5}))
    looks = []
    ids = ctx.grid.get_node_ids
    ctx.grid.get_node_ids = lambda: looks.append(1) or ids()
    with pytest.raises(NotEnoughSites):
        ctx.roster.wait(lambda count: None)
    assert len(looks) < 10


def test_waiting_for_sites_that_never_come_ends_in_time(tmp_path):
    """Catches: a wait without end on a grid that could grow."""
    ctx = growing(tmp_path, ["a"], strategy={"min_clients": 2})
    with pytest.raises(NotEnoughSites, match="1 of 2 clients are connected after 30 s"):
        ctx.roster.wait(lambda count: None)


def test_an_error_at_hello_refuses_with_its_code(tmp_path):
    """Catches: a site that cannot read its shard taken for one that did not answer."""
    app = toy_app(["a", "b"])

    def failing(message, context):
        return error_reply("shard-missing", message) if context.node_id == 2 else app(message, context)

    ctx = toy_context(tmp_path, failing, 2)
    ctx.roster.refresh()
    assert ctx.roster.refused() == {2: "shard-missing"}


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (None, {}),
        ({}, {1: "site-name-key", 2: "site-name-key"}),
        ({1: "a", 2: "b"}, {}),
        ({1: "b", 2: "a"}, {1: "site-name-key", 2: "site-name-key"}),
        ({1: "a"}, {2: "site-name-key"}),
    ],
)
def test_with_keys_a_site_has_its_keys_name(tmp_path, names, refused):
    """Catches: a registered key that speaks for another site; a node without a key among those that have one."""
    ctx = toy_context(tmp_path, toy_app(["a", "b"]), 2, toy_config(tmp_path))
    ctx.roster._names = None if names is None else lambda: names
    ctx.roster.refresh()
    assert ctx.roster.refused() == refused
    events = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "refused"]
    assert {int(event["node"]): event["code"] for event in events} == refused
    assert all(event["key"] == (names or {}).get(int(event["node"]), "") for event in events)


def test_who_left_between_rounds_is_given_time_to_come_back(tmp_path, monkeypatch):
    """Catches: a run that ends, or a round without most sites, because a line was dead for a moment."""
    ctx = greeted(tmp_path, ["bank", "clinic"])
    looks = [[1], [1], [1, 2]]
    monkeypatch.setattr(ctx.grid, "get_node_ids", lambda: looks.pop(0) if len(looks) > 1 else looks[0])
    ctx.roster.gather()
    assert list(ctx.roster.members()) == ["bank", "clinic"]


def test_who_leaves_after_the_look_is_left_to_the_round(tmp_path, monkeypatch):
    """Catches: a second look, without a wait: a site that leaves between the two ends the run at once."""
    ctx = greeted(tmp_path, ["bank", "clinic"])
    looks = [[1, 2], [1]]
    monkeypatch.setattr(ctx.grid, "get_node_ids", lambda: looks.pop(0) if len(looks) > 1 else looks[0])
    ctx.roster.gather()
    assert list(ctx.roster.members()) == ["bank", "clinic"]


def test_who_does_not_come_back_or_dropped_out_is_not_waited_for(tmp_path, monkeypatch):
    """Catches: a wait without end; a second wait for a site for which the round has already waited."""
    ctx = greeted(tmp_path, ["bank", "clinic", "retail"])
    looks = []
    monkeypatch.setattr(ctx.grid, "get_node_ids", lambda: looks.append(1) or [1])
    ctx.roster.drop([2])
    ctx.roster.gather()
    assert list(ctx.roster.members()) == ["bank"]
    assert len(looks) > 3
    looks.clear()
    ctx.roster.gather()
    assert len(looks) <= 3


# Nodes that reconnect, or were refused


def test_a_node_that_reconnected_says_hello_again_although_its_id_is_the_same(tmp_path):
    """Catches: a refused site that is mended and restarted with the same key, and is never greeted again."""
    rows, since = [0], {1: "nine", 2: "nine"}
    ctx = toy_context(
        tmp_path,
        toy_app(["bank", "clinic"]),
        2,
        fault=lambda node, reply: [rewritten(reply, rows=rows[0]) if node == 2 else reply],
    )
    ctx.roster._sessions = lambda: since
    ctx.roster.refresh()
    assert ctx.roster.refused() == {2: "shard-empty"}
    rows[0] = 7
    ctx.roster.refresh()
    assert ctx.roster.refused() == {2: "shard-empty"}
    since[2] = "ten"
    ctx.roster.refresh()
    assert {name: member.rows for name, member in ctx.roster.members().items()} == {"bank": 10, "clinic": 7}


def test_a_member_that_reconnected_is_judged_anew(tmp_path):
    """Catches: the old number of rows believed of a site that was restarted between two looks."""
    rows, since = [10], {1: "nine"}
    ctx = toy_context(tmp_path, toy_app(["bank"]), 1, fault=lambda node, reply: [rewritten(reply, rows=rows[0])])
    ctx.roster._sessions = lambda: since
    ctx.roster.refresh()
    rows[0], since[1] = 0, "ten"
    ctx.roster.refresh()
    assert (ctx.roster.members(), ctx.roster.refused()) == ({}, {1: "shard-empty"})


@pytest.mark.parametrize("silent", [False, True])
def test_a_node_that_is_no_member_is_greeted_at_growing_intervals(tmp_path, monkeypatch, silent):
    """Catches: a refused site that is asked in each round, or never again; intervals that grow without end."""
    clock = Clock().rule(monkeypatch)
    greeted_at = []

    def takes(site, kind, number):
        if site == "c":
            greeted_at.append(clock.now)
        return None if silent and site == "c" else 0.0

    config = toy_config(tmp_path, strategy={"connect_timeout_s": 60.0})
    ctx = slow_context(tmp_path, ["a", "b", "c"], clock, takes, config, fault=forging_hello(3, rows=0))
    while clock.now < 13_000:
        ctx.roster.refresh()
        clock.sleep(5.0)
    waited = [after - before for before, after in itertools.pairwise(greeted_at)]
    expected = [60, 120, 240, 480, 960, 1920] if silent else [30, 60, 120, 240, 480, 960, 1920]
    assert waited == [pytest.approx(seconds, abs=25.0) for seconds in [*expected, 3600, 3600][: len(waited)]]
    assert len(waited) > len(expected)


@pytest.mark.parametrize("leaves", [False, True], ids=["same-session", "seen-away"])
def test_a_site_that_reconnects_each_round_and_is_silent_costs_little(tmp_path, monkeypatch, leaves):
    """Catches: its hello waited for in every round, because each reconnection ends its growing interval."""
    clock = Clock().rule(monkeypatch)
    away, since = [()], {1: "0", 2: "0", 3: "0"}
    ctx = slow_context(
        tmp_path,
        ["a", "b", "c"],
        clock,
        lambda site, kind, number: None if site == "c" else 0.0,
        away=lambda now: away[0],
    )
    ctx.roster._sessions = lambda: since
    ctx.roster.refresh()
    asked = []
    for number in range(40):
        if leaves:
            away[0] = "c"
            ctx.roster.refresh()
            away[0] = ()
        since[3] = str(number + 1)
        ctx.grid.asked.clear()
        ctx.roster.refresh()
        asked.append(bool(ctx.grid.asked))
        clock.sleep(10.0)
    assert asked[0]
    assert 1 < sum(asked) <= 5


def test_a_silent_site_that_was_restarted_is_greeted_at_once(tmp_path, monkeypatch):
    """Catches: a site that crashed at its hello, and waits for its interval after it was mended."""
    clock = Clock().rule(monkeypatch)
    dead, since = ["c"], {1: "0", 2: "0", 3: "0"}
    ctx = slow_context(tmp_path, ["a", "b", "c"], clock, lambda site, kind, number: None if site in dead else 0.0)
    ctx.roster._sessions = lambda: since
    ctx.roster.refresh()
    dead.clear()
    ctx.roster.refresh()
    assert list(ctx.roster.members()) == ["a", "b"]
    since[3] = "1"
    ctx.roster.refresh()
    assert list(ctx.roster.members()) == ["a", "b", "c"]


def test_a_refused_site_that_was_mended_joins(tmp_path, monkeypatch):
    """Catches: the old code kept after a hello that passes."""
    clock = Clock().rule(monkeypatch)
    rows = [0]

    def fault(node, reply):
        return [rewritten(reply, rows=rows[0]) if node == 3 else reply]

    ctx = slow_context(tmp_path, ["a", "b", "c"], clock, lambda *request: 0.0, fault=fault)
    assert ctx.roster.refused() == {3: "shard-empty"}
    rows[0] = 4
    clock.sleep(31.0)
    ctx.roster.refresh()
    assert list(ctx.roster.members()) == ["a", "b", "c"]
    assert ctx.roster.refused() == {}
