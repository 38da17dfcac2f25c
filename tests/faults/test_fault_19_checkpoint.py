"""Fault 19: a checkpoint that is truncated, has a flipped bit, belongs to another run, or is of a newer version."""

import json

import numpy as np
import pytest

from tests.support.toy import SPEC, federate, toy_app, toy_config
from tsugiki.common.errors import StorageError
from tsugiki.server.run import checkpoint
from tsugiki.server.run.checkpoint import State

CONFIG = {"train.learning_rate": 0.01, "train.optimizer": "adamw"}


@pytest.fixture
def folder(tmp_path):
    """The checkpoints of two rounds."""
    for number in (1, 2):
        vector = np.linspace(0, number, SPEC.size, dtype=np.float32)
        state = State(vector, number, number - 1, 0.5, number, 0, {"m_t": np.ones(4)}, {"round": number})
        checkpoint.save(tmp_path, state, CONFIG, SPEC.sha256)
    return tmp_path


def newest(folder):
    """Return the file of the newest checkpoint."""
    return sorted(folder.glob("round-*.safetensors"))[-1]


def refusal(folder):
    """Return the error with which the newest checkpoint is refused."""
    with pytest.raises(StorageError) as caught:
        checkpoint.load(folder, CONFIG, SPEC.sha256)
    assert caught.value.exit_status == 5
    return caught.value


def test_no_truncation_goes_unnoticed(folder):
    """Catches: a file that still parses without its end."""
    path = newest(folder)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        error = refusal(folder)
        assert error.code == "checkpoint-corrupt"
        assert str(path) in str(error)
    path.write_bytes(whole)
    assert checkpoint.load(folder, CONFIG, SPEC.sha256).round == 2


def test_no_flipped_bit_goes_unnoticed(folder):
    """Catches: a part of the file that no hash covers; only a flipped format may look like a newer one."""
    path = newest(folder)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert refusal(folder).code in ("checkpoint-corrupt", "checkpoint-newer"), place


def test_nothing_can_be_added_unnoticed(folder):
    """Catches: bytes after the last tensor, which a reader of tensors may pass over."""
    path = newest(folder)
    path.write_bytes(path.read_bytes() + b"x")
    assert refusal(folder).code == "checkpoint-corrupt"


def test_a_damaged_checkpoint_names_file_and_field_and_what_to_do(folder):
    """Catches: a message that leaves the operator alone."""
    path = newest(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert f"{path} is damaged: the hash of strategy.m_t" in str(refusal(folder))
    assert "--previous" in str(refusal(folder))
    path.write_bytes(whole.replace(b'\\"round\\": 2', b'\\"round\\": 7'))
    assert f"{path} is damaged: the hash of its header" in str(refusal(folder))


@pytest.mark.parametrize(
    "header", ["[]", "{}", "null", '{"__metadata__": {"checkpoint": "{}"}}', "[" * 100_000, '{"__metadata__": []}']
)
def test_another_file_in_the_checkpoints_place_is_refused(folder, header):
    """Catches: a KeyError, TypeError or RecursionError for a file of that name that is no checkpoint."""
    newest(folder).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert refusal(folder).code == "checkpoint-corrupt"


def test_another_version_is_told_from_damage(folder):
    """Catches: another format read as if it were ours, and an operator told to go back a round instead of updating."""
    path = newest(folder)
    whole = path.read_bytes()
    now = f'\\"format\\": {checkpoint.FORMAT_VERSION}'.encode()
    assert now in whole
    path.write_bytes(whole.replace(now, b'\\"format\\": 9'))
    error = refusal(folder)
    assert error.code == "checkpoint-newer"
    assert "update Tsugiki" in str(error)
    path.write_bytes(whole.replace(now, b'\\"format\\": 1'))
    error = refusal(folder)
    assert error.code == "checkpoint-older"
    assert "the version of Tsugiki that started the run" in str(error)


def test_a_checkpoint_of_the_version_before_is_refused_with_what_to_do(tmp_path):
    """Catches: a run of version 0.3 that is taken for one without a checkpoint, and started anew over its lines."""
    from safetensors.numpy import save_file

    save_file({"vector": np.zeros(4, np.float32)}, tmp_path / "round-000002-0123abcd.safetensors")
    (tmp_path / "current.json").write_text(json.dumps({"format": 2, "tensors": "round-000002-0123abcd.safetensors"}))
    assert checkpoint.exists(tmp_path)
    error = refusal(tmp_path)
    assert error.code == "checkpoint-older"
    assert "the version of Tsugiki that started the run" in str(error)
    with pytest.raises(StorageError) as caught:
        checkpoint.promote_previous(tmp_path)
    assert caught.value.code == "checkpoint-older"


def test_another_runs_checkpoint_is_refused_with_both_values(folder):
    """Catches: a run that goes on with other settings or another base, and a refusal that does not say which."""
    other = {**CONFIG, "train.learning_rate": 0.1, "train.momentum": 0.5}
    told = "train.learning_rate was 0.01, is 0.1, train.momentum was not set, is 0.5."
    for settings, spec, words in ((other, SPEC.sha256, told), (CONFIG, "e" * 64, "eeeeeeeeeeee")):
        with pytest.raises(StorageError) as caught:
            checkpoint.load(folder, settings, spec)
        assert caught.value.code == "checkpoint-foreign"
        assert words in str(caught.value)


def test_a_run_does_not_fall_back_unless_it_is_told_to(tmp_path, monkeypatch):
    """Catches: a silent fall-back; and one that is asked for that does not end with the same bytes."""

    def update(site, round_, received):
        return np.full(SPEC.size, 0.25 * round_, np.float32)

    def run(folder, **options):
        return federate(monkeypatch, toy_app(["a", "b"], update), 2, toy_config(folder), **options)

    whole, damaged = run(tmp_path / "whole"), run(tmp_path / "damaged")
    newest(damaged.folder / "checkpoint").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        run(tmp_path / "damaged", resume=True)
    assert caught.value.code == "checkpoint-corrupt"
    checkpoint.promote_previous(damaged.folder / "checkpoint")
    resumed = run(tmp_path / "damaged", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_other_settings_do_not_resume_a_run(tmp_path, monkeypatch):
    """Catches: a run whose second half has another learning rate."""
    app = toy_app(["a", "b"])
    federate(monkeypatch, app, 2, toy_config(tmp_path))
    with pytest.raises(StorageError) as caught:
        federate(monkeypatch, app, 2, toy_config(tmp_path, train={"learning_rate": 0.5}), resume=True)
    assert caught.value.code == "checkpoint-foreign"
    ours = (tmp_path / "toy" / "config.toml").read_text()
    assert "learning_rate = 0.5" not in ours
