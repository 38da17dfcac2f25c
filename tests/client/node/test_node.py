"""The resident node with a link that is a list, and an app that is a function."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from tsugiki.client.node.channel import MessageGone, RunOver
from tsugiki.client.node.kept_answer import KeptAnswer
from tsugiki.client.node.node import LONGEST_PAUSE_S, PAUSE_GROWTH, SHORTEST_PAUSE_S, Ending, Node
from tsugiki.common.errors import Interrupted, LinkError
from tsugiki.common.wire.flower import identify_process, set_message_id
from tsugiki.common.wire.messages import EndedRequest, error_reply, to_record

ROOT = Path(__file__).resolve().parents[3]


class Link:
    """Has messages; keeps what is sent."""

    node_id = 5
    returns = 0

    def __init__(self, messages=(), before_end=0):
        self.messages, self.sent, self.empty = list(messages), [], before_end
        self.bytes_down = self.bytes_up = 0
        self.ending = None
        self.refusals = []

    def receive(self):
        """Return the next message; after the last, some empty looks, and then the node is told to end."""
        if self.messages:
            return self.messages.pop(0), None
        self.empty -= 1
        if self.empty < 0:
            self.ending.requested = True
        return None

    def come_back(self):
        """Count it."""
        self.returns += 1

    def pull(self, envelope, tree, timeout_s):
        """Return it."""
        if isinstance(envelope, RunOver):
            raise envelope
        self.bytes_down += 100
        return envelope

    def send(self, reply):
        """Keep it, unless it is to be refused."""
        if self.refusals:
            raise self.refusals.pop(0)
        self.bytes_up += 10
        self.sent.append(reply)


class Seen:
    """Keeps what a status is told."""

    def __init__(self):
        self.events = []

    def note(self, text):
        """Keep it."""

    def begins(self, kind, group):
        """Keep it."""
        self.events.append((kind, group))

    def ends(self, kind, group, outcome, seconds, bytes_down, bytes_up):
        """Keep it."""
        self.events.append((kind, group, outcome, bytes_down, bytes_up))


def message(run_id=1, kind="train", group="1", x=1):
    """Return a message as a SuperLink's."""
    identify_process(run_id)
    one = Message(RecordDict({"request": ConfigRecord({"x": x})}), 5, kind, group_id=group)
    set_message_id(one, f"{run_id}-{group}")
    return one


def echo(message, context):
    """Answer with what the context says."""
    seen = {"run": str(context.run_id), "site": context.node_config["site"]}
    return Message(RecordDict({"reply": ConfigRecord(seen)}), reply_to=message)


def work(seconds):
    """Be busy, as training is: many short steps."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(0.001)


def run(link, app=echo, ending=None, kept=None):
    """Run a node to its end; return (what the status saw, the pauses)."""
    link.ending = ending or Ending()
    seen, pauses = Seen(), []
    Node(app, link, {"site": "/s/site.toml"}, seen, link.ending, KeptAnswer(kept)).run(pauses.append)
    return seen.events, pauses


def test_messages_are_answered_in_order():
    """Catches: a context of another run; a reply that is not sent; bytes that are counted twice."""
    link = Link([message(1, group="1"), message(2, group="1"), message(2, group="2")])
    events, _ = run(link)
    assert [reply.content["reply"]["run"] for reply in link.sent] == ["1", "2", "2"]
    assert {reply.content["reply"]["site"] for reply in link.sent} == {"/s/site.toml"}
    assert events[1::2] == [("train", group, "done", 100, 10) for group in ("1", "1", "2")]


def test_a_round_that_is_asked_for_twice_is_trained_once():
    """Catches: a site that trains twice, and draws its noise twice, because its connection broke; old hellos."""
    calls = []

    def app(message, context):
        calls.append(message.metadata.message_type)
        return Message(RecordDict({"reply": ConfigRecord({"n": len(calls)})}), reply_to=message)

    again, other = message(), message()
    other.content["request"]["x"] = 2
    link = Link([message(), again, other, message(2), message(2, "query"), message(2, "query")])
    run(link, app)
    assert [reply.content["reply"]["n"] for reply in link.sent] == [1, 1, 2, 3, 4, 5]
    assert [reply.metadata.reply_to_message_id for reply in link.sent[:2]] == ["1-1", "1-1"]


@pytest.mark.parametrize(("rounds_in", "mine"), [(9, ", 9 of them with this site"), (-1, "")])
def test_the_end_of_a_run_is_shown(rounds_in, mine):
    """Catches: a site's line that says "done", where its operator waits to hear of the run."""
    one = message(kind="query.ended")
    one.content = to_record(EndedRequest("june", "finished", 10, rounds_in))
    events, _ = run(Link([one]))
    assert events[-1][2] == f"run june is over (finished), 10 rounds{mine}"


