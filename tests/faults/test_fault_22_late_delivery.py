"""Fault 22: a site whose line is dead for a minute, or whose process is killed, hands in the update that it has."""

import time

import pytest

from tests.support.proxy import Proxy, proxied
from tests.support.serving import Place, make_identity, metrics, serve_and_join, started, summary, tiny_run
from tsugiki.client.app import simulated_app
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify
from tsugiki.server.deploy.superlink_process import free_port
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e

DEAD_S = 45.0
"""Longer than the server takes to miss the heartbeats and, once, to give the site up: 20 s and 15 s."""
BIG = {"method": "houlsby", "bottleneck": 128}
"""An upload of 130 kB."""


def test_a_finished_update_is_handed_in_late_and_no_round_is_trained_twice(tmp_path, model):
    """Catches: a round thrown away for a line that was dead for 45 s; training anew for a process that was killed."""
    rounds = {"rounds": 3, "output_dir": str(tmp_path / "runs")}
    here = simulate(tiny_run(tmp_path, model, run={"name": "here", **rounds}, adapter=BIG), simulated_app)
    config = tiny_run(tmp_path, model, run={"name": "there", **rounds}, adapter=BIG)
    sites = split(config, tmp_path / "sites")
    with started() as start, proxied(free_port()) as line:
        tls, keys = make_identity(start, tmp_path, ["site-0", "site-1"])  # with its key, a new process is the same node
        extra = ["--tls", tls, "--keys", keys, "--no-export"]
        of_site = ["--ca", str(tls / "ca.crt"), "--key", str(keys.parent / "{name}.key")]
        places = {"site-1": Place(server=f"127.0.0.1:{line.port}")}
        server, clients = serve_and_join(
            start, tmp_path, config, extra, of_site, sites, f"127.0.0.1:{line.target}", places
        )
        clients[1].wait_for("round 1: training: done", 120)
        line.after(60_000, Proxy.hold)  # in the middle of the upload of round 2
        line.wait_until_sprung(60)
        time.sleep(DEAD_S)
        line.release()
        clients[1].wait_for("round 2: training: done", 60)
        line.after(60_000, Proxy.hold)  # and of round 3
        line.wait_until_sprung(60)
        clients[1].process.kill()
        clients[1].process.wait()
        kept = list(sites[1].parent.glob(".*.undelivered"))
        line.release()
        arguments = ["client", "--server", f"127.0.0.1:{line.port}", "--site", sites[1]]
        arguments += [part.format(name="site-1") for part in of_site]
        again = start(tmp_path / "clients", "again", *arguments)
        assert server.wait(150) == 0, server.text()[-3000:] + again.text()
    assert len(kept) == 1
    assert "round 3: training: done" in again.text()
    assert list(sites[1].parent.glob(".*.undelivered")) == []
    assert [line["dropouts"] for line in metrics(config)] == [0] * 3
    trained = [event["round"] for event in verify(sites[1].parent / "audit.jsonl") if event["event"] == "trained"]
    assert trained == [1, 2, 3]
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
