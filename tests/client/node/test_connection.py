"""The link to a Fleet API over real gRPC on loopback."""

import json
import socket
import threading
import time

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto import fleet_pb2
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from tests.support.connect_proxy import connect_proxy
from tests.support.fleet import Fleet, listening
from tsugiki.client.node import channel
from tsugiki.client.node import connection as module
from tsugiki.client.node.channel import RunOver, Stopping
from tsugiki.client.node.connection import Connection
from tsugiki.client.node.link import Link
from tsugiki.common.errors import LinkError
from tsugiki.common.wire.flower import identify_process
from tsugiki.server.deploy.certs import make_certificates


@pytest.fixture
def fleet():
    """A server that takes everybody."""
    return Fleet()


@pytest.fixture
def connect():
    """Makes connections, and closes them."""
    made = []

    def make(port, retry_s=5.0, key=None, authority=None, stopped=lambda: False, notes=None, host="127.0.0.1"):
        link = Link(f"{host}:{port}", authority, key, retry_s)
        made.append(Connection(link, stopped, (notes if notes is not None else []).append))
        return made[-1]

    yield make
    for one in made:
        one.close()


def message(size=10):
    """Return a message with an array, as a server's."""
    identify_process()
    array = ArrayRecord({"x": Array(np.arange(size, dtype=np.float32))})
    return Message(RecordDict({"request": ConfigRecord({"a": 1}), "arrays": array}), 5, "train", group_id="1")


def test_a_message_comes_and_a_reply_goes(fleet, connect):
    """Catches: objects pulled but not confirmed, which stay in the server's memory; another reply than was sent."""
    fleet.offer(message())
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        envelope, tree = link.receive()
        received = link.pull(envelope, tree, 5.0)
        assert received.content["arrays"]["x"].numpy().tolist() == list(range(10))
        reply = Message(RecordDict({"reply": ConfigRecord({"b": 2})}), reply_to=received)
        link.send(reply)
        assert link.receive() is None
    assert "ConfirmMessageReceived" in fleet.calls
    (envelope,) = fleet.replies
    assert envelope.metadata.reply_to_message_id == received.metadata.message_id
    sent = inflate_object_from_contents(envelope.metadata.message_id, dict(fleet.uploaded))
    assert sent.content["reply"]["b"] == 2
    assert link.bytes_up == sum(map(len, fleet.uploaded.values()))
    assert link.bytes_down > 40


def test_a_node_says_goodbye(fleet, connect):
    """Catches: a node that the server asks for minutes after it left."""
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        link.close()
    assert fleet.calls[-2:] == ["DeactivateNode", "UnregisterNode"]


def test_a_node_keeps_saying_that_it_lives(fleet, connect, monkeypatch):
    """Catches: a node that counts as gone while it trains, because only its polling kept it alive."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    with listening(fleet) as port:
        connect(port).connect()
        time.sleep(0.3)
        assert fleet.calls.count("SendNodeHeartbeat") > 2


def test_with_tls_and_a_key(fleet, connect, tmp_path):
    """Catches: another key than the given one; a node that registers itself although it has a key."""
    files, key = make_certificates(tmp_path, []), ec.generate_private_key(ec.SECP384R1())
    fleet.known[public_key_to_bytes(key.public_key())] = 77
    with listening(fleet, files) as port:
        link = connect(port, key=key, authority=files.ca.read_bytes())
        link.connect()
        assert link.node_id == 77
        link.close()
    assert "RegisterNode" not in fleet.calls
    assert "UnregisterNode" not in fleet.calls


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_server_on_this_machine_is_not_looked_for_at_a_proxy(fleet, connect, monkeypatch, variable):
    """Catches: a trial on loopback that sends the site's updates to the company's proxy, in the clear."""
    with listening(fleet) as port, connect_proxy(403) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        connect(port).connect()
    assert proxy.targets == []


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
def test_a_server_behind_a_proxy(fleet, connect, tmp_path, monkeypatch, variable):
    """Catches: capital letters, which gRPC does not read; a certificate checked for the proxy's name."""
    files = make_certificates(tmp_path, ["fed.corp"])
    monkeypatch.delenv("no_proxy", raising=False)
    with listening(fleet, files) as port, connect_proxy(target=port) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        link = connect(9092, authority=files.ca.read_bytes(), host="fed.corp")
        link.connect()
        assert link.node_id
        link.close()
    assert proxy.targets[0] == "fed.corp:9092"


