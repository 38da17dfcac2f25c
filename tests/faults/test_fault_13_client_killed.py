"""Fault 13: a client killed in the middle of a run is a dropout, not asked again until it is back, and can rejoin."""

import pytest

from tests.support.serving import metrics, serve_and_join, started, tiny_run
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify

pytestmark = pytest.mark.e2e


def test_a_client_that_dies_is_a_dropout_and_comes_back(tmp_path, model):
    """Catches: a round that waits for the dead; a dead node that is sampled again; a site that cannot rejoin."""
    config = tiny_run(
        tmp_path,
        model,
        strategy={"name": "fedavg", "min_clients": 1, "round_timeout_s": 60.0, "connect_timeout_s": 60.0},
        run={"name": "run", "rounds": 4, "output_dir": str(tmp_path / "runs")},
        train={"learning_rate": 1e-2, "local_steps": 200, "per_device_train_batch_size": 4, "threads": 1},
    )
    with started() as start:
        sites = split(config, tmp_path / "sites")
        server, clients = serve_and_join(start, tmp_path, config, ["--insecure", "--no-export"], ["--insecure"], sites)
        clients[0].wait_for("round 1: training: done", 120)
        clients[1].wait_for("hello: done", 60)
        clients[1].process.kill()
        port = server.wait_for(r"sites connect to 127\.0\.0\.1:(\d+)", 5)[1]
        again = start(
            tmp_path / "clients", "again", "client", "--server", f"127.0.0.1:{port}", "--site", sites[1], "--insecure"
        )
        assert server.wait(240) == 0, server.text()[-3000:]
        assert "connected to" in again.text()
    folder = tmp_path / "runs" / "run"
    lines = metrics(config)
    assert 1 <= sum(line.get("dropouts", 0) for line in lines) <= 2
    assert lines[-1]["round"] == 4
    assert set(lines[-1]["accepted"]) == {"site-0", "site-1"}
    assert max(line["seconds"].get("wait", 0.0) for line in lines) < 55  # not until the round's deadline
    greeted = [event["site"] for event in verify(folder / "audit.jsonl") if event["event"] == "hello"]
    assert greeted.count("site-1") == 2
    assert greeted.count("site-0") == 1
