"""The deployed grid against a SuperLink that keeps messages and objects in dictionaries."""

import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from tsugiki.common.errors import WireError
from tsugiki.common.wire.flower import identify_process, set_message_id
from tsugiki.common.wire.messages import SITE_ERROR
from tsugiki.server.engines import superlink as module
from tsugiki.server.engines.grid import NODE_UNAVAILABLE, StockGrid, Stop, exchange
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.engines.superlink import SPARE_BYTES, SuperlinkGrid, run_grid


class Superlink:
    """Announces a reply as soon as a site offers it, whether or not its objects have come."""

    def __init__(self):
        self.messages, self.objects, self.replies, self.confirmed, self.looks, self.pulled = {}, {}, {}, [], 0, []
        self.nodes = [11, 12]

    def __call__(self, request):
        """Answer one HTTP request."""
        name = request.url.path.rsplit("/", 1)[1].replace("-", "_")
        answer = getattr(self, name)(request.read()).SerializeToString()
        return httpx.Response(200, stream=httpx.ByteStream(answer))

    def push_messages(self, body):
        """Take the server's messages."""
        request = PushAppMessagesRequest.FromString(body)
        ids = [tree.object_id for tree in request.message_object_trees]
        self.messages.update(zip(ids, request.messages_list, strict=True))
        wanted = [one.object_id for tree in request.message_object_trees for one in iterate_object_tree(tree)]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=wanted, session_id="session")

    def push_object(self, body):
        """Take an object."""
        request = PushObjectRequest.FromString(body)
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def pull_messages(self, body):
        """Announce replies, once each."""
        self.looks += 1
        asked = PullAppMessagesRequest.FromString(body).message_ids
        found = [self.replies.pop(one) for one in asked if one in self.replies]
        return PullAppMessagesResponse(
            messages_list=[envelope for envelope, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def get_nodes(self, body):
        """Tell who is there."""
        return GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.nodes])

    def pull_object(self, body):
        """Give an object, if it has come; a known object that has not is None."""
        object_id = PullObjectRequest.FromString(body).object_id
        self.pulled.append(object_id)
        content = self.objects.get(object_id)
        return PullObjectResponse(
            object_found=object_id in self.objects, object_available=content is not None, object_content=content or b""
        )

    def confirm_message_received(self, body):
        """Note it."""
        self.confirmed.append(ConfirmMessageReceivedRequest.FromString(body).message_object_id)
        return ConfirmMessageReceivedResponse()

    def offer(self, message_id, reply, upload=True, sender=0):
        """Let a site, or the SuperLink itself as node 1, offer a reply; return its objects, there or still to come."""
        set_message_id(reply, reply.object_id)
        envelope = message_to_proto(remove_content_from_message(reply))
        envelope.metadata.reply_to_message_id = message_id
        envelope.metadata.src_node_id = sender or envelope.metadata.src_node_id
        contents = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
        self.objects |= contents if upload else dict.fromkeys(contents)
        self.replies[message_id] = (envelope, get_object_tree(reply))
        return contents


@pytest.fixture
def superlink():
    """A SuperLink without sites."""
    return Superlink()


@pytest.fixture
def grid(superlink):
    """Our grid on it, made from Flower's."""
    identify_process()
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="t")  # noqa: S106  (nothing checks it)
    grid.set_run(Run.create_empty(7))
    client = RuntimeHttpClient("http://superlink")
    client._client = httpx.Client(transport=httpx.MockTransport(superlink))
    grid._client = client
    return SuperlinkGrid.adopt(grid)


def ask(grid, *nodes):
    """Send each node a message; return (messages, ids)."""
    messages = [Message(RecordDict({"request": ConfigRecord({"n": node})}), node, "train") for node in nodes]
    return messages, grid.push_messages(messages)


def answer(message, size=10, **extra):
    """Return a site's reply with an array."""
    array = ArrayRecord({"update": Array(np.ones(size, np.float32))})
    return Message(RecordDict({"reply": ConfigRecord({"ok": 1} | extra), "arrays": array}), reply_to=message)


def pull(grid, ids, timeout_s=5.0):
    """Return the replies that come within the time, by node."""
    pending, found, ends = set(ids), {}, time.monotonic() + timeout_s
    while pending and time.monotonic() < ends:
        for reply in grid.pull_messages(pending):
            pending.discard(reply.metadata.reply_to_message_id)
            found[reply.metadata.src_node_id] = reply
    return found


def test_a_reply_comes_as_it_was_sent(grid, superlink):
    """Catches: another array, a reply that is never confirmed and stays in the SuperLink's memory."""
    messages, ids = ask(grid, 11)
    superlink.offer(ids[0], answer(messages[0]))
    reply = pull(grid, ids)[11]
    assert reply.content["arrays"]["update"].numpy().tolist() == [1.0] * 10
    assert len(superlink.confirmed) == 1
    assert reply.metadata.reply_to_message_id == ids[0]


