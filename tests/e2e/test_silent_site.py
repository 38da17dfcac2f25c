"""A deployed federation with a site that says hello and then nothing."""

import pytest

from tests.support.serving import hostile, metrics, serve_and_join, started, tiny_run
from tsugiki.common.audit import verify

pytestmark = pytest.mark.e2e

ROUNDS = 20
TIMEOUT_S = 10.0


def test_a_silent_site_costs_one_time_out_in_twenty_rounds(tmp_path, model):
    """Catches: the whole time-out in each round; a grace each time that it is asked again."""
    config = tiny_run(
        tmp_path,
        model,
        sites=3,
        run={"rounds": ROUNDS, "output_dir": str(tmp_path / "runs")},
        strategy={"min_clients": 2, "round_timeout_s": TIMEOUT_S},
    )
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        places = {"site-2": hostile("silent")}
        server, _ = serve_and_join(start, tmp_path, config, insecure, insecure[:1], places=places)
        assert server.wait(200) == 0, server.text()
    lines = metrics(config)
    asked = [line["round"] for line in lines if "site-2" in line["cohort"]]
    # it may connect after the quorum, and join in a later round
    first = asked[0]
    assert [number - first for number in asked] == [n for n in (0, 2, 5, 10, 19) if first + n <= ROUNDS]
    assert len(asked) >= 4
    assert [line["round"] for line in lines if line["seconds"]["wait"] >= TIMEOUT_S] == [first]
    assert all(sorted(line["accepted"]) == ["site-0", "site-1"] for line in lines)
    assert f"site-2 not asked until round {first + 2} (silent)" in server.text()
    named = [event["not_asked"] for event in verify(tmp_path / "runs" / "run" / "audit.jsonl") if "not_asked" in event]
    assert named == [["site-2"]] * (ROUNDS - first + 1 - len(asked))
