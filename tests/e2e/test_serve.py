"""`tsugiki serve` and `tsugiki client` as real processes on loopback."""

import json
import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from client.app import simulated_app
from common.audit import verify
from server.simulate import simulate
from tests.support.processes import end_group, free_port, group_alive
from tests.support.serving import CANARY, Process, site_files, tiny_run, write_run
from tests.support.tiny import tiny_bert

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model's folder."""
    return str(tiny_bert(tmp_path_factory.mktemp("model")))


@contextmanager
def started():
    """Give a function that starts commands; afterwards end them all and see that nothing is left."""
    processes = []

    def start(folder, name, *arguments):
        processes.append(Process(folder, name, *arguments))
        return processes[-1]

    try:
        yield start
    finally:
        for one in processes:
            end_group(one.process)
        assert not [one.log.name for one in processes if group_alive(one.process.pid)]
        assert not superlinks([one.process.pid for one in processes])


def superlinks(parents):
    """Return the ids of SuperLinks of ours: each has its parent's id as an argument."""
    words = {str(parent).encode() for parent in parents}
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it ended while we looked
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if words & set(arguments) and b"--fleet-api-address" in arguments:
                found.append(int(entry.name))
    return found


def serve_and_join(start, folder, config, extra=(), client_extra=(), sites=None):
    """Start a server and a client for each site; return (server, clients)."""
    port = free_port()
    file = write_run(folder / "run.toml", config)
    server = start(folder / "server", "serve", "serve", file, "--listen", f"127.0.0.1:{port}", *extra)
    clients = []
    for number, site in enumerate(sites or site_files(folder, config)):
        options = [part.format(number=number, name=site.parent.name) for part in client_extra]
        arguments = ["client", "--server", f"127.0.0.1:{port}", "--site", site, *options]
        clients.append(start(folder / "clients", site.parent.name, *arguments))
    return server, clients


def summary(config):
    """Return a run's summary.json."""
    with open(f"{config.run.output_dir}/{config.run.name}/summary.json") as file:
        return json.load(file)


def make_identity(start, folder, names):
    """Make certificates and keys as the documents tell; return (tls, keyring)."""
    place = folder / "identity"
    assert start(place, "certs", "certs", "--tls", place / "tls").wait(60) == 0
    for name in names:
        assert start(place, "keys", "keys", "new", place / f"{name}.key").wait(60) == 0
        arguments = ["keys", "register", place / f"{name}.key.pub", "--name", name, "--keys", place / "keys"]
        assert start(place, "keys", *arguments).wait(60) == 0
    return place / "tls", place / "keys"


def test_with_tls_and_keys_the_adapter_is_that_of_the_in_process_engine(tmp_path, model):
    """Catches: state that only one engine has; an order that follows arrival; private text or a secret in a log."""
    here = simulate(tiny_run(tmp_path, model, "here", 3), simulated_app)
    config = tiny_run(tmp_path, model, "there", 3)
    with started() as start:
        tls, keys = make_identity(start, tmp_path, ["site-0", "site-1", "site-2"])
        identity = tmp_path / "identity"
        server, clients = serve_and_join(
            start,
            tmp_path,
            config,
            ["--tls", tls, "--keys", keys, "--json"],
            ["--ca", str(tls / "ca.crt"), "--key", str(identity / "{name}.key")],
        )
        assert server.wait(150) == 0, server.text()[-3000:]
        for client in clients:
            client.process.send_signal(signal.SIGTERM)
            assert client.wait(20) == 0, client.text()[-2000:]
            assert "round 2: training: done" in client.text()
    there = summary(config)
    assert there["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there["after"] == here.summary["after"]
    events = verify(tmp_path / "runs" / "there" / "audit.jsonl")
    assert sorted(event["site"] for event in events if event["event"] == "hello") == ["site-0", "site-1", "site-2"]
    assert (tmp_path / "runs" / "there" / "adapter" / "adapter_model.safetensors").is_file()

    secrets = [CANARY.encode(), CANARY.lower().encode(), b"PRIVATE KEY"]
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".log", ".jsonl", ".json", ".html")
    ]
    assert len(written) > 8
    for path in written:
        assert not [secret for secret in secrets if secret in path.read_bytes()], path


def test_a_client_that_dies_is_a_dropout_and_comes_back(tmp_path, model):
    """Catches: a round that waits for the dead; a dead node that is sampled again; a site that cannot rejoin."""
    config = tiny_run(
        tmp_path,
        model,
        strategy={"name": "fedavg", "min_clients": 1, "round_timeout_s": 60.0, "connect_timeout_s": 60.0},
        run={"name": "run", "rounds": 12, "output_dir": str(tmp_path / "runs")},
        train={"learning_rate": 1e-2, "local_steps": 400, "per_device_train_batch_size": 4, "threads": 1},
    )
    with started() as start:
        sites = site_files(tmp_path, config)
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
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("dropouts", 0) for line in lines) <= 2
    assert lines[-1]["round"] == 12


def test_everything_killed_and_resumed_ends_with_the_same_bytes(tmp_path, model):
    """Catches: a checkpoint that is not whole; a SuperLink that outlives its server; a port that stays taken."""
    long = {"learning_rate": 1e-2, "local_steps": 60, "per_device_train_batch_size": 4, "threads": 1}
    rounds = {"rounds": 6, "output_dir": str(tmp_path / "runs")}
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
