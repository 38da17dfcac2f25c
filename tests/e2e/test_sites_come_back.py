"""Sites that were refused or cut off in the course of a run, and come back."""

import os
import signal

import pytest

from tests.support.serving import make_identity, serve_and_join, started, tiny_run
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
        server.wait_for("waiting for others, for 3600 s at most", 120)
        os.killpg(clients[1].process.pid, signal.SIGCONT)
        assert server.wait(120) == 0, server.text()
    events = verify(tmp_path / "runs" / "run" / "audit.jsonl")
    assert [event["accepted"] for event in events if event["event"] == "round"] == [["site-0", "site-1"]] * 4
    assert [event["connected"] for event in events if event["event"] == "waiting-for-quorum"] == [["site-0"]]


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
