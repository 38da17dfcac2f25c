"""Updates that come after their round has closed."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Error
from flwr.app.message import make_message

from tests.support.slow import Clock, rounds_asked, slow_context
from tests.support.toy import SPEC, toy_app, toy_config, toy_state
from tsugiki.common.audit import verify
from tsugiki.common.errors import ConfigError
from tsugiki.common.files import read_lines
from tsugiki.common.wire.messages import HeadSumsRequest, to_record
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.engines.grid import NODE_UNAVAILABLE, Outstanding, _Away
from tsugiki.server.run.collect import address, receive
from tsugiki.server.run.influence import BoundedMean
from tsugiki.server.run.late import MOST_ROUNDS_LATE, Late, discounted
from tsugiki.server.run.loop import run_rounds
from tsugiki.server.run.progress import describe
from tsugiki.server.run.replies import Accepted, Asked

SITES = ["a", "b", "c"]


@pytest.fixture
def clock(monkeypatch):
    """Time under control."""
    return Clock().rule(monkeypatch)


def run(folder, clock, takes, rounds=6, late_updates="next-round", prepare=lambda ctx: None, of_c=float):
    """Run sites a and b, whose update is 1 everywhere, and c with `of_c` of the round; return the context."""
    strategy = {"grace_s": 5.0, "round_timeout_s": 600.0, "late_updates": late_updates, "norm_tolerance": 0.0}
    config = toy_config(folder, run={"rounds": rounds}, evaluation={"at_sites": False}, strategy=strategy)

    def update(site, number, received):
        return np.full(SPEC.size, of_c(number) if site == "c" else 1.0, np.float32)

    def seconds(site, kind, number):
        return 0.0 if kind == "query" else takes(site, number)

    ctx = slow_context(folder, SITES, clock, seconds, config, app=toy_app(SITES, update))
    prepare(ctx)
    run_rounds(ctx, toy_state())
    return ctx


def lines(folder):
    """Return the lines of rounds."""
    return [line for line in read_lines(folder / "metrics.jsonl") if line["round"]]


def late_in_round_1(site, number):
    """Return 40 s for c in round 1, which closes after 15 s, and 10 s for all others."""
    return 40.0 if site == "c" and number == 1 else 10.0


def test_a_late_update_counts_in_the_round_that_is_open(tmp_path, clock):
    """Catches: an update thrown away; one that weighs as if it came in time; another site's request in its place."""
    ctx = run(tmp_path, clock, late_in_round_1)
    found = lines(tmp_path)
    # the rounds close after 15, 25, 35 and 45 s
    assert [sorted(line["accepted"]) for line in found[:5]] == [["a", "b"]] * 3 + [["a", "b", "c"]] * 2
    late = found[3]["accepted"]["c"]
    assert (late["late_by"], late["rows"], late["weight"]) == (3, 10, 5)
    assert "late_by" not in found[4]["accepted"]["c"]
    assert "c late by 3" in describe(found[3])
    assert [line.get("expected") for line in found[:5]] == [None, {"c": 1}, {"c": 1}, {"c": 1}, None]
    assert not any("not_asked" in line for line in found)
    assert "c's update of round 1 is expected" in describe(found[1])
    assert found[3]["update_norm"] == pytest.approx((10 + 10 + 5 * 1.0) / 25 * np.sqrt(SPEC.size))
    assert found[4]["update_norm"] == pytest.approx((10 + 10 + 10 * 5.0) / 30 * np.sqrt(SPEC.size))
    events = [event for event in verify(tmp_path / "audit.jsonl") if event["event"] == "round"]
    assert [event["accepted"] for event in events[3:5]] == [["a", "b", "c"]] * 2
    # while its answer may come it is asked for nothing else, and after it at once
    assert rounds_asked(ctx, "c") == [1, 5, 6]


def test_by_default_it_is_discarded(tmp_path, clock):
    """Catches: a run that depends on who was late although nobody asked for it."""
    ctx = run(tmp_path, clock, late_in_round_1, late_updates="discard")
    assert [sorted(line["accepted"]) for line in lines(tmp_path)[:2]] == [["a", "b"]] * 2
    assert not any("late_by" in one for line in lines(tmp_path) for one in line["accepted"].values())
    assert ctx.late.asked == {}


