"""Fault 22: a slow line, a connection cut in mid-upload, a line dead for 20 s; and sites that stop half way."""

import os
import signal
import time

import pytest

from tests.support.proxy import Proxy, proxied
from tests.support.serving import CANARY, Place, metrics, serve_and_join, started, summary, tiny_run
from tsugiki.client.app import simulated_app
from tsugiki.server.deploy.superlink_process import free_port
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e

BIG = {"method": "houlsby", "bottleneck": 128}
"""An upload of 130 kB: two seconds at 64 kB/s."""
HALF_BYTES = 60_000


def joined(start, folder, config, line):
    """Start a server and two sites, the second behind the proxy."""
    places = {"site-1": Place(server=f"127.0.0.1:{line.port}")}
    extra = ["--insecure", "--no-export"]
    listen = f"127.0.0.1:{line.target}"
    return serve_and_join(start, folder, config, extra, extra[:1], listen=listen, places=places)


def test_a_bad_line_changes_nothing_but_the_time(tmp_path, model):
    """Catches: an upload lost or counted twice when it is repeated, a client that gives up, private text sent."""
    rounds = {"rounds": 3, "output_dir": str(tmp_path / "runs")}
    here = simulate(tiny_run(tmp_path, model, run={"name": "here", **rounds}, adapter=BIG), simulated_app)
    config = tiny_run(tmp_path, model, run={"name": "there", **rounds}, adapter=BIG)
    with started() as start, proxied(free_port(), delay_s=0.1, bytes_per_s=64_000.0, listening=True) as line:
        server, clients = joined(start, tmp_path, config, line)
        clients[1].wait_for("round 1: training: done", 120)
        line.after(HALF_BYTES, Proxy.hang_up)
        line.wait_until_sprung(60)
        server.wait_for("round 2, loss", 60)
        line.hold()
        time.sleep(20)
        line.release()
        assert server.wait(150) == 0, server.text()[-3000:]
        assert "connected again" in clients[1].text()
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
    lines = metrics(config)
    assert [line["dropouts"] for line in lines] == [0] * 3
    assert max(line["seconds"]["wait"] for line in lines) > 15  # the dead line was in a round
    assert line.passed["up"] > 3 * HALF_BYTES
    for heard in line.heard.values():
        assert b"PullMessages" in bytes(line.heard["up"])  # it is in the clear: what is not there was not sent
        assert CANARY.encode() not in heard
        assert b"clause number" not in heard


def test_sites_that_stop_half_way_hold_nobody_up(tmp_path, model):
    """Faults 12 and 22: an upload stops in its middle, and the machine of another site stops in training.

    Catches: a round that lasts longer than its deadline; other sites' replies that wait behind the stuck one; a late
    update in a later round; a site that is lost for being slow once.
    """
    config = tiny_run(
        tmp_path,
        model,
        sites=3,
        run={"rounds": 6, "output_dir": str(tmp_path / "runs")},
        adapter=BIG,
        train={"local_steps": 60},
        strategy={"min_clients": 1, "round_timeout_s": 6.0},
    )
    with started() as start, proxied(free_port()) as line:
        server, clients = joined(start, tmp_path, config, line)
        clients[2].wait_for("round 1: training: done", 120)
        os.killpg(clients[2].process.pid, signal.SIGSTOP)
        line.after(HALF_BYTES, Proxy.hold)
        line.wait_until_sprung(60)
        server.wait_for(r"without .*site-1 \((slow|gone)\)", 30)
        server.wait_for(r"without .*site-2 \((slow|gone)\)", 30)
        line.release()
        os.killpg(clients[2].process.pid, signal.SIGCONT)
        assert server.wait(120) == 0, server.text()[-3000:]
    lines = metrics(config)
    late = [site for line in lines for site in line["rejected"]]
    assert {reason["reason"] for line in lines for reason in line["rejected"].values()} <= {"slow", "gone"}
    assert late.count("site-1") in (1, 2)
    assert late.count("site-2") in (1, 2)
    assert all("site-0" in line["accepted"] for line in lines)
    assert set(lines[-1]["accepted"]) == {"site-0", "site-1", "site-2"}
    assert max(line["seconds"]["wait"] for line in lines) < 10
