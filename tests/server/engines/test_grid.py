import math
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from tsugiki.common.errors import Interrupted
from tsugiki.common.wire.flower import identify_process
from tsugiki.server.engines import grid as module
from tsugiki.server.engines.grid import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MOST_REPEATS,
    NODE_UNAVAILABLE,
    RETURN_S,
    StockGrid,
    Stop,
    _Away,
    exchange,
    wait_for_nodes,
)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def monotonic(self):
        """Return the time."""
        return self.now

    def sleep(self, pause):
        """Let time pass."""
        self.pauses.append(pause)
        self.now += pause


@pytest.fixture
def clock(monkeypatch):
    """Time under control."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def reply(to, node=0, left=False):
    """Return what `exchange` reads of a reply."""
    metadata = SimpleNamespace(reply_to_message_id=to, src_node_id=node)
    return SimpleNamespace(metadata=metadata, has_error=lambda: left, error=SimpleNamespace(code=5))


class Scripted:
    """A grid that answers message n at a given time."""

    sequential = False

    def __init__(self, clock, arrivals, nodes=()):
        self.clock, self.arrivals, self.nodes, self.pulled = clock, dict(arrivals), list(nodes), []

    def push_messages(self, messages):
        """Name the messages by themselves."""
        return list(messages)

    def pull_messages(self, ids):
        """Return what has arrived."""
        self.pulled.append(set(ids))
        there = [one for one, at in self.arrivals.items() if at <= self.clock.now]
        for one in there:
            del self.arrivals[one]
        return [reply(one) for one in there]

    def get_node_ids(self):
        """Return the nodes that are connected by now."""
        return [node for node, at in self.nodes if at <= self.clock.now]


def ids(replies):
    """Return which messages were answered."""
    return [one.metadata.reply_to_message_id for one in replies]


def test_replies_come_as_they_arrive(clock):
    """Catches: a wait for the last before the first is handed on."""
    grid = Scripted(clock, {"a": 3.0, "b": 1.0})
    stream = exchange(grid, ["a", "b"], 100.0, Stop())
    assert ids([next(stream)]) == ["b"]
    assert 1.0 <= clock.now < 3.0
    assert ids(stream) == ["a"]
    assert grid.pulled[-1] == {"a"}


def test_the_deadline_holds(clock):
    """Catches: a wait without end for a site that is gone, and a last pause that goes past the deadline."""
    grid = Scripted(clock, {"a": 1.0})
    assert ids(exchange(grid, ["a", "b"], 10.0, Stop())) == ["a"]
    assert clock.now == pytest.approx(10.0)


def test_looks_are_frequent_first_and_seldom_later(clock):
    """Catches: a constant pause: either a slow first round or a busy wait; the pause starts anew after a reply."""
    list(exchange(Scripted(clock, {"a": 50.0, "b": 60.0}), ["a", "b"], 100.0, Stop()))
    assert clock.pauses[0] == FIRST_PAUSE_S
    assert max(clock.pauses) == LONGEST_PAUSE_S
    assert clock.pauses.count(FIRST_PAUSE_S) == 2


def test_a_stock_grid_answers_as_flowers_does(clock):
    """Catches: a simulation on Ray whose nodes each have the whole deadline, one after the other."""
    flowers = Scripted(clock, {"a": 3.0, "b": 1.0}, [(7, 0.0)])
    grid = StockGrid(flowers)
    grid.limit_replies(1)
    assert list(grid.get_node_ids()) == [7]
    assert ids(exchange(grid, ["a", "b", "c"], 10.0, Stop())) == ["b", "a"]
    assert clock.now == pytest.approx(10.0)


def test_a_sequential_grid_has_the_time_for_each_message(clock):
    """Catches: simulated sites that run out of time because others answer before them."""
    grid = Scripted(clock, {"a": 0.0})
    grid.sequential = True
    stream = exchange(grid, ["a", "b"], 10.0, Stop())
    assert ids([next(stream)]) == ["a"]
    clock.now = 15.0
    grid.arrivals["b"] = 15.0
    assert ids(stream) == ["b"]


def test_flowers_numbers_are_those_that_we_know():
    """Catches: a Flower whose errors have other numbers: nodes that left would be taken for sites that refuse."""
    from flwr.common.constant import ErrorCode

    from tsugiki.common.wire.messages import SITE_ERROR
    from tsugiki.server.engines.superlink import REPLY_UNAVAILABLE, UNAVAILABLE
    from tsugiki.server.run.replies import GONE

    assert NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    assert REPLY_UNAVAILABLE == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    gone = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
    assert gone == UNAVAILABLE
    assert tuple(f"flower-error-{number}" for number in gone) == GONE
    assert SITE_ERROR not in [number for number in vars(ErrorCode).values() if isinstance(number, int)]


class Leaving(Scripted):
    """Node 7 leaves at once and is back at a given time; then it answers."""

    def __init__(self, clock, back_at, lost=("1",)):
        super().__init__(clock, {}, [(7, back_at)])
        self.sent, self.lost = [], lost

    def push_messages(self, messages):
        """Number them."""
        self.sent += messages
        return [str(len(self.sent))] * len(messages)

    def pull_messages(self, ids):
        """Say that the node left, for the messages that are lost, and answer the others."""
        return [reply(one, 7, left=one in self.lost) for one in ids]


def train_message():
    """Return a message to node 7."""
    identify_process()
    return Message(RecordDict({"request": ConfigRecord({"n": 1})}), 7, "train", ttl=60.0, group_id="3")


def test_a_node_that_comes_back_is_asked_again(clock):
    """Catches: a site that is missed because its connection broke; another message than the first one."""
    grid = Leaving(clock, RETURN_S / 2)
    (answer,) = exchange(grid, [train_message()], 100.0, Stop())
    assert answer.metadata.reply_to_message_id == "2"
    assert not answer.has_error()
    first, second = grid.sent
    assert second.content == first.content
    for name in ("dst_node_id", "message_type", "ttl", "group_id"):
        assert getattr(second.metadata, name) == getattr(first.metadata, name)
    assert clock.now == pytest.approx(RETURN_S / 2, abs=2 * LONGEST_PAUSE_S)


def test_a_node_may_be_away_for_as_long_as_its_round_is_open(clock):
    """Catches: a finished update that is thrown away because the line was dead for more than 35 seconds."""
    (answer,) = exchange(Leaving(clock, 1800.0), [train_message()], 3600.0, Stop(), return_s=lambda: math.inf)
    assert not answer.has_error()
    assert clock.now == pytest.approx(1800.0, abs=2 * LONGEST_PAUSE_S)


def test_a_node_that_leaves_twice_is_asked_a_third_time(clock):
    """Catches: a site that is missed after a dead line: the server gives it up, and it leaves on purpose."""
    grid = Leaving(clock, 0.0, lost=("1", "2"))
    (answer,) = exchange(grid, [train_message()], 100.0, Stop())
    assert answer.metadata.reply_to_message_id == "3"
    assert not answer.has_error()


def test_a_node_that_always_leaves_is_not_asked_for_ever(clock):
    """Catches: a site that is killed by its message and fed it until the deadline."""
    grid = Leaving(clock, 0.0, lost=tuple(map(str, range(1, 100))))
    (answer,) = exchange(grid, [train_message()], 100.0, Stop())
    assert answer.has_error()
    assert len(grid.sent) == 1 + MOST_REPEATS
    assert clock.now < 1.0


@pytest.mark.parametrize(
    ("timeout_s", "return_s", "until"), [(100.0, RETURN_S, RETURN_S), (3.0, RETURN_S, 3.0), (100.0, math.inf, 100.0)]
)
def test_a_node_that_stays_away_is_given_up(clock, timeout_s, return_s, until):
    """Catches: a wait for the dead that lasts too long; an error that is swallowed at the deadline; one before it."""
    (answer,) = exchange(Leaving(clock, 1e6), [train_message()], timeout_s, Stop(), return_s=lambda: return_s)
    assert answer.has_error()
    assert clock.now == pytest.approx(until, abs=2 * LONGEST_PAUSE_S)


def test_nobody_away_costs_nothing(clock):
    """Catches: a walk through all messages at each poll, which grows with the square of the number of sites."""

    class Walked(list):
        def __iter__(self):
            raise AssertionError("all messages were walked through")

    away = _Away(Scripted(clock, []), Walked())
    assert not away.note(reply("1"))
    assert away.ask_again() == set()
    assert away.note(reply("1", node=7, left=True))
    assert away.ask_again() == set()  # node 7 has not come back


def test_nothing_sent_is_nothing_awaited(clock):
    """Catches: a pause where nobody was asked."""
    assert list(exchange(Scripted(clock, {}), [], 100.0, Stop())) == []
    assert clock.pauses == []


def test_a_stop_ends_the_exchange(clock):
    """Catches: a Ctrl-C that waits for the deadline."""
    stop = Stop()
    stream = exchange(Scripted(clock, {"a": 0.0, "b": 90.0}), ["a", "b"], 100.0, stop)
    assert ids([next(stream)]) == ["a"]
    stop.request()
    with pytest.raises(Interrupted) as caught:
        next(stream)
    assert "--resume" in str(caught.value)
    assert clock.now < 1.0


def test_waiting_ends_when_enough_are_there(clock):
    """Catches: a wait for the time to be up, and a count that is told at every look."""
    told = []
    grid = Scripted(clock, {}, [(7, 0.0), (3, 2.0), (5, 4.0), (1, 90.0)])
    assert wait_for_nodes(grid, 3, 100.0, Stop(), told.append) == [3, 5, 7]
    assert told == [1, 2, 3]
    assert clock.now < 5.0


def test_waiting_ends_when_the_time_is_up(clock):
    """Catches: an endless wait."""
    assert wait_for_nodes(Scripted(clock, {}, [(7, 0.0)]), 2, 3.0, Stop(), lambda count: None) == [7]
    assert 3.0 <= clock.now <= 3.0 + LONGEST_PAUSE_S


def test_a_stop_ends_the_waiting(clock):
    """Catches: a Ctrl-C that waits for sites."""
    stop = Stop()
    stop.request()
    with pytest.raises(Interrupted):
        wait_for_nodes(Scripted(clock, {}), 1, 1e6, stop, lambda count: None)
