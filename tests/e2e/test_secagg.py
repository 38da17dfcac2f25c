"""Secure aggregation with a real server and five real clients on loopback."""

import json
import os
import signal

import pytest

from tests.support.serving import make_identity, metrics, serve_and_join, started, summary, tiny_run
from tsugiki.client.app import simulated_app
from tsugiki.client.site.split import split
from tsugiki.common.files import read_lines
from tsugiki.common.keys import fingerprint, read_public_key
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.server.deploy.keyring import registered
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e

PRIVACY = {
    "mode": "distributed",
    "secure_aggregation": True,
    "noise_multiplier": 0.5,
    "delta": 1e-3,
    "enrolled_clients": 5,
}


def private_run(folder, model, name, seed=0, **sections):
    """Return a run over five sites, four of which are enough for a sum."""
    privacy = {**PRIVACY, "insecure_noise_seed": seed}
    return tiny_run(folder, model, name, 5, privacy=privacy, strategy={"min_clients": 4}, **sections)


def allowing(sites, policy):
    """Add a policy to each site.toml."""
    for site in sites:
        site.write_text(f"{site.read_text()}\n[policy]\n{policy}\n")
    return sites


def test_the_sum_of_pinned_members_is_that_of_the_in_process_engine(tmp_path, model):
    """Catches: a session lost between two messages of a real node; keys that are signed with none or another key."""
    here = simulate(private_run(tmp_path, model, "here", 7), simulated_app)
    config = private_run(tmp_path, model, "there", 7)
    sites = split(config, tmp_path / "sites")
    names = [site.parent.name for site in sites]
    with started() as start:
        tls, keys = make_identity(start, tmp_path, names)
        pins = [f"{name} {fingerprint(read_public_key(path))}" for name, path in registered(keys).items()]
        assert len(pins) == len(names)
        allowing(sites, f"seeded_noise = true\nsecure_aggregation = true\nmembers = {json.dumps(pins)}")
        credentials = ["--ca", str(tls / "ca.crt"), "--key", str(tmp_path / "identity" / "{name}.key")]
        server, clients = serve_and_join(start, tmp_path, config, ["--tls", tls, "--keys", keys], credentials, sites)
        assert server.wait(150) == 0, server.text()[-3000:]
        for client in clients:
            client.process.send_signal(signal.SIGTERM)
            assert client.wait(20) == 0, client.text()[-2000:]
    assert [len(line["accepted"]) for line in metrics(config)] == [5, 5]
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
    assert summary(config)["privacy"]["private"] is False
    spent = Ledger(sites[0].parent / "privacy-ledger.jsonl", 1e-5, {}).spent()
    counted = {who: sum(counts.values()) for who, counts in spent.items() if counts}
    assert counted == {"release": 2, "outsiders": 2, "sums": 2}


def test_a_client_that_dies_in_training_is_not_missed(tmp_path, model):
    """Catches: masks of a dead client left in the sum; a run that ends with one of five."""
    config = private_run(tmp_path, model, "run", train={"local_steps": 3})
    sites = allowing(split(config, tmp_path / "sites"), "max_epsilon = 1000.0\nsecure_aggregation = true")
    with started() as start:
        server, clients = serve_and_join(start, tmp_path, config, ["--insecure"], ["--insecure"], sites)
        clients[2].wait_for("round 1: exchanging shares: done", 100)
        os.killpg(clients[2].process.pid, signal.SIGKILL)
        assert server.wait(200) == 0, server.text()[-3000:]
    lines = metrics(config)
    assert [len(line["accepted"]) for line in lines] == [4, 4]
    assert list(lines[0]["rejected"]) == ["site-2"]
    assert all(line["privacy"]["private"] and line["eval"] for line in lines)
    charged = [line["adversary"] for line in read_lines(tmp_path / "runs" / "privacy-ledger.jsonl")]
    assert charged == ["sums", "release", "outsiders"] * 2