def test_an_upload_that_hangs_holds_nobody_up(grid, superlink):
    """Catches: Flower's own grid, which waits for the objects of one reply before it looks at the next."""
    messages, ids = ask(grid, 11, 12)
    superlink.offer(ids[0], answer(messages[0]), upload=False)
    superlink.offer(ids[1], answer(messages[1]))
    started = time.monotonic()
    replies = list(exchange(Resent(grid, ids), messages, 1.0, Stop()))
    assert [reply.metadata.src_node_id for reply in replies] == [12]
    assert 0.9 < time.monotonic() - started < 2.5


class Resent:
    """A grid whose messages have been sent."""

    sequential = False

    def __init__(self, grid, ids):
        self.push_messages, self.pull_messages = lambda messages: ids, grid.pull_messages


def test_an_upload_of_a_node_that_left_is_waited_for(grid, superlink, monkeypatch):
    """Catches: an upload that is thrown away because its line was dead for some time in the middle of it."""
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.04)
    monkeypatch.setattr(module, "RETURN_S", 0.3)
    messages, ids = ask(grid, 11)
    contents = superlink.offer(ids[0], answer(messages[0]), upload=False)
    superlink.nodes = []
    assert pull(grid, ids, 0.8) == {}
    superlink.nodes = [11]
    superlink.objects |= contents
    assert pull(grid, ids)[11].has_content()


def test_an_upload_of_a_node_that_was_started_anew_is_asked_for_again(grid, superlink, monkeypatch):
    """Catches: a round that waits to its end for an upload whose process was killed; a node that stayed."""
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.04)
    monkeypatch.setattr(module, "RETURN_S", 0.6)
    messages, ids = ask(grid, 11, 12)
    for message, message_id in zip(messages, ids, strict=True):
        superlink.offer(message_id, answer(message), upload=False)
    superlink.nodes = [12]
    assert pull(grid, ids, 0.4) == {}
    superlink.nodes = [11, 12]
    begun = time.monotonic()
    found = pull(grid, ids, 1.5)
    assert list(found) == [11]
    assert found[11].error.code == NODE_UNAVAILABLE  # with it `exchange` asks again
    assert time.monotonic() - begun >= 0.6


def test_a_kept_reply_outlives_the_looks_for_others(grid, superlink):
    """Catches: a late update that is thrown away because the sites were asked to evaluate in between."""
    messages, ids = ask(grid, 11, 12)
    grid.keep_replies({ids[0]})
    contents = superlink.offer(ids[0], answer(messages[0]), upload=False)
    assert pull(grid, ids, 0.1) == {}
    superlink.objects |= contents
    superlink.offer(ids[1], answer(messages[1]))
    assert list(pull(grid, ids[1:])) == [12]
    assert list(pull(grid, ids[:1])) == [11]


def test_a_slow_upload_is_waited_for(grid, superlink):
    """Catches: a reply given up because it was announced before it was there; objects pulled twice."""
    messages, ids = ask(grid, 11)
    contents = superlink.offer(ids[0], answer(messages[0]), upload=False)
    first = dict(list(contents.items())[:2])
    superlink.objects |= first
    assert grid.pull_messages(ids) == []
    assert pull(grid, ids, 0.3) == {}
    superlink.objects |= contents
    assert list(pull(grid, ids)) == [11]
    assert [superlink.pulled.count(one) for one in first] == [1, 1]
    assert superlink.looks == 1  # it is announced once, and then only its objects are asked for


@pytest.mark.parametrize("nodes", [1, 3])
def test_what_cannot_be_read_costs_its_site_only(grid, superlink, nodes):
    """Catches: one malformed upload, at which Flower raises whatever comes, that ends the round for everyone."""
    messages, ids = ask(grid, *range(11, 11 + nodes))
    for message, message_id in zip(messages, ids, strict=True):
        contents = superlink.offer(message_id, answer(message, node=message.metadata.dst_node_id))
        if message is messages[0]:
            superlink.objects |= dict.fromkeys(contents, b"ConfigRecord  3\x00{{{")
    found = pull(grid, ids)
    assert found.pop(11).error == Error(SITE_ERROR, "decode")
    assert sorted(found) == list(range(12, 11 + nodes))
    assert all(reply.has_content() for reply in found.values())


