"""Fault 14, deployed: too few sites come, or all of them die. The server waits for so long and no longer."""

import time

import pytest

from tests.support.serving import serve_and_join, started, tiny_run, write_run
from tsugiki.server.deploy.superlink_process import free_port

pytestmark = pytest.mark.e2e


def test_sites_that_never_come_are_waited_for_as_long_as_asked(tmp_path, model):
    """Catches: a server that waits for ever, or with another status than 4; a SuperLink left behind."""
    file = write_run(tmp_path / "run.toml", tiny_run(tmp_path, model))
    arguments = ["serve", file, "--listen", f"127.0.0.1:{free_port()}", "--insecure", "--wait", "3"]
    with started() as start:
        begun = time.monotonic()
        server = start(tmp_path / "server", "serve", *arguments)
        assert server.wait(60) == 4, server.text()
        assert time.monotonic() - begun < 30
        assert "tsugiki: not-enough-sites: 0 of 2" in server.text()


def test_when_all_sites_die_the_run_ends(tmp_path, model):
    """Catches: a zombie server (FL4Health's pull request 280); a model changed by a round that nobody answered."""
    config = tiny_run(
        tmp_path,
        model,
        run={"rounds": 50, "output_dir": str(tmp_path / "runs")},
        strategy={"round_timeout_s": 4.0, "min_clients": 2, "wait_for_quorum_s": 5.0},
        train={"local_steps": 150},
    )
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, insecure, insecure[:1])
        server.wait_for("round 2, loss", 120)
        for client in clients:
            client.process.kill()
        assert server.wait(60) in (3, 4), server.text()
        assert "quorum-not-met" in server.text() or "not-enough-sites" in server.text()
        assert "--resume" in server.text()
    assert (tmp_path / "runs" / "run" / "checkpoint").is_dir()
