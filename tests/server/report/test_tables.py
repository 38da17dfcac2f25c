"""The report's sentences."""

from tests.support.runs import line, run_folder, start
from tsugiki.server.report.run_files import read_run
from tsugiki.server.report.tables import story


def test_training_that_made_it_worse_is_said(tmp_path):
    """Catches: a report that praises a run whose best adapter is the one before training."""
    run = read_run(run_folder(tmp_path / "run", [start(accuracy=0.5), line(1, eval={"accuracy": 0.4})]))
    assert "No round was better than the start: accuracy 0.5" in " ".join(story(run))
