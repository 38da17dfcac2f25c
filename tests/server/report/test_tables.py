"""The report's sentences and tables."""

from tests.support.runs import line, run_folder, start
from tsugiki.server.report.run_files import read_run
from tsugiki.server.report.tables import Table, story


def test_training_that_made_it_worse_is_said(tmp_path):
    """Catches: a report that praises a run whose best adapter is the one before training."""
    run = read_run(run_folder(tmp_path / "run", [start(accuracy=0.5), line(1, eval={"accuracy": 0.4})]))
    assert "No round was better than the start: accuracy 0.5" in " ".join(story(run))


def test_the_kinds_of_columns_are_found_once():
    """Catches: all rows read again for each cell of the page, which grows with the square of the number of sites."""
    reads = []

    class Row(list):
        def __getitem__(self, column):
            reads.append(column)
            return super().__getitem__(column)

    table = Table(["site", "rows"], [Row(["a", 3]), Row(["b", None])])
    assert table.kinds == ["text", "number"]
    first = len(reads)
    assert first > 0
    assert table.kinds == ["text", "number"]
    assert len(reads) == first
