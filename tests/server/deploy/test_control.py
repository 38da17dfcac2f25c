"""Runs and keys on a real SuperLink."""

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest

from tests.support.connect_proxy import connect_proxy
from tsugiki.client.node.connection import Connection
from tsugiki.client.node.link import Link
from tsugiki.common.config.files import run_config_defaults
from tsugiki.common.errors import DeployError
from tsugiki.common.keys import new_key_pair, read_private_key
from tsugiki.server.deploy import bundle, control
from tsugiki.server.deploy.certs import make_certificates
from tsugiki.server.deploy.control import Control, executed
from tsugiki.server.deploy.keyring import register, restore, revoke
from tsugiki.server.deploy.superlink_process import Endpoint, free_port, superlink
from tsugiki.server.engines.superlink import SuperlinkGrid

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The certificates of this module's SuperLink."""
    return make_certificates(tmp_path_factory.mktemp("tls"), [])


@pytest.fixture(scope="module")
def child(tmp_path_factory, files):
    """A SuperLink with TLS, for this module."""
    with superlink(f"127.0.0.1:{free_port()}", files, tmp_path_factory.mktemp("superlink")) as running:
        yield running


@pytest.fixture
def operator(child, tmp_path):
    """Its control; the nodes of the test before are gone."""
    one = Control(child.endpoint)
    one.synchronise(tmp_path / "no-keys")
    yield one
    one.close()


def status_of(operator, run_id):
    """Return what The SuperLink says of a run."""
    return operator._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize("tls", [True, False])
def test_what_is_on_this_machine_is_asked_without_a_proxy(files, monkeypatch, variable, tls):
    """Catches: a run that is posted to the company's proxy, in the clear without TLS."""
    with connect_proxy(403) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        endpoint = Endpoint(f"127.0.0.1:{free_port()}", files.ca.read_bytes() if tls else None)
        operator = Control(endpoint)
        with pytest.raises(DeployError, match="does not answer"):
            operator.submit(b"bundle", {})
        with pytest.raises(DeployError, match="does not answer"), executed(endpoint, 1):
            pass
        operator.close()
    assert proxy.targets == []
    assert proxy.others == []


def test_a_run_is_submitted_executed_and_over(operator, child):
    """Catches: a run that the SuperLink believes to be going on for ever; settings that the bundle does not have."""
    run_id = operator.submit(bundle.build(), run_config_defaults())
    with executed(child.endpoint, run_id) as grid:
        assert isinstance(grid, SuperlinkGrid)
        assert list(grid.get_node_ids()) == []
        assert grid.run.run_id == run_id
        assert status_of(operator, run_id).status == "running"
    over = status_of(operator, run_id)
    assert (over.status, over.sub_status) == ("finished", "completed")


def test_a_run_that_fails_is_reported_with_its_code_only(operator, child):
    """Catches: an exception's text, which may hold paths or data, kept by the SuperLink."""
    run_id = operator.submit(bundle.build(), {})
    with pytest.raises(ValueError, match="secret"), executed(child.endpoint, run_id):
        raise ValueError("secret text")
    over = status_of(operator, run_id)
    assert (over.sub_status, over.details) == ("failed", "ValueError")


def test_a_run_that_is_taken_is_not_taken_again(operator, child, monkeypatch):
    """Catches: two processes that run the same federation; a wait without end."""
    monkeypatch.setattr(control, "CLAIM_TIMEOUT_S", 0.5)
    run_id = operator.submit(bundle.build(), {})
    with executed(child.endpoint, run_id), pytest.raises(DeployError) as caught, executed(child.endpoint, run_id):
        pass
    assert caught.value.code == "run-taken"


def test_a_superlink_that_goes_away_is_an_error_of_ours(operator, child):
    """Catches: httpx's traceback."""
    run_id = operator.submit(bundle.build(), {})
    with pytest.raises(DeployError) as caught, executed(child.endpoint, run_id):
        raise httpx.ConnectError("refused")
    assert caught.value.code == "superlink-gone"
    assert "--resume" in str(caught.value)


