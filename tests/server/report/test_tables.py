"""The report's sentences and tables."""

from tests.support.runs import line, run_folder, start
from tsugiki.server.report.run_files import read_run
from tsugiki.server.report.tables import Table, sections, story
from tsugiki.server.run.at_sites import results


def test_training_that_made_it_worse_is_said(tmp_path):
    """Catches: a report that praises a run whose best adapter is the one before training."""
    run = read_run(run_folder(tmp_path / "run", [start(accuracy=0.5), line(1, eval={"accuracy": 0.4})]))
    assert "No round was better than the start: accuracy 0.5" in " ".join(story(run))


def test_what_sites_measured_is_said_where_the_operator_measured_nothing(tmp_path):
    """Catches: "nothing here says whether the model became better" above a figure of the sites' own evaluations."""

    def judged(*values):
        return {site: {"accuracy": value, "rows": 5} for site, value in zip("ab", values, strict=True)}

    lines = [{"round": 0, "seconds": {}, "sites_eval": judged(0.2, 0.4)}, line(1, sites_eval=judged(0.9, 0.5))]
    found = results(lines, 1, "accuracy", lower_is_better=False)
    run = read_run(run_folder(tmp_path / "run", lines, monitor="sites_accuracy", **found))
    told = " ".join(story(run))
    assert "On the own evaluation rows of 2 sites" in told
    assert "accuracy went from 0.3 before training to 0.7 (+0.4), best after round 1" in told
    assert "The worst site is b: accuracy 0.5" in told
    assert "nothing here says" not in told
    (table,) = [block.table for section in sections(run) if section.heading == "Rounds" for block in section.blocks]
    assert [row[table.head.index("sites_accuracy")] for row in table.rows] == [0.3, 0.7]


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


def test_a_head_before_round_1_is_said(tmp_path):
    """Catches: a report that calls round 0 a random head, or says nothing of the sums that left the sites."""
    warm = {"warm_head": {"sites": {"a": 10, "b": 30}}, "bytes_up": 4000}
    run = read_run(run_folder(tmp_path / "run", [start(accuracy=0.5) | warm, line(1, eval={"accuracy": 0.6})]))
    sentence = next(sentence for sentence in story(run) if "linear probe" in sentence)
    assert "over the rows of 2 sites" in sentence
    assert "sent 2.0 kB once" in sentence
    plain = read_run(run_folder(tmp_path / "plain", [start(accuracy=0.5), line(1, eval={"accuracy": 0.6})]))
    assert not any("linear probe" in sentence for sentence in story(plain))
