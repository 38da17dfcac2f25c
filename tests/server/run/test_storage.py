import fcntl
import shutil

import pytest

from tsugiki.common.errors import StorageError
from tsugiki.server.run import storage
from tsugiki.server.run.storage import run_folder


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
