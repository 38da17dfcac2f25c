"""Separate machines: a server and three sites in network namespaces, with TLS and keys, on lines that can be cut."""

import time

import pytest

from tests.support.namespaces import hosts, why_not
from tests.support.serving import (
    BIN,
    Place,
    make_identity,
    metrics,
    serve_and_join,
    started,
    summary,
    tiny_run,
)
from tests.support.three import COMPANIES, demo_of_three
from tsugiki.client.app import simulated_app
from tsugiki.client.site.split import split
from tsugiki.server.run.simulate import simulate

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(why_not()), reason=why_not() or "namespaces can be made")]

PORT = 9092


def join(start, folder, config, server, machines):
    """Start the server and a site on each machine, with TLS and keys; return (server, clients)."""
    sites = split(config, folder / "sites")
    names = [site.parent.name for site in sites]
    tls, keys = make_identity(start, folder, names, [machine.server_address for machine in machines])
    places = {"server": Place(server.program(BIN / "tsugiki"))}
    for name, machine in zip(names, machines, strict=True):
        places[name] = Place(machine.program(BIN / "tsugiki"), f"{machine.server_address}:{PORT}")
    extra = ["--tls", tls, "--keys", keys, "--no-export"]
    client_extra = ["--ca", str(tls / "ca.crt"), "--key", str(folder / "identity" / "{name}.key")]
    listen = f"{server.server_address}:{PORT}"
    return serve_and_join(start, folder, config, extra, client_extra, sites, listen, places)


def test_the_demo_on_four_machines_gives_the_bytes_of_one_process(tmp_path):
    """Catches: whatever holds on loopback only: names in certificates, addresses, a listener on the wrong interface."""
    here = simulate(demo_of_three(tmp_path / "here"), simulated_app)
    config = demo_of_three(tmp_path / "there")
    with hosts(3) as (server, machines), started() as start:
        serving, clients = join(start, tmp_path, config, server, machines)
        assert serving.wait(240) == 0, serving.text()[-3000:] + clients[0].text()[-2000:]
    there = summary(config)
    assert there["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there["after"] == here.summary["after"]
    assert [set(line["accepted"]) for line in metrics(config)] == [set(COMPANIES)] * config.run.rounds


def test_a_line_that_is_dead_for_20_seconds_changes_nothing(tmp_path, model):
    """Fault 22. Catches: a site given up too early, an upload that is lost with its packets."""
    sections = {"train": {"local_steps": 100}, "strategy": {"round_timeout_s": 120.0}}
    rounds = {"rounds": 3, "output_dir": str(tmp_path / "runs")}
    here = simulate(tiny_run(tmp_path, model, sites=3, run={"name": "here", **rounds}, **sections), simulated_app)
    config = tiny_run(tmp_path, model, sites=3, run={"name": "there", **rounds}, **sections)
    with hosts(3) as (server, machines), started() as start:
        serving, clients = join(start, tmp_path, config, server, machines)
        clients[1].wait_for("round 1: training: done", 120)
        machines[1].cut()
        time.sleep(20)
        assert serving.process.poll() is None
        machines[1].heal()
        assert serving.wait(120) == 0, serving.text()[-3000:]
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
    lines = metrics(config)
    assert [line["dropouts"] for line in lines] == [0] * 3
    assert max(line["seconds"]["wait"] for line in lines) > 15


def test_a_site_that_is_cut_off_in_a_round_is_missed_and_comes_back(tmp_path, model):
    """Fault 13 on a network. Catches: a round that waits for a dead line, a site that cannot come back."""
    config = tiny_run(
        tmp_path,
        model,
        sites=3,
        run={"rounds": 8, "output_dir": str(tmp_path / "runs")},
        train={"local_steps": 100},
        strategy={"min_clients": 2, "round_timeout_s": 5.0},
    )
    with hosts(3) as (server, machines), started() as start:
        serving, clients = join(start, tmp_path, config, server, machines)
        clients[1].wait_for("round 1: training: done", 120)
        machines[1].cut()
        serving.wait_for(r"without site-1 \((slow|gone)\)", 60)
        machines[1].heal()
        assert serving.wait(150) == 0, serving.text()[-3000:]
    lines = metrics(config)
    assert 1 <= sum(line["dropouts"] for line in lines) <= 3
    assert {site for line in lines for site in line["rejected"]} == {"site-1"}
    assert set(lines[-1]["accepted"]) == {"site-0", "site-1", "site-2"}
    assert max(line["seconds"]["wait"] for line in lines) < 9
