"""A server that lies in secure aggregation, and real clients of demanding sites on loopback."""

import pytest

from tests.support.lying import POLICY
from tests.support.serving import hostile, serve_and_join, started, tiny_run
from tsugiki.client.site.split import split
from tsugiki.common.files import read_lines

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("trick", "kind", "code"),
    [("counts", "query.shares", "policy-clients"), ("told", "train.masked", "secagg-mismatch")],
)
def test_real_clients_refuse_what_they_cannot_check(tmp_path, model, trick, kind, code):
    """Catches: checks that only the in-process engine does; a sum that is opened, or charged though it is not."""
    privacy = {"mode": "distributed", "secure_aggregation": True, "noise_multiplier": 3.0, "min_sites": 3}
    strategy = {"min_clients": 3}
    config = tiny_run(tmp_path, model, "run", 3, privacy={**privacy, "enrolled_clients": 60_003}, strategy=strategy)
    sites = split(config, tmp_path / "sites")
    for site in sites:
        site.write_text(site.read_text() + POLICY)
    with started() as start:
        places = {"server": hostile(trick)}
        server, _ = serve_and_join(start, tmp_path, config, ["--insecure"], ["--insecure"], sites, places=places)
        assert server.wait(200) != 0, server.text()[-3000:]
    assert "quorum-not-met" in server.text()
    assert len(sites) == 3
    for site in sites:
        lines = read_lines(site.parent / "audit.jsonl")
        assert {line["code"] for line in lines if line["event"] == "refused" and line["kind"] == kind} == {code}
        assert not (site.parent / "privacy-ledger.jsonl").exists()
