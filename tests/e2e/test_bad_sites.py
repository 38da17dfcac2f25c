"""A deployed federation in which most sites are broken or mean harm: faults 11, 15, 24 and 25 with real processes.

Its SuperLink runs already, as an operator may have one: `tsugiki serve --superlink`.
"""

import tomllib

import pytest
import tomli_w

from tests.support.federation import leaks
from tests.support.processes import BIN, quiet_environment, running, wait_for_port
from tests.support.serving import CANARY, hostile, metrics, serve_and_join, started, tiny_run
from tests.support.tiny import tiny_bert
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify
from tsugiki.server.deploy.superlink_process import free_port

pytestmark = pytest.mark.e2e

ROUNDS = 5
PLACES = {"site-2": hostile("replay"), "site-3": hostile("fail"), "site-4": hostile("twice")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, model):
    """The run's configuration, its lines of metrics, its audit log, and each site's output."""
    folder = tmp_path_factory.mktemp("bad")
    config = tiny_run(
        folder,
        model,
        sites=7,
        run={"rounds": ROUNDS, "output_dir": str(folder / "runs")},
        strategy={"min_clients": 2},
        train={"local_steps": 50},
    )
    files = split(config, folder / "sites")
    assert len(files) == 7
    (files[5].parent / "train.jsonl").write_bytes(b'{"text": "\xff", "label": "1"}\n')
    other = str(tiny_bert(folder / "other", seed=1))
    body = tomllib.loads(files[6].read_text("utf-8"))
    files[6].write_text(tomli_w.dumps({**body, "models": {model: other}}), "utf-8")
    runtime, fleet = free_port(), free_port()
    options = ["--host", "127.0.0.1", "--port", str(runtime), "--fleet-api-address", f"127.0.0.1:{fleet}"]
    options += ["--insecure", "--isolation", "process", "--disable-runtime-dependency-installation"]
    stock, log, environment = BIN / "flower-superlink", folder / "superlink.log", quiet_environment(folder / "home")
    with started() as start, running([stock, *options], log, environment) as superlink:
        wait_for_port(runtime, superlink, 60, log)
        extra = ["--insecure", "--no-export", "--superlink", f"127.0.0.1:{runtime}"]
        listen = f"127.0.0.1:{fleet}"
        server, clients = serve_and_join(start, folder, config, extra, extra[:1], files, listen, PLACES)
        assert server.wait(240) == 0, server.text()[-3000:]
        said = {client.log.stem: client.text() for client in clients}
    run = folder / "runs" / "run"
    assert leaks(run, server.text()) == []
    return config, metrics(config), verify(run / "audit.jsonl"), said


def reasons(lines, site):
    """Return why a site was rejected, round by round."""
    return [line["rejected"][site]["reason"] for line in lines if site in line["rejected"]]


def test_the_honest_ones_finish(ran):
    """Catches: one bad site that ends the run, voids its rounds or holds them up."""
    _, lines, _, _ = ran
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all({"site-0", "site-1"} <= set(line["accepted"]) for line in lines[1:])


def test_yesterdays_reply_is_stale(ran):
    """Fault 11. Catches: an update that is counted again in every round."""
    _, lines, _, _ = ran
    taken = [line["round"] for line in lines if "site-2" in line["accepted"]]
    assert len(taken) == 1
    assert reasons(lines, "site-2") == ["stale"] * (ROUNDS - taken[0])
    assert taken[0] < ROUNDS


def test_a_reply_sent_twice_counts_once(ran):
    """Fault 11. Catches: a second reply that is averaged too, or that is taken for the next round's."""
    _, lines, _, said = ran
    assert len([line for line in lines if "site-4" in line["accepted"]]) > 1
    assert set(reasons(lines, "site-4")) <= {"duplicate"}
    assert "the second was not taken" in said["site-4"]


def test_an_exception_is_a_code_and_its_text_stays(ran):
    """Fault 15. Catches: the text of an exception in a file of the server; a node that dies of one."""
    _, lines, _, said = ran
    assert len(reasons(lines, "site-3")) > 1
    assert set(reasons(lines, "site-3")) == {"client-error:ValueError"}
    assert CANARY in said["site-3"]


def test_broken_rows_and_another_base_are_refused_before_training(ran):
    """Faults 24 and 25. Catches: a site that trains on what it can read, or on other weights."""
    _, lines, events, said = ran
    refused = {event["code"] for event in events if event["event"] == "refused"}
    assert refused == {"shard-encoding", "base-mismatch"}
    assert not [line for line in lines if {"site-5", "site-6"} & set(line["cohort"])]
    assert "shard-encoding" in said["site-5"]