def test_more_objects_than_an_adapter_has_are_not_pulled(grid, superlink):
    """Catches: a reply of a million objects, pulled one by one."""
    messages, ids = ask(grid, 11)
    superlink.offer(ids[0], answer(messages[0]))
    envelope, tree = superlink.replies[ids[0]]
    children = [ObjectTree(object_id=f"{number:064x}") for number in range(100_000)]
    superlink.replies[ids[0]] = envelope, ObjectTree(object_id=tree.object_id, children=children)
    assert pull(grid, ids)[11].error == Error(SITE_ERROR, "size")
    assert superlink.pulled == []


def test_more_bytes_than_an_adapter_has_are_not_accepted(grid, superlink):
    """Catches: no limit; a limit that refuses a whole adapter."""
    floats = 1_000_000
    messages, ids = ask(grid, 11, 12)
    for message, message_id in zip(messages, ids, strict=True):
        superlink.offer(message_id, answer(message, floats, node=message.metadata.dst_node_id))
    grid.limit_replies(4 * floats)
    assert pull(grid, ids[:1])[11].has_content()
    grid.limit_replies(4 * floats // 2)
    assert 4 * floats > 1.05 * 2 * floats + SPARE_BYTES
    ask_again, again = ask(grid, 12)
    superlink.offer(again[0], answer(ask_again[0], floats))
    assert pull(grid, again)[12].error == Error(SITE_ERROR, "size")


def test_the_sender_is_who_was_asked(grid, superlink):
    """Catches: metadata inside an upload that name another site, or another message, and are believed."""
    messages, ids = ask(grid, 11, 12)
    forged = answer(messages[1])  # as if node 12 had answered its own message
    superlink.offer(ids[0], forged)
    reply = grid.pull_messages(ids) or pull(grid, ids, 0.5).values()
    (reply,) = reply
    assert reply.metadata.src_node_id == 11
    assert reply.metadata.reply_to_message_id == ids[0]


def test_an_error_of_the_superlink_is_the_asked_nodes(grid, superlink):
    """Catches: a node that is gone, reported by node 1, that nobody can tell from a straggler."""
    messages, ids = ask(grid, 11)
    superlink.offer(ids[0], Message(Error(5, "Node unavailable"), reply_to=messages[0]), sender=1)
    reply = pull(grid, ids)[11]
    assert reply.error.code == 5


@pytest.mark.parametrize("code", [3, 4, 5])
def test_a_site_cannot_say_that_it_is_gone(grid, superlink, code):
    """Catches: a site that has itself asked again and again, by an error that is the SuperLink's to make."""
    messages, ids = ask(grid, 11)
    superlink.offer(ids[0], Message(Error(code, "Node unavailable"), reply_to=messages[0]))
    assert pull(grid, ids)[11].error == Error(SITE_ERROR, "unexpected-reply")


def test_a_reply_nobody_waits_for_is_forgotten(grid, superlink):
    """Catches: transfers of past rounds that go on for ever, and late replies that turn up in the next round."""
    messages, ids = ask(grid, 11)
    contents = superlink.offer(ids[0], answer(messages[0]), upload=False)
    grid.pull_messages(ids)
    later, later_ids = ask(grid, 11)
    superlink.objects |= contents
    time.sleep(0.1)  # now it would be due
    assert grid.pull_messages(later_ids) == []
    superlink.offer(later_ids[0], answer(later[0], late=1))
    ends, came = time.monotonic() + 1.0, []
    while time.monotonic() < ends:
        came += grid.pull_messages(later_ids)
    assert [reply.content["reply"]["late"] for reply in came] == [1]


def test_a_body_is_not_read_past_the_limit(grid):
    """Catches: a body that is read to its end before it is measured."""
    taken = []

    def chunks():
        for number in range(1000):
            taken.append(number)
            yield b"x" * 100_000

    grid._client._client = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(200, content=chunks()))
    )
    with pytest.raises(WireError) as caught:
        grid._pull_object("a" * 64, 1_000_000)
    assert caught.value.code == "size"
    assert len(taken) < 20


def test_a_message_that_the_superlink_did_not_take_is_not_awaited(grid, superlink, monkeypatch):
    """Catches: Flower's None among the ids, looked for until the deadline."""
    monkeypatch.setattr(HttpGrid, "push_messages", lambda self, messages: ["a", None])
    nodes = [SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node)) for node in (11, 12)]
    assert grid.push_messages(nodes) == ["a"]


def test_the_grid_of_a_superlink_is_bounded_and_any_other_is_taken_as_it_is():
    """Catches: a Flower app whose sites can flood it; a simulation by Flower's own command that finds no grid."""
    bounded = run_grid(HttpGrid("127.0.0.1:1", insecure=True, token="t"))  # noqa: S106  (nothing checks it)
    assert isinstance(bounded, SuperlinkGrid)
    bounded.close()
    stock = run_grid(InProcessGrid(ClientApp(), 2))
    assert isinstance(stock, StockGrid)
    assert list(stock.get_node_ids()) == [1, 2]