def counting(calls):
    """Return an app that answers with the number of the call."""

    def app(message, context):
        calls.append(message.metadata.message_type)
        return Message(RecordDict({"reply": ConfigRecord({"n": len(calls)})}), reply_to=message)

    return app


def test_an_answer_that_the_server_did_not_wait_for_is_given_again():
    """Catches: a site that trains a round twice because its line was dead when it wanted to send."""
    calls = []
    link = Link([message(), message()])
    link.refusals = [MessageGone("the server does not take this reply any more")]
    events, _ = run(link, counting(calls))
    assert calls == ["train"]
    assert [reply.content["reply"]["n"] for reply in link.sent] == [1]
    assert [event[2] for event in events[1::2]] == ["not sent: the server does not take this reply any more", "done"]


def test_an_answer_outlives_its_process(tmp_path):
    """Catches: a site that trains anew after it was killed with a finished update; an update that stays on the disk."""
    calls, kept = [], tmp_path / "kept"
    killed = Link([message()])
    killed.refusals = [MessageGone("the line is dead")]
    run(killed, counting(calls), kept=kept)
    assert kept.stat().st_mode & 0o777 == 0o600
    restarted = Link([message(), message(group="2", x=2)])
    restarted_calls = []
    run(restarted, counting(restarted_calls), kept=kept)
    assert (calls, restarted_calls) == (["train"], ["train"])
    assert [reply.content["reply"]["n"] for reply in restarted.sent] == [1, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ends", [RunOver("the run has ended"), None])
def test_an_answer_does_not_outlive_its_round(tmp_path, ends):
    """Catches: an update that stays on the disk when its run has ended, or when another round fails."""
    kept = tmp_path / "kept"
    first = Link([message()])
    first.refusals = [MessageGone("the line is dead")]
    run(first, kept=kept)
    assert kept.exists()
    second = Link([message(group="2", x=2)])
    if ends is None:
        run(second, lambda message, context: error_reply("diverged", message), kept=kept)
    else:
        second.refusals = [ends]
        run(second, kept=kept)
    assert not kept.exists()


def test_runs_at_the_same_time_keep_what_they_remember():
    """Catches: a session of secure aggregation lost, or a round trained twice, because another run asked between."""
    calls = []

    def app(message, context):
        calls.append(message.metadata.run_id)
        context.state[f"call-{len(calls)}"] = ConfigRecord({"n": len(calls)})
        return Message(RecordDict({"reply": ConfigRecord({"kept": len(context.state)})}), reply_to=message)

    def asked(run_id, x):
        one = message(run_id)
        one.content["request"]["x"] = x
        return one

    order = [(1, 1), (2, 1), (1, 1), (1, 2), (3, 1), (4, 1), (1, 3), (5, 1), (1, 4), (2, 1)]
    link = Link([asked(*one) for one in order])
    run(link, app)
    assert calls == [1, 2, 1, 3, 4, 1, 5, 1, 2]  # the repeated one was answered as before
    # Run 2 had been used least lately, and was forgotten when run 5 came; run 1, the first, was not.
    assert [reply.content["reply"]["kept"] for reply in link.sent] == [1, 1, 1, 2, 1, 1, 3, 1, 4, 1]


def test_greetings_push_no_run_out_and_a_run_that_is_over_is_forgotten():
    """Catches: hellos of other runs that cost a live session its secrets; secrets kept of a run that has ended."""
    kept = []

    def app(message, context):
        if message.metadata.message_type == "train":
            context.state[f"round-{len(context.state)}"] = ConfigRecord({"n": 1})
        kept.append((message.metadata.run_id, len(context.state)))
        return Message(RecordDict({"reply": ConfigRecord({"n": len(kept)})}), reply_to=message)

    over = RunOver("the run has ended")
    over.metadata = message(1, "train", "2").metadata
    greetings = [message(run_id, "query", "0") for run_id in range(2, 9)]
    run(Link([message(1, "train", "1"), *greetings, message(1, "query", "0"), over, message(1, "query", "1")]), app)
    assert kept[-2:] == [(1, 1), (1, 0)]


def test_answers_are_forgotten_with_their_runs():
    """Catches: the last reply of every run that a node has ever served, kept because an evaluation came after it."""
    link = Link([message(run, kind, kind) for run in range(1, 10) for kind in ("query", "train", "evaluate")])
    node = Node(echo, link, {"site": "/s/site.toml"}, Seen(), Ending(), KeptAnswer(None))
    link.ending = node._ending
    node.run(lambda pause: None)
    assert set(node._contexts) == {6, 7, 8, 9}
    assert set(node._answers) == {(run, "train") for run in (6, 7, 8, 9)}


def test_looks_are_frequent_after_a_message_and_seldom_when_idle():
    """Catches: a constant pause: either slow rounds, or a server that is asked 50 times a second for days."""
    link = Link(before_end=100)
    late = message()
    look = link.receive
    link.receive = lambda: (late, None) if len(waited) == 60 and not link.sent else look()
    waited = []
    link.ending = Ending()
    Node(echo, link, {"site": "x"}, Seen(), link.ending, KeptAnswer(None)).run(waited.append)
    before, pauses = waited[:60], waited[60:]
    assert before[-1] > 10 * SHORTEST_PAUSE_S
    assert pauses[0] == SHORTEST_PAUSE_S
    assert waited[-1] <= LONGEST_PAUSE_S
    assert max(run(Link(before_end=100))[1]) == LONGEST_PAUSE_S
    assert all(later <= earlier * PAUSE_GROWTH + 1e-9 for earlier, later in itertools.pairwise(pauses))


@pytest.mark.parametrize(
    ("kinds", "stamps", "returns"),
    [
        (["query"], "aaaa", 0),
        (["query"], "abbb", 1),
        (["query"], "abcdee", 1),  # it was being written
        (["query"], "abacaa", 0),  # and put back
        (["train"], "abbb", 0),
        (["query", "train"], "abbb", 0),
        (["train", "query"], "abbbcc", 1),  # the next hello has not come yet
    ],
)
def test_a_site_that_has_changed_since_its_hello_comes_back(monkeypatch, kinds, stamps, returns):
    """Catches: a refused site that is mended, and waits for long to be asked again; one that leaves in mid-round."""
    monkeypatch.setattr("tsugiki.client.node.node.LOOK_S", 0.0)
    monkeypatch.setattr("tsugiki.client.node.node.REST_S", 0.0)
    seen = iter(stamps)
    link = Link([message(kind=kind, group=str(n)) for n, kind in enumerate(kinds)], before_end=8)
    link.ending = Ending()
    node = Node(echo, link, {"site": "x"}, Seen(), link.ending, KeptAnswer(None), lambda: next(seen, stamps[-1]))
    node.run(lambda pause: None)
    assert link.returns == returns


def test_a_site_whose_data_change_all_the_time_rests(monkeypatch):
    """Catches: a site that is away again and again, because rows are added to its file."""
    monkeypatch.setattr("tsugiki.client.node.node.LOOK_S", 0.0)
    monkeypatch.setattr("tsugiki.client.node.node.REST_S", 3600.0)
    seen = iter("abbccddeeff")
    link = Link([message(kind="query")], before_end=2)
    link.ending = Ending()
    node = Node(echo, link, {"site": "x"}, Seen(), link.ending, KeptAnswer(None), lambda: next(seen))
    node.run(lambda pause: None)
    assert link.returns == 1
    link.messages, link.empty, link.ending.requested = [message(kind="query", group="2")], 8, False
    node.run(lambda pause: None)
    assert link.returns == 1


def test_an_app_that_fails_is_a_code_and_the_node_lives_on(caplog):
    """Catches: a node that dies of one bad message; an exception's text, which may hold data, in the reply."""

    def app(message, context):
        if message.metadata.group_id == "1":
            raise ValueError("patient Jane")
        return echo(message, context)

    link = Link([message(group="1"), message(group="2")])
    with caplog.at_level(logging.ERROR):
        events, _ = run(link, app)
    assert link.sent[0].error.reason == "client-error:ValueError"
    assert link.sent[1].has_content()
    assert events[1][2] == "client-error:ValueError"


def test_a_message_of_a_run_that_is_over_is_dropped():
    """Catches: a node that dies, or sends to nobody for ever, because the operator stopped the run."""
    over = RunOver("an object is gone")
    over.metadata = message().metadata
    link = Link([over, message(group="2")])
    events, _ = run(link)
    assert events[1][2] == "not sent: an object is gone"
    assert len(link.sent) == 1


def test_a_lost_server_ends_the_node():
    """Catches: an error that is swallowed, and a node that looks alive."""
    link = Link()
    link.receive = lambda: (_ for _ in ()).throw(LinkError("gone"))
    with pytest.raises(LinkError):
        run(link)


def test_a_signal_lets_the_message_at_work_finish():
    """Catches: a round that is thrown away although it needed a moment only; a node that goes on after it."""

    def app(message, context):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return echo(message, context)

    link, ending = Link([message(), message(group="2")]), Ending()
    with ending.handling_signals():
        run(link, app, ending)
    assert len(link.sent) == 1
    assert len(link.messages) == 1


def test_the_grace_period_ends_what_takes_longer(monkeypatch):
    """Catches: a service manager that has to kill; a site that leaves the server waiting for the deadline."""
    monkeypatch.setattr("tsugiki.client.node.node.GRACE_S", 0.1)

    def app(message, context):
        os.kill(os.getpid(), signal.SIGTERM)
        work(30)

    link, ending, started = Link([message()]), Ending(), time.monotonic()
    with ending.handling_signals():
        run(link, app, ending)
    assert time.monotonic() - started < 5
    assert link.sent[0].error.reason == "site-stopping"


@pytest.mark.parametrize(("upload_s", "sent"), [(0.3, 1), (30.0, 0)])
def test_sending_has_a_grace_period_of_its_own(monkeypatch, upload_s, sent):
    """Catches: a reply cut off by a clock that ran for the work; a stalled upload that nothing ends."""
    monkeypatch.setattr("tsugiki.client.node.node.GRACE_S", 0.5)

    def app(message, context):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)
        return echo(message, context)

    class Slow(Link):
        def send(self, reply):
            work(upload_s)
            super().send(reply)

    link, ending, started = Slow([message()]), Ending(), time.monotonic()
    with ending.handling_signals():
        events, _ = run(link, app, ending)
    assert len(link.sent) == sent
    assert events[1][2] == ("done" if sent else "not sent: stopping")
    assert time.monotonic() - started < 5


def test_the_clock_ends_nothing_but_what_may_be_ended(monkeypatch):
    """Catches: a clock that hits the node between two messages, and ends it with a traceback; an old clock."""
    monkeypatch.setattr("tsugiki.client.node.node.GRACE_S", 0.1)
    ending = Ending()
    with ending.handling_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        work(0.3)  # between two messages
        with ending.interruptible():
            ending._ring()  # of the period before
            work(0.01)
        with ending.interruptible(), pytest.raises(Interrupted):
            work(30)


def test_a_second_signal_ends_at_once():
    """Catches: a node that cannot be stopped while its app swallows every exception."""
    script = """
import os, signal, time
from tsugiki.client.node.node import Ending
ending = Ending()
with ending.handling_signals(), ending.interruptible():
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    except BaseException:
        time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=20, check=False, cwd=ROOT)
    assert done.returncode == 130


def test_signals_are_given_back():
    """Catches: a test process, or a caller, that cannot be interrupted any more."""
    before = signal.getsignal(signal.SIGTERM)
    with Ending().handling_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
