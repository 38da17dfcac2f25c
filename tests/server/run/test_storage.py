import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.processes import ROOT
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
        (folder / "config.toml").touch()
        assert code_of(lambda: enter(folder, resume=True)) == "locked"
    enter(folder, resume=True)


HOLD = """
import sys, time
from pathlib import Path
from tsugiki.server.run.storage import run_folder
with run_folder(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_seen_by_another_process_and_ends_with_it(tmp_path):
    """Catches: a lock inside one process only; a run that nobody can resume after a crash."""
    folder = tmp_path / "run"
    (enter(folder) / "config.toml").touch()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            assert code_of(lambda: enter(folder, resume=True)) == "locked"
        finally:
            holder.send_signal(signal.SIGKILL)
    enter(folder, resume=True)


def test_a_run_is_not_written_over_another(tmp_path):
    """Catches: a second run of the same name that mixes its files with the first's."""
    (enter(tmp_path / "run") / "config.toml").touch()
    for name, content in BEGUN.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        assert code_of(lambda: enter(tmp_path / "run")) == "run-exists", name
        path.unlink()
    enter(tmp_path / "run")
    (tmp_path / "run" / "config.toml").unlink()
    (tmp_path / "run" / "notes.txt").touch()  # somebody else's folder
    assert code_of(lambda: enter(tmp_path / "run")) == "run-exists"


BEGUN = {
    "checkpoint/round-000001-ab.safetensors": "",
    "checkpoint/current.json": "{}",
    "metrics.jsonl": '{"round": 1}\n',
    "summary.json": "{}",
}
"""Files of a run that has something to lose."""


@pytest.mark.parametrize("line", ['{"round": 0}\n', '{"round": 1, "voided": true}\n'])
def test_a_run_of_which_no_round_was_done_is_started_again(tmp_path, line):
    """Catches: a start that found no sites, after which neither the same command nor any other name is free."""
    folder = enter(tmp_path / "run")
    (folder / "config.toml").touch()
    (folder / "audit.jsonl").touch()
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "round-000000-ab.safetensors").touch()
    (folder / "metrics.jsonl").write_text(line)
    storage.clear_start(enter(folder))
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "audit.jsonl",
        "checkpoint",
        "config.toml",
    ]
    assert not list((folder / "checkpoint").iterdir())


def test_a_start_that_failed_early_does_not_take_the_name(tmp_path):
    """Catches: a run that can neither be started nor resumed, because an earlier start failed at, say, its model."""
    enter(tmp_path / "run")
    enter(tmp_path / "run")


def test_an_audit_before_the_run_does_not_take_the_name(tmp_path):
    """Catches: a run that is refused because its privacy was audited first, or an audit that hides a run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / storage.AUDIT_FILE).touch()
    enter(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert code_of(lambda: enter(tmp_path / "run")) == "run-exists"


def test_only_a_run_is_resumed(tmp_path):
    """Catches: a new run in an empty folder when an old one was meant."""
    assert code_of(lambda: enter(tmp_path / "run", resume=True)) == "run-missing"


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    """Catches: a NotADirectoryError."""
    (tmp_path / "run").touch()
    assert code_of(lambda: enter(tmp_path / "run")) == "not-writable"
    assert code_of(lambda: enter(tmp_path / "run" / "inner")) == "not-writable"


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "audit.jsonl", "checkpoint", "best"])
def test_a_run_folder_with_a_link_in_it_is_refused(tmp_path, name):
    """Catches: a run resumed over a link that somebody planted, and the files behind it changed."""
    folder = tmp_path / "run"
    (enter(folder) / "config.toml").touch()
    (folder / ".lock").unlink()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / name).symlink_to(victim)
    assert code_of(lambda: enter(folder, resume=True)) == "linked"
    assert victim.read_text() == "precious"


def test_a_linked_run_folder_is_refused(tmp_path):
    """Catches: a run written into the empty folder of somebody else."""
    (tmp_path / "target").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "target")
    assert code_of(lambda: enter(tmp_path / "run")) == "linked"
    assert list((tmp_path / "target").iterdir()) == []


def test_a_full_disk_is_noticed_before_the_start(tmp_path, monkeypatch):
    """Catches: a run that trains for hours and then cannot be saved."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=storage.LEAST_FREE_BYTES - 1))
    assert code_of(lambda: enter(tmp_path / "run")) == "disk-full"
