"""Fault 22: a slow line, a connection cut in mid-upload, a line dead for 20 s; and uploads that never end."""

import time

import pytest

from client.app import simulated_app
from server.simulate import simulate
from tests.support.proxy import Proxy, proxied
from tests.support.serving import CANARY, metrics, serve_and_join, started, summary, tiny_run
from tests.support.tiny import tiny_bert

pytestmark = pytest.mark.e2e

BIG = {"method": "houlsby", "bottleneck": 128}
"""An upload of 130 kB: two seconds at 64 kB/s."""
HALF_BYTES = 60_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model's folder."""
    return str(tiny_bert(tmp_path_factory.mktemp("model")))


def test_a_bad_line_changes_nothing_but_the_time(tmp_path, model):
    """Catches: an upload lost or counted twice when it is repeated, a client that gives up, private text sent."""
    rounds = {"rounds": 4, "output_dir": str(tmp_path / "runs")}
    here = simulate(tiny_run(tmp_path, model, run={"name": "here", **rounds}, adapter=BIG), simulated_app)
    config = tiny_run(tmp_path, model, run={"name": "there", **rounds}, adapter=BIG)
    with started() as start, proxied(0, delay_s=0.1, bytes_per_s=64_000.0, listening=True) as line:
        insecure = ["--insecure", "--no-export"]
        server, clients = serve_and_join(start, tmp_path, config, insecure, insecure[:1], proxies={"site-1": line})
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
    assert [line["dropouts"] for line in lines] == [0] * 4
    assert max(line["seconds"]["wait"] for line in lines) > 15  # the dead line was in a round
    assert line.passed["up"] > 4 * HALF_BYTES
    for heard in line.heard.values():
        assert b"PullMessages" in bytes(line.heard["up"])  # it is in the clear: what is not there was not sent
        assert CANARY.encode() not in heard
        assert b"clause number" not in heard


def test_an_upload_that_stops_half_way_holds_nobody_up(tmp_path, model):
    """Catches: a round that lasts longer than its deadline; other sites' replies that wait behind the stuck one."""
    config = tiny_run(
        tmp_path,
        model,
        run={"rounds": 6, "output_dir": str(tmp_path / "runs")},
        adapter=BIG,
        strategy={"min_clients": 1, "round_timeout_s": 6.0},
    )
    with started() as start, proxied(0) as line:
        insecure = ["--insecure", "--no-export"]
        server, clients = serve_and_join(start, tmp_path, config, insecure, insecure[:1], proxies={"site-1": line})
        clients[1].wait_for("connected to", 120)
        line.after(HALF_BYTES, Proxy.hold)
        line.wait_until_sprung(60)
        server.wait_for(r"without site-1 \(dropout\)", 30)
        line.release()
        assert server.wait(120) == 0, server.text()[-3000:]
    lines = metrics(config)
    assert sum(line["dropouts"] for line in lines) in (1, 2)
    assert set(lines[-1]["accepted"]) == {"site-0", "site-1"}
    stuck = [line for line in lines if line["dropouts"]]
    assert all(set(line["accepted"]) == {"site-0"} for line in stuck)
    assert max(line["seconds"]["wait"] for line in lines) < 7.0