def test_an_update_that_is_too_late_is_not_waited_for(tmp_path, clock):
    """Catches: a site that is never asked again because it died in training."""
    ctx = run(tmp_path, clock, lambda site, number: None if site == "c" and number == 1 else 10.0, rounds=12)
    assert rounds_asked(ctx, "c")[:2] == [1, 1 + MOST_ROUNDS_LATE + 1]
    assert sorted(lines(tmp_path)[-1]["accepted"]) == SITES


def test_a_late_update_is_judged_like_any_other(tmp_path, clock):
    """Catches: a door for updates that no round would take; a site that is not asked again after a bad one."""
    ctx = run(tmp_path, clock, late_in_round_1, of_c=lambda number: 1000.0 if number == 1 else 1.0)
    found = lines(tmp_path)
    assert found[3]["rejected"]["c"]["reason"] == "norm"
    assert rounds_asked(ctx, "c")[:2] == [1, 5]
    assert sorted(found[4]["accepted"]) == SITES


def test_a_late_update_counts_once(tmp_path, clock):
    """Catches: an update that is handed in twice, and is added to two rounds."""
    ctx = run(tmp_path, clock, late_in_round_1, prepare=send_twice)
    assert [line["accepted"]["c"].get("late_by") for line in lines(tmp_path)[3:5]] == [3, None]
    assert ctx.late.asked == {}


def test_other_messages_are_not_answered_late(tmp_path, clock):
    """Catches: a site that was too slow with its sums for a head, and is not asked to train until it sends them."""
    config = toy_config(tmp_path, strategy={"late_updates": "next-round", "round_timeout_s": 600.0})
    ctx = slow_context(tmp_path, SITES, clock, lambda site, kind, number: None if number == 7 else 0.0, config)
    asked, messages = address(list(ctx.roster.members().values()), 7, "query.head_sums", sums_request, 5.0)
    passed, rejected = receive(ctx, 7, asked, messages, lambda reply, one: None, 5.0)
    assert [one.site for one in rejected] == SITES
    assert (passed, ctx.late.asked, ctx.late.outstanding.ids) == ([], {}, set())


def sums_request(nonce, node):
    """Return the content of a request that no site of this grid answers."""
    return to_record(HeadSumsRequest("{}", 7, SPEC.sha256, nonce))


def send_twice(ctx):
    """Let c hand its late update in twice."""
    pull = ctx.grid.pull_messages
    kept = []

    def watched(ids):
        again = kept[:1]
        del kept[:]
        replies = pull(ids)
        if not again:
            kept.extend(one for one in replies if one.metadata.src_node_id == 3)
        return [*replies, *again]

    ctx.grid.pull_messages = watched


class CutOff:
    """The line of c: dead from the first poll of a run until a given time, with the grid that it belongs to."""

    def __init__(self, ctx, clock, back_at):
        self.grid = ctx.grid
        self.clock = clock
        self.back_at = back_at
        self.request = None
        self.reported = False
        self._push, self._pull, self._nodes = self.grid.push_messages, self.grid.pull_messages, self.grid.get_node_ids
        self.grid.push_messages, self.grid.pull_messages, self.grid.get_node_ids = self.push, self.pull, self.nodes

    def push(self, messages):
        """Take note of the first request to train."""
        messages = list(messages)
        ids = self._push(messages)
        for message, message_id in zip(messages, ids, strict=True):
            if message.metadata.dst_node_id == 3 and self.request is None:
                self.request = message_id
                self.grid._due.pop(message_id)
        return ids

    def pull(self, ids):
        """Say once that c left."""
        replies = self._pull(ids)
        if self.request in ids and not self.reported:
            self.reported = True
            replies.append(left(self.request))
        return replies

    def nodes(self):
        """Return the nodes; c is away."""
        away = self.request is not None and self.clock.now < self.back_at
        return [node for node in self._nodes() if node != 3 or not away]


def test_a_site_that_was_away_is_asked_for_what_it_has(tmp_path, clock):
    """Catches: an update that is lost because its site's line was dead when the round closed."""
    ctx = run(tmp_path, clock, lambda site, number: 10.0, prepare=lambda ctx: CutOff(ctx, clock, 30.0))
    accepted = {line["round"]: line["accepted"]["c"] for line in lines(tmp_path) if "c" in line["accepted"]}
    first = min(accepted)
    assert first > 1
    assert accepted[first]["late_by"] == first - 1
    assert rounds_asked(ctx, "c")[:2] == [1, 1]  # it was asked again for the same round


