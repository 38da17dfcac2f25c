import io

import pytest
from rich.console import Console

from tsugiki.server.run import progress
from tsugiki.server.run.progress import Bars, Lines, Progress, describe, describe_notes

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
