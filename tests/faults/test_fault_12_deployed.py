"""Fault 12, deployed: a site's machine stops for a while and answers after the deadline."""

import os
import signal

import pytest

from tests.support.serving import metrics, serve_and_join, started, tiny_run
from tests.support.tiny import tiny_bert

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model's folder."""
    return str(tiny_bert(tmp_path_factory.mktemp("model")))


def test_a_straggler_is_a_dropout_and_takes_part_again(tmp_path, model):
    """Catches: a late update that is averaged into a later round; a site that is lost for being slow once."""
    config = tiny_run(
        tmp_path,
        model,
        run={"rounds": 8, "output_dir": str(tmp_path / "runs")},
        strategy={"min_clients": 1, "round_timeout_s": 4.0},
        train={"local_steps": 150},
    )
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, insecure, insecure[:1])
        clients[1].wait_for("round 1: training: done", 120)
        os.killpg(clients[1].process.pid, signal.SIGSTOP)
        server.wait_for(r"without site-1 \(dropout\)", 60)
        os.killpg(clients[1].process.pid, signal.SIGCONT)
        assert server.wait(120) == 0, server.text()[-3000:]
    lines = metrics(config)
    assert sum(line["dropouts"] for line in lines) in (1, 2)
    assert {reason["reason"] for line in lines for reason in line["rejected"].values()} == {"dropout"}
    assert set(lines[-1]["accepted"]) == {"site-0", "site-1"}
    assert max(line["seconds"]["wait"] for line in lines) < 5.0
