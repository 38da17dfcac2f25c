"""What a site's operator sees."""

import io
import sys

import numpy as np
import pytest
from rich.console import Console

from tsugiki.client.node.status import Lines, LiveLine, choose, describe


@pytest.mark.parametrize(
    ("kind", "group", "shown"),
    [
        ("train", "3", "round 3: training"),
        ("query", "", "hello"),
        ("evaluate", "12", "round 12: evaluating"),
        ("train", "3\x1b[2J\nroot", "training"),
        ("train", "9" * 400, "training"),
        ("train.masked", "2", "round 2: training, masked"),
        ("query.unmask", "2", "round 2: opening the sum"),
        ("train.default", "2", "round 2: training"),
        ("agent", "1", "round 1: unknown"),
    ],
)
def test_a_message_in_words(kind, group, shown):
    """Catches: text of the server's that reaches the terminal as it stands."""
    assert describe(kind, group) == shown


def test_a_log_has_one_line_for_each_message(capsys):
    """Catches: control characters in a log; an outcome or traffic that is left out."""
    lines = Lines()
    lines.begins("train", "1")
    lines.step(1, 2, np.array([0.5, 0.0]))
    lines.ends("train", "1", "done", 2.5, 10_500, 9_600)
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert "\x1b" not in written
    assert "round 1: training: done, 2.5 s, 10.5 kB received, 9.6 kB sent" in written


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (1_234, "1.2 kB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB")]
)
def test_sizes_are_for_people(capsys, count, shown):
    """Catches: powers of two called kB; a unit that is one too high."""
    Lines().ends("train", "1", "done", 2.5, count, 0)
    assert f", {shown} received, 0 bytes sent\n" in capsys.readouterr().err


@pytest.fixture
def terminal():
    """A terminal of 120 columns that keeps what is written to it."""
    return Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})


def last_line(console):
    """Return what the terminal shows in its last line, without what moves the cursor."""
    return console.file.getvalue().rpartition("\x1b[2K")[2].rstrip()


def test_the_live_line_shows_step_loss_and_bytes(terminal):
    """Catches: a mean over steps that have not been taken; a line that is not taken back."""
    with LiveLine(terminal) as live:
        live.begins("train", "2")
        assert last_line(terminal).endswith("connected | round 2: training | 0 bytes received, 0 bytes sent")
        live._shown_s = 0.0
        live.step(2, 4, np.array([0.5, 0.7, 0.0, 0.0]))
        assert "round 2: training, step 2/4, loss 0.6000" in last_line(terminal)
        live.ends("train", "2", "done", 1.0, 1_000, 2_000)
        assert "round 2: training: done, 1.0 s, 1.0 kB received, 2.0 kB sent\n" in terminal.file.getvalue()
        assert last_line(terminal) == "connected | waiting | 1.0 kB received, 2.0 kB sent"
        assert terminal.file.getvalue().count("\r\x1b[2K") == 3
    assert last_line(terminal) == ""


def test_few_refreshes(terminal):
    """Catches: a terminal that is written to at every step."""
    with LiveLine(terminal) as live:
        live.begins("train", "1")
        for step in range(1, 500):
            live.step(step, 500, np.zeros(500))
    assert terminal.file.getvalue().count("connected") < 10


def test_the_live_line_is_one_line(terminal):
    """Catches: a line that wraps, so that what is taken back is half of it."""
    with LiveLine(terminal) as live:
        live.begins("train", "1")
        live._show("x" * 400)
        assert "\n" not in last_line(terminal)
        assert last_line(terminal).endswith("\u2026")


def test_a_killed_node_leaves_a_cursor(terminal):
    """Catches: a terminal without a cursor after the second signal, which ends the process at once."""
    with LiveLine(terminal) as live:
        live.begins("train", "1")
        hidden, shown = (terminal.file.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
        assert -1 < hidden < shown


def test_the_live_line_leaves_the_streams_alone(terminal):
    """Catches: a redirected stderr that stays after an exception; a stdout that ends up on the terminal."""
    before = (sys.stdout, sys.stderr)

    def fail():
        assert sys.stdout is before[0]
        print("a warning of a library", file=sys.stderr)
        raise ValueError("in a round")

    with pytest.raises(ValueError, match="in a round"), LiveLine(terminal):
        fail()
    assert (sys.stdout, sys.stderr) == before
    assert "a warning of a library" in terminal.file.getvalue()


def test_a_log_gets_lines():
    """Catches: a status line in a file."""
    assert type(choose()) is Lines
