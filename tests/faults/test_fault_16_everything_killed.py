"""Fault 16, deployed: server, ServerApp and SuperLink killed at once; the resumed run ends with the same bytes."""

import time

import pytest

from tests.support.serving import serve_and_join, started, summary, superlinks, tiny_run
from tsugiki.client.app import simulated_app
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e


def test_everything_killed_and_resumed_ends_with_the_same_bytes(tmp_path, model):
    """Catches: a checkpoint that is not whole; a SuperLink that outlives its server; a port that stays taken."""
    long = {"learning_rate": 1e-2, "local_steps": 40, "per_device_train_batch_size": 4, "threads": 1}
    rounds = {"rounds": 4, "output_dir": str(tmp_path / "runs")}
    here = simulate(tiny_run(tmp_path, model, run={"name": "here", **rounds}, train=long), simulated_app)
    config = tiny_run(tmp_path, model, run={"name": "there", **rounds}, train=long)
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, ["--insecure", "--no-export"], ["--insecure"])
        server.wait_for("round 2, loss", 120)
        port = server.wait_for(r"sites connect to 127\.0\.0\.1:(\d+)", 5)[1]
        server.process.kill()
        server.process.wait()
        ends = time.monotonic() + 10
        while superlinks([server.process.pid]) and time.monotonic() < ends:
            time.sleep(0.1)
        assert not superlinks([server.process.pid])
        arguments = ["serve", "--resume", tmp_path / "runs" / "there", "--listen", f"127.0.0.1:{port}", "--insecure"]
        second = start(tmp_path / "server", "again", *arguments, "--no-export")
        assert second.wait(150) == 0, second.text()[-3000:]
        assert all("connected again" in client.text() or "anew" in client.text() for client in clients)
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
