"""What a site's operator sees."""

import numpy as np
import pytest

from tsugiki.client.node.status import Lines, Live, choose, describe, size


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1_234, "1.2 kB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB")]
)
def test_sizes_are_for_people(count, shown):
    """Catches: powers of two called kB; a unit that is one too high."""
    assert size(count) == shown


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


def test_the_live_line_shows_step_loss_and_bytes(capsys):
    """Catches: a mean over steps that have not been taken; a line that is not taken back."""
    live = Live()
    live.begins("train", "2")
    live._shown = 0.0
    live.step(2, 4, np.array([0.5, 0.7, 0.0, 0.0]))
    shown = capsys.readouterr().err
    assert "round 2: training, step 2/4, loss 0.6000" in shown
    live.ends("train", "2", "done", 1.0, 1_000, 2_000)
    shown = capsys.readouterr().err
    assert "\r\x1b[K" in shown
    assert shown.endswith("connected | waiting | 1.0 kB received, 2.0 kB sent")


def test_few_refreshes(capsys):
    """Catches: a terminal that is written to at every step."""
    live = Live()
    live.begins("train", "1")
    for step in range(1, 500):
        live.step(step, 500, np.zeros(500))
    assert capsys.readouterr().err.count("\r") < 10


def test_a_log_gets_lines():
    """Catches: a status line in a file."""
    assert type(choose()) is Lines
