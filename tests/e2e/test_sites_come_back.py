"""Sites that were refused or cut off in the course of a run, and come back."""

import os
import signal
import time

import pytest

from tests.support.serving import make_identity, serve_and_join, started, tiny_run, write_run
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify

pytestmark = pytest.mark.e2e


def test_a_frozen_site_does_not_end_the_run(tmp_path, model):
    """Catches: a run that ends because one of the sites that it needs stood still for a minute."""
    config = tiny_run(
        tmp_path, model, run={"rounds": 4, "output_dir": str(tmp_path / "runs")}, train={"local_steps": 100}
    )
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, insecure, insecure[:1])
        server.wait_for("round 1, loss", 120)
        os.killpg(clients[1].process.pid, signal.SIGSTOP)
        time.sleep(45)  # the server has taken it for gone after 20 s
        os.killpg(clients[1].process.pid, signal.SIGCONT)
        assert server.wait(120) == 0, server.text()
    events = verify(tmp_path / "runs" / "run" / "audit.jsonl")
    assert [event["accepted"] for event in events if event["event"] == "round"] == [["site-0", "site-1"]] * 4


def test_sites_whose_server_was_away_join_the_next_run(tmp_path, model):
    """Catches: sites that come back up to two minutes after the server, by gRPC's own pauses, or have left for good."""
    config = tiny_run(tmp_path, model, run={"output_dir": str(tmp_path / "runs")})
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        first, clients = serve_and_join(start, tmp_path, config, insecure, [*insecure[:1], "--retry", "10"])
        assert first.wait(120) == 0, first.text()
        time.sleep(45)  # gRPC would try again after 70 s
        # no longer than an operator would look at it
        sections = {"run": {"name": "next", "output_dir": str(tmp_path / "runs")}}
        sections["strategy"] = {"connect_timeout_s": 15.0}
        again = write_run(tmp_path / "next.toml", tiny_run(tmp_path, model, **sections))
        second = start(tmp_path / "server", "again", "serve", again, "--listen", first.listen, *insecure)
        assert second.wait(120) == 0, second.text() + clients[0].text()
        assert [client.process.poll() for client in clients] == [None, None], clients[0].text()
        # and away again: nothing but a stop ends the wait
        clients[0].wait_for("connected again(?s:.*)until this client is stopped", 30)
        for client in clients:
            client.process.terminate()
        assert [client.wait(10) for client in clients] == [0, 0], clients[0].text()


def test_a_client_that_was_killed_is_started_again_at_once(tmp_path, model):
    """Catches: a client that ends with `key-refused`, because the server takes the one before it for online."""
    config = tiny_run(tmp_path, model, sites=3, strategy={"connect_timeout_s": 300.0})
    names = ["site-0", "site-1", "site-2"]
    files = split(config, tmp_path / "sites")
    with started() as start:
        tls, keys = make_identity(start, tmp_path, names)
        extra = ["--tls", tls, "--keys", keys, "--no-export"]
        of_site = ["--ca", str(tls / "ca.crt"), "--key", str(keys.parent / "{name}.key")]
        server, clients = serve_and_join(start, tmp_path, config, extra, of_site, files[:2])
        clients[1].wait_for("connected to", 60)
        server.wait_for("2 of 3 nodes", 60)
        clients[1].process.kill()
        clients[1].process.wait(10)
        for file, name in zip(files[1:], names[1:], strict=True):
            arguments = ["client", "--server", server.listen, "--site", file]
            arguments += [part.format(name=name) for part in of_site]
            clients.append(start(tmp_path / "clients", f"{name}-again", *arguments))
        clients[2].wait_for("in use by another process: trying again", 60)
        clients[2].wait_for("connected to", 60)
        assert server.wait(300) == 0, server.text() + clients[2].text()


def test_a_refused_site_that_is_mended_and_restarted_with_its_key_joins(tmp_path, model):
    """Catches: a node that is judged by its id alone, and never greeted again after a refusal."""
    config = tiny_run(
        tmp_path,
        model,
        sites=3,
        run={"rounds": 200, "output_dir": str(tmp_path / "runs")},
        strategy={"min_clients": 2},
    )
    names = ["site-0", "site-1", "site-2"]
    files = split(config, tmp_path / "sites")
    rows = files[2].parent / "train.jsonl"
    right = rows.read_bytes()
    rows.write_bytes(b'{"text": "\xff", "label": "1"}\n')
    with started() as start:
        tls, keys = make_identity(start, tmp_path, names)
        extra = ["--tls", tls, "--keys", keys, "--no-export"]
        of_site = ["--ca", str(tls / "ca.crt"), "--key", str(keys.parent / "{name}.key")]
        server, clients = serve_and_join(start, tmp_path, config, extra, of_site, files)
        clients[2].wait_for("shard-encoding", 60)
        server.wait_for("round 1, loss", 120)
        clients[2].process.terminate()
        clients[2].wait(30)
        rows.write_bytes(right)
        arguments = ["client", "--server", server.listen, "--site", files[2]]
        arguments += [part.format(name="site-2") for part in of_site]
        start(tmp_path / "clients", "again", *arguments)
        server.wait_for("round [0-9]+, loss [0-9.]+, 3 sites", 30)
    events = verify(tmp_path / "runs" / "run" / "audit.jsonl")
    told = [event["event"] for event in events if "site-2" in (event.get("key"), event.get("site"))]
    assert told[0] == "refused"
    assert "hello" in told


def test_a_refused_site_that_is_mended_comes_back_without_a_restart(tmp_path, model):
    """Catches: a client that has to be started again, or waits for the server to ask, after its data were mended."""
    config = tiny_run(tmp_path, model, strategy={"connect_timeout_s": 300.0})
    files = split(config, tmp_path / "sites")
    rows = files[1].parent / "train.jsonl"
    right = rows.read_bytes()
    rows.write_bytes(b'{"text": "\xff", "label": "1"}\n')
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, insecure, insecure[:1], files)
        clients[1].wait_for("hello: shard-encoding", 120)
        audit, ends = tmp_path / "runs" / "run" / "audit.jsonl", time.monotonic() + 120
        while '"refused"' not in audit.read_text():  # the server now leaves the site alone for 30 s
            assert time.monotonic() < ends, server.text()
            time.sleep(0.1)
        rows.write_bytes(right)
        clients[1].wait_for("the data has changed since the last hello(?s:.*)hello: done", 120)
        assert server.wait(120) == 0, server.text() + clients[1].text()
    events = verify(tmp_path / "runs" / "run" / "audit.jsonl")
    assert [event["accepted"] for event in events if event["event"] == "round"] == [["site-0", "site-1"]] * 2
