"""Fault 17: the SuperLink is killed; the server notices and names the way back, which leads to the same end."""

import os
import signal

import pytest

from tests.support.serving import serve_and_join, started, summary, superlinks, tiny_run
from tsugiki.client.app import simulated_app
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e


def test_a_superlink_that_dies_is_noticed_and_the_run_goes_on_with_another(tmp_path, model):
    """Catches: a server that waits for ever, silent, for a SuperLink that is gone; a resumed run with other bytes."""
    sections = {"train": {"local_steps": 40}}
    rounds = {"rounds": 4, "output_dir": str(tmp_path / "runs")}
    here = simulate(tiny_run(tmp_path, model, run={"name": "here", **rounds}, **sections), simulated_app)
    config = tiny_run(tmp_path, model, run={"name": "there", **rounds}, **sections)
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, ["--insecure", "--no-export"], ["--insecure"])
        server.wait_for("round 2, loss", 120)
        (child,) = superlinks([server.process.pid])
        os.kill(child, signal.SIGKILL)
        assert server.wait(40) == 13
        assert "tsugiki: superlink-gone: The SuperLink ended with status -9" in server.text()
        assert "--resume" in server.text()
        port = server.wait_for(r"sites connect to 127\.0\.0\.1:(\d+)", 5)[1]
        arguments = ["serve", "--resume", tmp_path / "runs" / "there", "--listen", f"127.0.0.1:{port}", "--insecure"]
        second = start(tmp_path / "server", "again", *arguments, "--no-export")
        assert second.wait(120) == 0, second.text()[-3000:]
        assert all(client.process.poll() is None for client in clients)
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
