"""Fault 17: the SuperLink is killed; the server notices, says so, and names the way back."""

import os
import signal

import pytest

from server.deploy.superlink import free_port
from tests.support.serving import started, superlinks, tiny_run, write_run

pytestmark = pytest.mark.e2e


def test_a_superlink_that_dies_is_noticed(tmp_path, model):
    """Catches: a server that waits for ever, silent, for a SuperLink that is gone (fault 17)."""
    config = tiny_run(tmp_path, model, strategy={"name": "fedavg", "min_clients": 2, "connect_timeout_s": 600.0})
    with started() as start:
        file = write_run(tmp_path / "run.toml", config)
        arguments = ["serve", file, "--listen", f"127.0.0.1:{free_port()}", "--insecure"]
        server = start(tmp_path / "server", "serve", *arguments)
        server.wait_for("0 of 2 nodes", 60)
        (child,) = superlinks([server.process.pid])
        os.kill(child, signal.SIGKILL)
        assert server.wait(40) == 13
        assert "tsugiki: superlink-gone: the SuperLink ended with status -9" in server.text()
        assert "--resume" in server.text()
