import collections.abc

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from tsugiki.common.wire.flower import identify_process
from tsugiki.server.engines.grid import Stop, exchange
from tsugiki.server.engines.in_process import InProcessGrid


@pytest.fixture
def app():
    """An app that says who it is, counts its messages, and fails where it is told to."""
    identify_process()
    app = ClientApp()

    @app.train()
    def train(message, context):
        from flwr.app import ConfigRecord, MetricRecord

        if message.content.config_records:
            raise ValueError("patient Jane")
        seen = context.state.metric_records.setdefault("seen", MetricRecord({"count": 0}))
        seen["count"] += 1
        content = {"partition": context.node_config["partition-id"], "node": context.node_id, "seen": seen["count"]}
        return Message(RecordDict({"reply": ConfigRecord(content)}), reply_to=message)

    return app


def ask(node, *, content=None):
    """Return a message to a node."""
    return Message(content or RecordDict(), node, "train")


def answers(grid, messages):
    """Return what came back, as plain records."""
    return [dict(reply.content.config_records["reply"]) for reply in exchange(grid, messages, 10.0, Stop())]


def test_every_node_answers_with_its_own_identity(app):
    """Catches: one context for all nodes, partition numbers from 1, node ids from 0."""
    grid = InProcessGrid(app, 3)
    assert grid.get_node_ids() == [1, 2, 3]
    replies = answers(grid, [ask(2), ask(1), ask(3)])
    assert [(reply["node"], reply["partition"]) for reply in replies] == [(2, 1), (1, 0), (3, 2)]


def test_a_nodes_state_is_kept_between_messages(app):
    """Catches: a fresh context for every message."""
    grid = InProcessGrid(app, 2)
    assert [reply["seen"] for reply in answers(grid, [ask(1), ask(1), ask(2)])] == [1, 2, 1]


def test_one_message_is_answered_at_each_look(app):
    """Catches: all sites trained before the first reply is seen: a stop would come too late."""
    grid = InProcessGrid(app, 2)
    sent = grid.push_messages([ask(1), ask(2)])
    assert len(set(sent)) == 2
    assert [len(grid.pull_messages(sent)) for _ in range(3)] == [1, 1, 0]


def test_only_the_asked_for_replies_are_given(app):
    """Catches: another exchange's replies handed over."""
    grid = InProcessGrid(app, 2)
    first, second = grid.push_messages([ask(1), ask(2)])
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages([second])] == [second]
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages([first])] == [first]


def test_an_exception_becomes_a_code(app):
    """Catches: the text of an exception in a reply, and an app of someone else's that ends the simulation."""
    from flwr.app import ConfigRecord

    grid = InProcessGrid(app, 1)
    (reply,) = exchange(grid, [ask(1, content=RecordDict({"fail": ConfigRecord()}))], 10.0, Stop())
    assert (reply.error.code, reply.error.reason) == (1000, "client-error:ValueError")


def test_a_fault_may_lose_repeat_or_replace_replies(app):
    """Catches: a hook that cannot do what a network does."""
    grid = InProcessGrid(app, 3, lambda node, reply: [reply] * (node - 1))
    sent = grid.push_messages([ask(1), ask(2), ask(3)])
    assert [len(grid.pull_messages(sent)) for _ in sent] == [0, 1, 2]


def test_flowers_own_way_of_sending_works_too(app):
    """Catches: a Grid that Flower's strategies cannot use."""
    grid = InProcessGrid(app, 2)
    replies = grid.send_and_receive([ask(2), ask(1)])
    assert [reply.metadata.src_node_id for reply in replies] == [2, 1]
    assert grid.create_message(RecordDict(), 1, "train").metadata.dst_node_id == 1


class Asked(collections.abc.Set):
    """A set of message ids that counts how many were looked up, and cannot be copied."""

    def __init__(self, ids):
        self.ids, self.lookups = set(ids), 0

    def __contains__(self, message_id):
        self.lookups += 1
        return message_id in self.ids

    def __iter__(self):
        raise AssertionError("the set of all messages was walked through")

    def __len__(self):
        return len(self.ids)


def test_a_poll_looks_at_one_message(app):
    """Catches: a queue that is scanned for each reply: the work for a round would grow with the square of its sites."""
    grid = InProcessGrid(app, 3)
    asked = Asked(grid.push_messages([ask(1 + number % 3) for number in range(30)]))
    replies = [reply for _ in range(30) for reply in grid.pull_messages(asked)]
    assert len(replies) == asked.lookups == 30