def test_a_proxy_that_cannot_be_used_is_an_error_before_anything_is_sent(connect, monkeypatch):
    """Catches: gRPC, which passes over it and tries without."""
    monkeypatch.setenv("grpc_proxy", "socks5://proxy.corp:1080")
    with pytest.raises(LinkError) as caught:
        connect(9092, host="fed.corp")
    assert caught.value.code == "proxy-invalid"


@pytest.mark.parametrize("status", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"])
def test_what_the_network_does_is_tried_again(fleet, connect, status, monkeypatch):
    """Catches: a node that ends because one call failed; one that does not say that it is connected again."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    notes = []
    with listening(fleet) as port:
        link = connect(port, notes=notes)
        link.connect()
        fleet.fail["PullMessages"] = [(grpc.StatusCode[status], "")] * 3
        assert link.receive() is None
    assert fleet.calls.count("PullMessages") == 4
    assert len(notes) == 2
    assert "trying again" in notes[0]
    assert "connected again" in notes[1]


def test_a_server_that_starts_later_is_waited_for(fleet, connect, monkeypatch):
    """Catches: sites that have to be started after the server."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.05)
    with listening(Fleet()) as port:
        pass
    link = connect(port, retry_s=20.0)
    thread = threading.Thread(target=link.connect)
    thread.start()
    time.sleep(0.3)
    with listening(fleet, port=port):
        thread.join(15)
        assert link.node_id


def test_a_server_that_never_comes_is_given_up(connect):
    """Catches: a wait without end."""
    with listening(Fleet()) as port:
        pass
    started = time.monotonic()
    with pytest.raises(LinkError) as caught:
        connect(port, retry_s=0.6).connect()
    assert caught.value.code == "server-unreachable"
    assert time.monotonic() - started < 5


def test_a_node_that_is_stopped_does_not_wait(connect):
    """Catches: a Ctrl-C that waits for a server that is not there."""
    with listening(Fleet()) as port:
        pass
    with pytest.raises(Stopping):
        connect(port, retry_s=600.0, stopped=lambda: True).connect()


def test_a_server_that_forgot_the_node_gets_it_back(fleet, connect):
    """Catches: a node that has to be restarted after the server was."""
    notes = []
    with listening(fleet) as port:
        link = connect(port, notes=notes)
        link.connect()
        before = link.node_id
        fleet.known.clear()
        assert link.receive() is None
        assert link.node_id != before
    assert "anew" in notes[0]


def test_a_run_that_has_ended_is_no_reason_to_leave(fleet, connect):
    """Catches: an operator's `stop` that ends all sites' nodes."""
    fleet.offer(message())
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        envelope, tree = link.receive()
        fleet.fail["PullObject"] = [(grpc.StatusCode.PERMISSION_DENIED, "")]
        with pytest.raises(RunOver):
            link.pull(envelope, tree, 5.0)
        fleet.objects.clear()
        with pytest.raises(RunOver, match="gone"):
            link.pull(envelope, tree, 5.0)


def test_an_upload_of_the_server_is_waited_for_and_not_for_ever(fleet, connect):
    """Catches: Flower's first pause of a second at each message; a node that hangs on a message nobody completes."""
    contents = fleet.offer(message(), available=False)
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        envelope, tree = link.receive()
        with pytest.raises(RunOver, match="did not finish"):
            link.pull(envelope, tree, 0.1)
        threading.Timer(0.1, fleet.objects.update, [contents]).start()
        started = time.monotonic()
        assert link.pull(envelope, tree, 10.0).has_content()
        assert time.monotonic() - started < 0.9


def test_refusals_name_the_cause(fleet, connect, tmp_path, monkeypatch):
    """Catches: a registered-keys-only server that looks like a network problem, or is asked again and again."""
    fleet.keys_only = True
    monkeypatch.setattr(module, "EARLY_S", 0.6)
    files = make_certificates(tmp_path, [])
    authority, key = files.ca.read_bytes(), ec.generate_private_key(ec.SECP384R1())
    with listening(fleet, files) as port:
        for options, code in (({}, "key-required"), ({"key": key}, "key-refused")):
            with pytest.raises(LinkError) as caught:
                connect(port, authority=authority, **options).connect()
            assert caught.value.code == code
        fleet.fail["ActivateNode"] = [(grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp")]
        with pytest.raises(LinkError) as caught:
            connect(port, key=key, authority=authority).connect()
        assert caught.value.code == "clock-skew"
    assert fleet.calls.count("RegisterNode") == 1


CLOCK = (grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp")


def test_a_clock_that_was_set_makes_no_accepted_node_leave(fleet, connect, monkeypatch):
    """Catches: all sites of a run that leave for good, because the server's clock was set back by 30 s."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    notes = []
    with listening(fleet) as port:
        link = connect(port, notes=notes)
        link.connect()
        fleet.fail["PullMessages"] = [CLOCK] * 3
        assert link.receive() is None
    assert fleet.calls.count("PullMessages") == 4
    assert fleet.calls.count("DeactivateNode") == 0  # no message was lost
    assert len(notes) == 2
    assert "the clocks of this machine and the server differ" in notes[0]
    assert "trying again until this client is stopped (clock-skew; " in notes[0]
    assert "NTP" in notes[0]
    assert "connected again" in notes[1]


def test_a_key_that_was_removed_comes_back(fleet, connect, monkeypatch):
    """Catches: a site that leaves for good, because its key was missing at the server for a moment."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    notes = []
    with listening(fleet) as port:
        link = connect(port, notes=notes)
        link.connect()
        fleet.known.clear()
        no = (grpc.StatusCode.FAILED_PRECONDITION, json.dumps({"code": 2004, "public_message": "no"}))
        fleet.fail["ActivateNode"] = [no] * 3
        assert link.receive() is None
        assert link.receive() is None
    assert any("does not accept this node's key" in note and "key-refused" in note for note in notes)


def test_each_kind_of_failure_is_said_once(fleet, connect, monkeypatch):
    """Catches: a cause that nobody learns of because another came first; a line for each try."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    notes = []
    network = (grpc.StatusCode.UNAVAILABLE, "")
    with listening(fleet) as port:
        link = connect(port, notes=notes)
        link.connect()
        fleet.fail["PullMessages"] = [network, CLOCK, network, CLOCK]
        link.receive()
    assert len(notes) == 3
    assert "cannot be reached" in notes[0]
    assert "clock-skew" in notes[1]
    assert "connected again" in notes[2]


VERSION = (grpc.StatusCode.FAILED_PRECONDITION, json.dumps({"code": 1001, "public_message": "no"}))
PROXY = (grpc.StatusCode.PERMISSION_DENIED, "Received http2 header with status: 403")
LINE = (grpc.StatusCode.UNAVAILABLE, "")


@pytest.mark.parametrize("failure", [CLOCK, VERSION, PROXY, LINE])
def test_a_failure_that_outlasts_the_retry_ends_no_accepted_node(fleet, connect, failure, monkeypatch):
    """Catches: a client that leaves for good ten minutes after the run, so that the next run is without its site."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(channel, "LONGEST_RETRY_S", 0.1)
    monkeypatch.setattr(channel, "LONGEST_REFUSED_RETRY_S", 0.1)
    notes = []
    with listening(fleet) as port:
        link = connect(port, retry_s=0.3, notes=notes)
        link.connect()
        fleet.fail["PullMessages"] = [failure] * 8
        assert link.receive() is None
    assert fleet.calls.count("PullMessages") == 9
    assert "until this client is stopped" in notes[0]
    assert "connected again" in notes[-1]


def test_a_server_that_is_away_for_longer_than_the_retry_is_waited_for(fleet, connect):
    """Catches: sites that have to be started again for each run."""
    with listening(fleet) as port:
        link = connect(port, retry_s=0.3)
        link.connect()
    back = threading.Event()

    def receive():
        link.receive()
        back.set()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    assert not back.wait(2.0)
    assert thread.is_alive()
    with listening(fleet, port=port):
        assert back.wait(20)


def test_a_failure_that_lasts_is_said_again_at_growing_intervals(monkeypatch):
    """Catches: a line for each try in a log of weeks; a site whose log says nothing for weeks."""
    now_s = [0.0]
    monkeypatch.setattr(channel.time, "monotonic", lambda: now_s[0])
    outage = channel._Outage()
    said = []
    for second in range(0, 6 * 3600, 5):
        now_s[0] = float(second)
        if outage.is_due("network"):
            said.append(second)
    assert said == [0, 60, 120, 240, 480, 960, 1920, 3840, 7440, 11040, 14640, 18240]


def test_a_stop_ends_the_wait_for_an_answer(connect):
    """Catches: a Ctrl-C that waits for the deadline of a call to a server that says nothing."""
    asked = threading.Event()
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = connect(silent.getsockname()[1], retry_s=600.0, stopped=asked.is_set)

        def wait():
            with pytest.raises(Stopping):
                link.connect()
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        with silent.accept()[0]:
            asked.set()
            assert ended.wait(8)


def test_a_stop_ends_the_search_for_the_cause(connect, monkeypatch):
    """Catches: a Ctrl-C that waits for DNS."""
    looking = threading.Event()
    over = threading.Event()

    def look(link):
        looking.set()
        over.wait(60)

    monkeypatch.setattr("tsugiki.client.node.diagnosis.why_not", look)
    with listening(Fleet()) as port:
        pass
    ended = threading.Event()
    link = connect(port, retry_s=600.0, stopped=looking.is_set)

    def wait():
        with pytest.raises(Stopping):
            link.connect()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert ended.wait(20)
    over.set()


@pytest.mark.parametrize("method", ["PullObject", "PushMessages"])
def test_a_server_that_was_restarted_forgot_the_run_too(fleet, connect, method):
    """Catches: a node that repeats a call of a run which the new server does not know, and ends of the answer."""
    fleet.offer(message())
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        envelope, tree = link.receive()
        received = link.pull(envelope, tree, 5.0) if method == "PushMessages" else None
        fleet.fail[method] = [(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")]
        before = fleet.calls.count(method)
        reply = received and Message(RecordDict({"reply": ConfigRecord({"b": 2})}), reply_to=received)
        with pytest.raises(RunOver, match="restarted"):
            link.send(reply) if reply else link.pull(envelope, tree, 5.0)
        assert fleet.calls.count(method) == before + 1
        assert link.receive() is None  # and the node goes on


def test_a_reply_that_the_server_does_not_want_is_told(fleet, connect, monkeypatch):
    """Catches: "done, 0 B sent" for an update that was dropped."""
    fleet.offer(message())
    monkeypatch.setattr(Fleet, "PushMessages", lambda self, request, context: fleet_pb2.PushMessagesResponse())
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        received = link.pull(*link.receive(), 5.0)
        with pytest.raises(RunOver, match="does not take this reply"):
            link.send(Message(RecordDict({"reply": ConfigRecord({"b": 2})}), reply_to=received))


def test_a_malformed_message_is_dropped(fleet, connect):
    """Catches: a node that ends of what a server sent."""
    contents = fleet.offer(message())
    fleet.objects |= dict.fromkeys(contents, b"ConfigRecord  3\x00{{{")
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        with pytest.raises(RunOver, match="decode"):
            link.pull(*link.receive(), 5.0)


def test_a_message_that_may_be_lost_is_asked_for_again(fleet, connect, monkeypatch):
    """Catches: a round that waits for its deadline because the answer that held its message was lost on the way."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(module, "AWAY_S", 0.02)
    monkeypatch.setattr(module, "HEARTBEAT_S", 600.0)  # else one could come in between
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        assert link.receive() is None
        assert "DeactivateNode" not in fleet.calls
        fleet.fail["PullMessages"] = [(grpc.StatusCode.UNAVAILABLE, "")]
        fleet.fail["DeactivateNode"] = [(grpc.StatusCode.UNAVAILABLE, "")]
        fleet.calls.clear()
        assert link.receive() is None
        assert fleet.calls == ["PullMessages", "PullMessages", "DeactivateNode"]
        fleet.calls.clear()
        assert link.receive() is None
        assert fleet.calls == ["PullMessages", "DeactivateNode", "SendNodeHeartbeat"]
        fleet.calls.clear()
        assert link.receive() is None
        assert fleet.calls == ["PullMessages"]


def test_a_server_that_forgets_the_node_while_it_is_away_gets_it_back(fleet, connect, monkeypatch):
    """Catches: a client that ends because the server was restarted in these two seconds."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(module, "AWAY_S", 0.02)
    monkeypatch.setattr(module, "HEARTBEAT_S", 600.0)
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        before = link.node_id
        fleet.fail["PullMessages"] = [(grpc.StatusCode.UNAVAILABLE, "")]
        fleet.fail["SendNodeHeartbeat"] = [(grpc.StatusCode.UNAUTHENTICATED, "Invalid node ID")]
        assert link.receive() is None
        assert link.node_id != before
        fleet.calls.clear()
        assert link.receive() is None
    assert fleet.calls == ["PullMessages"]


def test_a_message_that_came_after_all_was_not_lost(fleet, connect, monkeypatch):
    """Catches: a node that leaves, and is asked twice, although it has its message."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        fleet.fail["PullMessages"] = [(grpc.StatusCode.UNAVAILABLE, "")]
        fleet.offer(message())
        assert link.receive() is not None
        assert link.receive() is None
    assert "DeactivateNode" not in fleet.calls


@pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNAVAILABLE"])
def test_a_connection_that_leads_nowhere_is_opened_anew(fleet, connect, status, monkeypatch):
    """Catches: a node that waits on a dead connection, or for gRPC to try again, up to two minutes."""
    monkeypatch.setattr(channel, "FIRST_RETRY_S", 0.02)
    with listening(fleet) as port:
        link = connect(port)
        link.connect()
        before = link._channel._channel
        fleet.fail["PullMessages"] = [(grpc.StatusCode[status], "")]
        assert link.receive() is None
        assert link._channel._channel is not before


@pytest.mark.parametrize("adapter_bytes", [4096, 0])
def test_a_server_sends_no_more_than_a_message_of_the_run(fleet, connect, adapter_bytes, monkeypatch):
    """Catches: gigabytes that a site takes from a server before it looks at their size."""
    monkeypatch.setattr(module, "UNKNOWN_BYTES", 18 * 2**20)
    fleet.offer(message(size=10 * 2**20))  # 40 MiB
    fleet.offer(message())
    with listening(fleet) as port:
        link = connect(port)
        link._adapter_bytes = lambda: adapter_bytes
        link.connect()
        with pytest.raises(RunOver, match="size"):
            link.pull(*link.receive(), 30.0)
        assert link.bytes_down < 24 * 2**20
        received = link.pull(*link.receive(), 5.0)
    assert received.content["arrays"]["x"].numpy().tolist() == list(range(10))


def test_an_adapter_as_large_as_the_runs_is_pulled(fleet, connect):
    """Catches: a bound that leaves out the envelope, or chunks; a bound for runs of small adapters only."""
    size = 10 * 2**20
    fleet.offer(message(size=size))
    with listening(fleet) as port:
        link = connect(port)
        link._adapter_bytes = lambda: 4 * size
        link.connect()
        assert len(link.pull(*link.receive(), 30.0).content["arrays"]["x"].numpy()) == size


def test_a_message_of_many_objects_is_refused_before_it_is_pulled(fleet, connect, monkeypatch):
    """Catches: a call for each of a million tiny objects, none of which is too large."""
    monkeypatch.setattr(module, "SPARE_OBJECTS", 1)
    fleet.offer(message())
    with listening(fleet) as port:
        link = connect(port)
        link._adapter_bytes = lambda: 10
        link.connect()
        envelope, tree = link.receive()
        for number in range(10):
            tree.children.add().object_id = f"{number:064x}"
        with pytest.raises(RunOver, match="size"):
            link.pull(envelope, tree, 5.0)
    assert "PullObject" not in fleet.calls


def test_a_key_that_was_accepted_and_is_refused_later_is_tried_until_it_is_back(fleet, connect, monkeypatch):
    """Catches: a client that leaves for good because a key was missing at the server for longer than the retry."""
    monkeypatch.setattr(module, "EARLY_S", 0.2)
    key = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(key.public_key())
    fleet.known[public] = 77
    notes = []
    with listening(fleet) as port:
        link = connect(port, retry_s=0.5, key=key, notes=notes)
        link.connect()
        fleet.known.clear()
        back = threading.Timer(1.5, fleet.known.__setitem__, (public, 78))
        back.start()
        assert link.receive() is None
        assert link.node_id == 78
    assert [note for note in notes if "trying again until this client is stopped (key-refused; " in note]


def test_no_heartbeat_comes_before_a_node_that_was_forgotten_is_activated(fleet, connect, monkeypatch):
    """Catches: a heartbeat that brings a node online again, so that it can never be activated and leaves for good."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    key = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(key.public_key())
    fleet.known[public] = 77
    with listening(fleet) as port:
        link = connect(port, retry_s=5.0, key=key)
        link.connect()
        fleet.known.clear()
        back = threading.Timer(0.7, fleet.known.__setitem__, (public, 77))
        back.start()
        assert link.receive() is None
        back.join()
        tries = [place for place, call in enumerate(fleet.calls) if call == "ActivateNode"]
        assert len(tries) >= 3
        # the first one was that of `connect`
        assert "SendNodeHeartbeat" not in fleet.calls[tries[1] : tries[-1]]