def left(message_id):
    """Return the SuperLink's word that node 3 left before it answered a message."""
    from flwr.app import Metadata

    about = Metadata(
        run_id=1,
        message_id="x",
        src_node_id=3,
        dst_node_id=1,
        message_type="query",
        group_id="",
        ttl=60.0,
        reply_to_message_id=message_id,
        created_at=0.0,
    )
    return make_message(about, error=Error(NODE_UNAVAILABLE, "left"))


def test_the_discount_holds_for_a_capped_site_too(tmp_path):
    """Catches: a discount of the rows alone, which the cap of a large site takes back."""
    replies = [accepted("a", 100), accepted("b", 100), accepted("c", 1000), accepted("d", 1000, late_by=3)]
    mean = BoundedMean(tmp_path, SPEC.size, 4, toy_config(tmp_path).strategy, ())
    for reply in replies:
        mean.add(reply)
    weights = {reply.site: reply.weight for reply in mean.settle([one.without_update() for one in replies]).accepted}
    assert weights["d"] == weights["c"] // 2
    assert mean.mean.weight == sum(weights.values())


def accepted(site, rows, late_by=0):
    """Return an accepted reply."""
    update = np.ones(SPEC.size, np.float32)
    return Accepted(site, update, rows, 0.5, 1, 0.0, l2_norm(update), 100, late_by=late_by)


def test_a_site_that_fails_late_is_asked_anew(tmp_path, clock):
    """Catches: a site that is waited for through eight rounds, though its update will never come."""

    def fail(ctx):
        pull = ctx.grid.pull_messages

        def watched(ids):
            return [failed(one) if one.metadata.src_node_id == 3 and clock.now > 20 else one for one in pull(ids)]

        ctx.grid.pull_messages = watched

    ctx = run(tmp_path, clock, late_in_round_1, prepare=fail, rounds=5)
    assert rounds_asked(ctx, "c")[:2] == [1, 5]


def test_a_site_with_another_node_is_asked_anew():
    """Catches: a site that was started anew without its key, and is waited for under its old number."""
    late = Late(asked={"c": Asked("c", 3, 1, "x", 10)})
    late.begin_round(2, {"a": 1, "c": 3})
    assert list(late.asked) == ["c"]
    late.begin_round(2, {"a": 1})
    assert list(late.asked) == ["c"]
    late.begin_round(2, {"c": 4})
    assert late.asked == {}


def test_an_answer_to_a_forgotten_request_is_dropped():
    """Catches: the first round's update, judged as the answer to what the site is asked now, and rejected as stale."""
    outstanding = Outstanding()
    away = _Away(None, [SimpleNamespace(metadata=SimpleNamespace(dst_node_id=3))])
    outstanding.add({"old"}, away)
    old = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="old", src_node_id=3), has_error=lambda: False)
    outstanding.forget(3)
    assert outstanding.take([old]) == []
    assert outstanding.ids == set()


def failed(reply):
    """Return an error in the place of a reply."""
    return make_message(reply.metadata, error=Error(1000, "deadline"))


@pytest.mark.parametrize(("rows", "late", "weight"), [(100, 0, 100), (100, 1, 71), (100, 3, 50), (1, 8, 1)])
def test_the_discount_is_the_root_of_the_lateness(rows, late, weight):
    """Catches: another power than -0.5; a weight of nothing."""
    assert discounted(rows, late) == weight


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"privacy": {"mode": "central", "noise_multiplier": 1.0}}, "in a private run"),
        ({"privacy": {"examples": {"noise_multiplier": 1.0}}}, "in a private run"),
        ({"strategy": {"name": "krum"}}, "fedavg"),
        ({"strategy": {"weighting": "equal"}}, "equal"),
    ],
)
def test_what_cannot_be_late_is_refused(tmp_path, sections, why):
    """Catches: an account that a late update would break; a strategy that mixes factors of different adapters."""
    strategy = {"late_updates": "next-round", **sections.get("strategy", {})}
    with pytest.raises(ConfigError, match="late_updates") as caught:
        toy_config(tmp_path, **{**sections, "strategy": strategy})
    assert why in str(caught.value)
