"""A run's logs are anchored in its checkpoints: a resumed run does not go on with a log that has lost lines."""

import json

import pytest

from tests.support.federation import run_tiny, tiny_config
from tests.support.private import LEDGER
from tsugiki.common.audit import verify
from tsugiki.common.errors import Interrupted, StorageError
from tsugiki.common.files import read_lines
from tsugiki.server.run import checkpoint, loop

CENTRAL = {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A private run of three rounds, stopped between the checkpoint and the line of its second."""
    config = tiny_config(tmp_path, run={"rounds": 3}, privacy=CENTRAL)
    finish = loop.finish_round

    def stop(ctx, state):
        if state.round == 2:
            raise Interrupted("stopped")
        return finish(ctx, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish_round", stop)
        with pytest.raises(Interrupted):
            run_tiny(config)
    return config, tmp_path / "runs" / "tiny"


def cut(path, lines=1):
    """Cut off the last lines of a file."""
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[: len(kept) - lines]))


def change(path):
    """Change a figure in the first line."""
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), "bytes_up": 1}), *others]) + "\n")


def test_what_was_written_after_the_checkpoint_may_lack(stopped):
    """Catches: an anchor that counts on a line which is written after the checkpoint: no killed run would resume."""
    config, folder = stopped
    anchors = checkpoint.read_anchors(folder / "checkpoint")
    assert anchors["metrics"]["lines"] == len(read_lines(folder / "metrics.jsonl")) == 2
    assert anchors["audit"]["lines"] == len(verify(folder / "audit.jsonl"))
    assert anchors["ledger"]["lines"] == len(verify(folder / LEDGER))
    assert run_tiny(config, resume=True).state.round == 3
    assert run_tiny(config, resume=True).state.round == 3  # a finished one, too


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("metrics.jsonl", cut, "metrics-behind"),
        ("metrics.jsonl", lambda path: path.unlink(), "metrics-behind"),
        ("metrics.jsonl", change, "metrics-behind"),
        ("audit.jsonl", cut, "audit-behind"),
        ("audit.jsonl", lambda path: path.unlink(), "audit-behind"),
        (LEDGER, cut, "ledger-behind"),
        (LEDGER, lambda path: path.unlink(), "ledger-behind"),
    ],
)
def test_a_log_that_has_lost_lines_is_not_continued(stopped, name, damage, expected):
    """Catches: rounds, rejections or charges that vanish from a run's records when it is resumed."""
    config, folder = stopped
    damage(folder / name)
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    with pytest.raises(StorageError) as caught:
        run_tiny(config, resume=True)
    assert caught.value.code == expected
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before


@pytest.mark.parametrize("previous", [False, True])
def test_the_last_line_of_a_finished_run_is_remembered_too(tmp_path, previous):
    """Catches: the last round's line, which no checkpoint knows; a run that cannot go back to the round before."""
    config = tiny_config(tmp_path)
    folder = run_tiny(config).folder
    assert run_tiny(config, resume=True, previous=previous).state.round == 2
    cut(folder / "metrics.jsonl")
    with pytest.raises(StorageError) as caught:
        run_tiny(config, resume=True)
    assert caught.value.code == "metrics-behind"


def test_a_checkpoint_without_anchors_is_resumed(stopped, monkeypatch):
    """Catches: runs of an earlier version that cannot be resumed."""
    config, folder = stopped
    read = checkpoint._read

    def without(path):
        body, tensors = read(path)
        return {name: value for name, value in body.items() if name != "anchors"}, tensors

    monkeypatch.setattr(checkpoint, "_read", without)
    (folder / "metrics.jsonl").unlink()
    assert run_tiny(config, resume=True).state.round == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("metrics.jsonl", "metrics-behind"), ("audit.jsonl", "audit-behind"), (LEDGER, "ledger-behind")],
)
def test_a_log_that_is_moved_away_in_mid_run_ends_the_run(tmp_path, monkeypatch, name, expected):
    """Catches: a chain that begins anew in the middle of a run, and a checkpoint that remembers only the new one."""
    config = tiny_config(tmp_path, run={"rounds": 3}, privacy=CENTRAL)
    finish = loop.finish_round

    def lose(ctx, state):
        state = finish(ctx, state)
        if state.round == 1:
            (ctx.folder / name).unlink()
        return state

    monkeypatch.setattr(loop, "finish_round", lose)
    with pytest.raises(StorageError) as caught:
        run_tiny(config)
    assert caught.value.code == expected
