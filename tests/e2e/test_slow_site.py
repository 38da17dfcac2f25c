"""A deployed federation with a site that has far more rows than it can train on in a round."""

import pytest

from tests.support.serving import metrics, serve_and_join, started, tiny_run
from tsugiki.client.site.split import split

pytestmark = pytest.mark.e2e

ROUNDS = 3
TIMEOUT_S = 10.0
COPIES = 800


def test_the_largest_site_sends_what_it_has(tmp_path, model):
    """Catches: the largest site, whose updates are never in a round; a partial update that weighs all rows."""
    config = tiny_run(
        tmp_path,
        model,
        sites=3,
        run={"rounds": ROUNDS, "output_dir": str(tmp_path / "runs")},
        train={"local_epochs": 1},
        strategy={"min_clients": 2, "start_with": 3, "round_timeout_s": TIMEOUT_S, "weighting": "rows"},
    )
    files = split(config, tmp_path / "sites")
    large = files[2].parent / "train.jsonl"
    rows = large.read_text("utf-8").splitlines()
    large.write_text("\n".join(rows * COPIES) + "\n", "utf-8")
    insecure = ["--insecure", "--no-export"]
    with started() as start:
        server, _ = serve_and_join(start, tmp_path, config, insecure, insecure[:1], files)
        assert server.wait(200) == 0, server.text()
    lines = metrics(config)
    assert [sorted(line["accepted"]) for line in lines] == [["site-0", "site-1", "site-2"]] * ROUNDS
    steps = len(rows) * COPIES // 4
    for line in lines:
        partial = line["accepted"]["site-2"]
        assert partial["steps"] + partial["missed_steps"] == steps
        assert partial["weight"] == partial["rows"] == len(rows) * COPIES * partial["steps"] // steps
        assert "missed_steps" not in line["accepted"]["site-0"]
        assert line["seconds"]["wait"] < TIMEOUT_S
    assert f" of {steps} steps" in server.text()
