import io

import pytest
from rich.console import Console

from tsugiki.server.run import progress
from tsugiki.server.run.progress import Bars, Lines, Progress, describe, describe_notes, describe_rows, shown

RECORD = {
    "round": 3,
    "train_loss": 0.51234,
    "accepted": {"bank": {}, "clinic": {}},
    "rejected": {"retail": {"reason": "norm", "detail": "7"}},
    "eval": {"accuracy": 0.75},
    "seconds": {"wait": 1.0, "evaluate": 0.5},
    "best": True,
}


def test_a_round_is_described_in_one_line():
    """Catches: a rejection or a metric that the operator does not see."""
    assert describe(RECORD) == "round 3, loss 0.5123, 2 sites, without retail (norm), accuracy 0.7500, 1.5 s (best)"


def test_a_round_of_lora_tells_its_aggregation_error():
    """Catches: a figure that only the file has."""
    assert ", aggregation error 0.012, " in describe({**RECORD, "aggregation_error": 0.0123})


def test_a_head_before_round_1_is_described():
    """Catches: accuracy before training that nobody can explain."""
    record = {"round": 0, "seconds": {}, "warm_head": {"sites": {"a": 10, "b": 30}}, "eval": {"accuracy": 0.75}}
    assert describe(record) == "round 0, linear probe from 2 sites' sums, accuracy 0.7500, 0.0 s"


def test_a_voided_round_is_described_too():
    """Catches: a mean loss of no replies formatted as a number."""
    record = {"round": 1, "voided": True, "accepted": {}, "rejected": {}, "train_loss": None, "seconds": {"wait": 2.0}}
    assert describe(record) == "round 1, voided, 2.0 s"


def test_notes_are_told_by_kind():
    """Catches: a line for each of a thousand sites; a count given to another site; a site that hides another."""
    notes = {f"site-{n}": (f"shard-texts-cut:{n}",) for n in range(1, 7)} | {"a": ("shard-one-class",), "b": ()}
    assert describe_notes(notes) == [
        "shard-one-class: a",
        "shard-texts-cut: site-1 (1), site-2 (2), site-3 (3), site-4 (4) and 2 more sites",
    ]


def play(shown):
    """Tell a progress a whole run."""
    with shown:
        shown.note("2 of 2 nodes connected")
        shown.round_begins(1, 3, ["a", "b", "c", "d", "e"])
        shown.reply("a", "accepted")
        shown.round_ends(RECORD)


def test_lines_go_to_standard_error(capsys):
    """Catches: progress among the output that scripts read."""
    play(Lines())
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["2 of 2 nodes connected", describe(RECORD)]
    assert captured.out == ""


def test_nothing_shows_nothing(capsys):
    """Catches: output of the silent default."""
    play(Progress())
    assert capsys.readouterr() == ("", "")


def test_bars_show_the_same_lines(monkeypatch, capsys):
    """Catches: an event that the bars cannot draw, and names taken for markup."""
    stream = io.StringIO()
    bars = Bars()
    monkeypatch.setattr(bars._bars.live, "console", Console(file=stream, force_terminal=True, width=200))
    play(bars)
    bars.note("[bold]x[/bold]")
    assert describe(RECORD) in stream.getvalue()
    assert "a, b, c, d..." in stream.getvalue()
    assert "[bold]x[/bold]" in stream.getvalue()


@pytest.mark.parametrize(("terminal", "kind"), [(True, Bars), (False, Lines)])
def test_a_terminal_gets_bars_and_a_log_gets_lines(monkeypatch, terminal, kind):
    """Catches: control codes in a log file."""
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    assert type(progress.choose()) is kind


def test_the_rows_of_all_sites_are_shown_and_a_dominant_one_is_named():
    """Catches: a site with most of the rows that nobody is warned of; a thousand names on a line."""
    rows = {"a": 100, "b": 200, "c": 10**18}
    shown, warning = describe_rows(rows, ["c"], "capped")
    assert shown == "rows: a 100, b 200, c 1,000,000,000,000,000,000"
    assert warning.startswith("warning: far more rows than others, by their own count: c (100% of all rows); each")
    assert describe_rows({"a": 100, "b": 120}, [], "rows") == ["rows: a 100, b 120"]
    (many,) = describe_rows({f"site-{number:03d}": number for number in range(1, 101)}, [], "equal")
    assert many.startswith("rows: site-081 81, ")
    assert many.endswith("site-100 100 and 80 more sites with fewer (audit.jsonl has all)")


def test_a_metric_that_is_not_finite_is_a_dash():
    """Catches: null from a file that ends a command with a traceback."""
    record = {"round": 2, "eval": {"loss": None, "accuracy": 0.5}, "seconds": {}}
    assert describe(record) == "round 2, loss -, accuracy 0.5000, 0.0 s"
    assert shown(float("inf")) == "-"