def test_the_keyring_is_what_the_superlink_knows(operator, tmp_path):
    """Catches: a revoked key that still gets in; one that was replaced; a name without its node."""
    keys = tmp_path / "keys"
    public = {name: new_key_pair(tmp_path / name) for name in ("acme", "bolt")}
    for path in public.values():
        register(keys, path)
    assert sorted(operator.synchronise(keys)) == ["acme registered", "bolt registered"]
    assert operator.synchronise(keys) == []
    assert sorted(operator.node_names().values()) == ["acme", "bolt"]
    revoke(keys, "bolt")
    assert operator.synchronise(keys) == ["bolt revoked"]
    restore(keys, "bolt")  # the SuperLink that runs still refuses it, under its own name, too
    register(keys, public["bolt"])
    assert [done.partition(";")[0] for done in operator.synchronise(keys)] == ["key bolt: not taken"]
    revoke(keys, "bolt")
    revoke(keys, "acme")
    register(keys, new_key_pair(tmp_path / "acme-2"), "acme")
    assert operator.synchronise(keys) == ["acme revoked", "acme registered"]
    assert list(operator.node_names().values()) == ["acme"]
    known = operator._client.ListNodes(ListNodesRequest()).nodes_info
    here = set(operator.node_names())
    assert here <= {node.node_id for node in known if node.status != "unregistered"}


def test_a_bad_key_keeps_nobody_else_out(operator, tmp_path):
    """Catches: a run that stops because somebody put a text, or a revoked key, into the keyring."""
    keys = tmp_path / "keys"
    old = new_key_pair(tmp_path / "old")
    register(keys, old)
    operator.synchronise(keys)
    revoke(keys, "old")
    operator.synchronise(keys)
    restore(keys, "old")  # the SuperLink that runs still refuses it
    register(keys, old, "again")
    register(keys, new_key_pair(tmp_path / "new"))
    (keys / "text.pub").write_text("hello")
    done = operator.synchronise(keys)
    assert "new registered" in done
    assert sorted(one.split(":")[0] for one in done if one.startswith("key ")) == ["key again", "key text"]
    assert list(operator.node_names().values()) == ["new"]


def test_a_revoked_key_is_not_taken_from_the_folder(operator, tmp_path):
    """Catches: a revoked key that the next server accepts, because somebody copied its file back."""
    keys = tmp_path / "keys"
    public = new_key_pair(tmp_path / "acme")
    register(keys, public)
    revoke(keys, "acme")
    (keys / "acme.pub").write_bytes(public.read_bytes())
    (said,) = operator.synchronise(keys)
    assert said.startswith("key acme: not taken; it was revoked on 20")
    assert operator.node_names() == {}
    restore(keys, "acme")
    assert operator.synchronise(keys) == ["acme registered"]


def test_a_node_that_connects_anew_has_another_session(operator, child, files, tmp_path):
    """Catches: a reconnection with the same key, and so the same id, that nobody can see."""
    key = tmp_path / "bank"
    register(tmp_path / "keys", new_key_pair(key))
    operator.synchronise(tmp_path / "keys")
    (node,) = operator.node_names()
    link = Link(child.listen, files.ca.read_bytes(), read_private_key(key), 5.0)
    seen = []
    for _ in range(2):
        connection = Connection(link, lambda: False, seen.append)
        connection.connect()
        seen.append(operator.sessions()[node])
        assert operator.sessions()[node] == seen[-1]
        connection.close()
    assert seen[0] != seen[1]


def test_what_the_superlink_refuses_is_an_error_of_ours(operator):
    """Catches: a run id of nothing, and a wait for a run that never starts."""
    with pytest.raises(DeployError, match="The SuperLink says"):
        operator.submit(b"no bundle", {})
