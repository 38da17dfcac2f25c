"""Runs that follow each other on one SuperLink, with real sites that stay, leave and come back."""

import json

import pytest

from tests.support.serving import make_identity, started, summary, superlinks, tiny_run, write_run
from tsugiki.client.app import simulated_app
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.files import read_lines
from tsugiki.server.deploy.superlink_process import free_port
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e


def drop(queue, name, config):
    """Put a run into the queue as the documents tell: written beside it, then renamed."""
    write_run(queue.parent / name, config).rename(queue / name)


def hellos(folder):
    """Return the sites that a run has greeted."""
    return sorted(event["site"] for event in verify(folder / "audit.jsonl") if event["event"] == "hello")


def states(start, folder):
    """Return the state of each run in a folder, by name."""
    listed = start(folder / "listed", "list", "runs", "--dir", folder / "runs", "--json")
    assert listed.wait(60) == 0, listed.text()
    return {run["name"]: run["state"] for run in json.loads(listed.text())}


def test_sites_take_part_in_run_after_run(tmp_path, model):
    """Catches: a second SuperLink, for which every site connects anew; a site that is lost between two runs.

    A broken file that ends the queue, and a run that is not that of the in-process engine.
    """
    here = simulate(tiny_run(tmp_path, model, "here"), simulated_app)
    june = tiny_run(tmp_path, model, "june")
    names = ["site-0", "site-1"]
    files = split(june, tmp_path / "sites")
    queue = tmp_path / "queue"
    queue.mkdir()
    with started() as start:
        tls, keys = make_identity(start, tmp_path, names)
        listen = f"127.0.0.1:{free_port()}"
        options = ["--listen", listen, "--tls", tls, "--keys", keys, "--no-export"]
        server = start(tmp_path / "server", "serve", "serve", "--queue", queue, *options)

        def join(number, log):
            key = keys.parent / f"{names[number]}.key"
            options = ["--server", listen, "--site", files[number], "--ca", tls / "ca.crt", "--key", key]
            return start(tmp_path / "clients", log, "client", *options)

        stays, leaves = join(0, "stays"), join(1, "leaves")
        server.wait_for("waiting for run files", 60)
        drop(queue, "1-june.toml", june)
        server.wait_for("queue: 1-june.toml is done", 150)
        (link,) = superlinks([server.process.pid])
        leaves.process.terminate()
        assert leaves.wait(30) == 0
        (queue / "2-broken.toml").write_text("[run\n")
        drop(queue, "3-june-again.toml", june)
        drop(queue, "4-july.toml", tiny_run(tmp_path, model, "july"))
        server.wait_for("queue: 2-broken.toml: config-invalid", 60)
        server.wait_for("queue: 3-june-again.toml: run-exists", 60)
        server.wait_for("queue: 4-july.toml begins(?s:.*)1 of 2 nodes connected", 60)
        join(1, "comes-back").wait_for("connected to", 60)
        server.wait_for("queue: 4-july.toml is done", 150)
        assert superlinks([server.process.pid]) == [link]
        assert stays.text().count("connected to") == 1
        server.process.terminate()
        assert server.wait(30) == 0, server.text()[-2000:]
        assert states(start, tmp_path) == {"here": "finished", "june": "finished", "july": "finished"}
    for name in ("june", "july"):
        assert summary(tiny_run(tmp_path, model, name))["adapter_sha256"] == here.summary["adapter_sha256"]
        assert hellos(tmp_path / "runs" / name) == names
    rounds = [line["accepted"] for line in read_lines(tmp_path / "runs" / "july" / "metrics.jsonl") if line["round"]]
    assert [sorted(accepted) for accepted in rounds] == [names, names]


def test_a_run_starts_from_the_export_of_the_run_before_it(tmp_path, model):
    """Catches: a deployed run that needs its first adapter at the sites, or that starts from chance."""
    june = tiny_run(tmp_path, model, "june")
    first = tmp_path / "runs" / "june" / "adapter"
    july = changed(tiny_run(tmp_path, model, "july"), {"adapter.start_from": str(first)})
    files = [write_run(tmp_path / f"{config.run.name}.toml", config) for config in (june, july)]
    with started() as start:
        listen = f"127.0.0.1:{free_port()}"
        server = start(tmp_path / "server", "serve", "serve", *files, "--listen", listen, "--insecure")
        for site in split(june, tmp_path / "sites"):
            start(tmp_path / "clients", site.parent.name, "client", "--server", listen, "--site", site, "--insecure")
        assert server.wait(300) == 0, server.text()[-2000:]
    for log in ("site-0", "site-1"):
        text = (tmp_path / "clients" / f"{log}.log").read_text("utf-8")
        for name in ("june", "july"):
            assert f"end of a run: run {name} is over (finished), 2 rounds, 2 of them with this site" in text
    start_sha256 = summary(july)["start_sha256"]
    assert start_sha256 == summary(june)["best_sha256"]
    assert f"| starts from | june/adapter, values {start_sha256} |" in (
        tmp_path / "runs" / "july" / "adapter" / "README.md"
    ).read_text("utf-8")
    assert summary(july)["before"] == summary(june)["after"]


def test_a_list_goes_on_after_a_run_that_is_stopped_or_fails(tmp_path, model):
    """Catches: a list that ends with a run that was stopped, or with one that is there; a status that hides it."""
    long = tiny_run(tmp_path, model, run={"name": "long", "rounds": 500, "output_dir": str(tmp_path / "runs")})
    configs = [long, tiny_run(tmp_path, model, "taken"), tiny_run(tmp_path, model, "last")]
    files = [write_run(tmp_path / f"{config.run.name}.toml", config) for config in configs]
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "mine.txt").touch()
    with started() as start:
        listen = f"127.0.0.1:{free_port()}"
        server = start(tmp_path / "server", "serve", "serve", *files, "--listen", listen, "--insecure", "--no-export")
        for site in split(long, tmp_path / "sites"):
            start(tmp_path / "clients", site.parent.name, "client", "--server", listen, "--site", site, "--insecure")
        server.wait_for("queue: long.toml begins(?s:.*)round 1, loss", 150)
        asked = start(tmp_path / "asked", "stop", "runs", "stop", tmp_path / "runs" / "long")
        assert asked.wait(60) == 0, asked.text()
        server.wait_for("queue: long.toml: interrupted", 60)
        server.wait_for(f"tsugiki serve --resume {tmp_path}/runs/long --listen {listen} --insecure --no-export\n", 10)
        assert server.wait(150) == 130, server.text()
        server.wait_for("queue: taken.toml: run-exists", 1)
        assert states(start, tmp_path) == {"long": "unfinished", "last": "finished"}
    assert summary(configs[2])["rounds"] == 2
