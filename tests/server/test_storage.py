import errno
import fcntl
import json
import os
import shutil

import pytest

from common.errors import StorageError
from server import storage
from server.storage import append_line, read_lines, run_folder, write_atomically


def failing(number):
    """Return a function that fails as the system does."""

    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


def code_of(action):
    """Return the code of the StorageError that an action raises."""
    with pytest.raises(StorageError) as caught:
        action()
    assert caught.value.exit_status == 5
    return caught.value.code


def enter(path, resume=False):
    """Open and close a run's folder."""
    with run_folder(path, resume=resume) as folder:
        return folder


def test_a_file_is_written_and_replaced(tmp_path):
    """Catches: content appended, or a temporary file left."""
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "disk-full"),
        (errno.EFBIG, "disk-full"),
        (errno.EROFS, "not-writable"),
        (errno.EIO, "not-writable"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, code):
    """Catches: a half-written file in the old one's place, and a temporary one that fills the full disk further."""
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(storage.os, "fsync", failing(number))
    assert code_of(lambda: write_atomically(tmp_path / "file", b"new")) == code
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Catches: a rename before the content was flushed, which a power cut turns into an empty file."""
    happened = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(storage.os, "fsync", lambda number: happened.append("sync") or sync(number))
    monkeypatch.setattr("pathlib.os.replace", lambda *paths: happened.append("rename") or replace(*paths))
    write_atomically(tmp_path / "file", b"x")
    assert happened == ["sync", "rename", "sync"]


def test_a_run_folder_is_made_and_locked(tmp_path):
    """Catches: a folder that is not there, or not held."""
    with run_folder(tmp_path / "a" / "b", resume=False) as folder:
        assert folder.is_dir()
        with (folder / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "config.toml").touch()
        assert code_of(lambda: enter(folder, resume=True)) == "locked"
    enter(folder, resume=True)


def test_a_run_is_not_written_over_another(tmp_path):
    """Catches: a second run of the same name that mixes its files with the first's."""
    (enter(tmp_path / "run") / "config.toml").touch()
    assert code_of(lambda: enter(tmp_path / "run")) == "run-exists"


def test_a_start_that_failed_early_does_not_take_the_name(tmp_path):
    """Catches: a run that can neither be started nor resumed, because an earlier start failed at, say, its model."""
    enter(tmp_path / "run")
    enter(tmp_path / "run")


def test_only_a_run_is_resumed(tmp_path):
    """Catches: a new run in an empty folder when an old one was meant."""
    assert code_of(lambda: enter(tmp_path / "run", resume=True)) == "run-missing"


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    """Catches: a NotADirectoryError."""
    (tmp_path / "run").touch()
    assert code_of(lambda: enter(tmp_path / "run")) == "not-writable"
    assert code_of(lambda: enter(tmp_path / "run" / "inner")) == "not-writable"


def test_a_full_disk_is_noticed_before_the_start(tmp_path, monkeypatch):
    """Catches: a run that trains for hours and then cannot be saved."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=storage.LEAST_FREE_BYTES - 1))
    assert code_of(lambda: enter(tmp_path / "run")) == "disk-full"


def test_lines_are_appended_and_read(tmp_path):
    """Catches: a line break inside a record that becomes two lines."""
    records = [{"a": 1}, {"b": "two\nlines"}]
    for record in records:
        append_line(tmp_path / "lines", record)
    assert read_lines(tmp_path / "lines") == records
    assert read_lines(tmp_path / "missing") == []


def test_a_cut_off_last_line_is_left_out_and_another_is_not(tmp_path):
    """Catches: a crash in the middle of a line that makes the file unreadable, and damage taken for a crash."""
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"b": ')
    assert read_lines(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    assert code_of(lambda: read_lines(path)) == "run-corrupt"


def test_a_line_that_cannot_be_appended_is_an_error(tmp_path, monkeypatch):
    """Catches: a record that is lost without a word."""
    monkeypatch.setattr(storage.os, "fsync", failing(errno.ENOSPC))
    assert code_of(lambda: append_line(tmp_path / "lines", {})) == "disk-full"
    assert code_of(lambda: append_line(tmp_path / "missing" / "lines", {})) == "not-writable"


def test_lines_are_strict_json(tmp_path):
    """Catches: an encoding that other readers do not take."""
    append_line(tmp_path / "lines", {"name": "Übung", "value": 0.1})
    assert (tmp_path / "lines").read_bytes().isascii()
    assert json.loads((tmp_path / "lines").read_text()) == {"name": "Übung", "value": 0.1}
