"""The order of a queue's files, and what becomes of those that fail; tests/e2e/test_queue.py runs it."""

import os
from pathlib import Path

import pytest

from tsugiki.common.errors import ConfigError, Interrupted, StorageError, UsageError
from tsugiki.server.deploy import queue
from tsugiki.server.deploy.queue import SETTLED_LOOKS, check_files, files_in, run_each
from tsugiki.server.engines.grid import Stop


class Looks(Stop):
    """A stop whose pauses take no time, and are counted; `happens` is called in each with its number."""

    def __init__(self, happens, most=50):
        super().__init__()
        self.count = 0
        self._happens = happens
        self._most = most

    def pause(self, seconds):
        """Let something happen; after `most` looks the user stops."""
        self.count += 1
        self._happens(self.count)
        if self.count >= self._most:
            self.request()
        self.check()


def write(path, text="[run]\n", moment=1_000):
    """Write a file as if at a given time."""
    path.write_text(text)
    os.utime(path, ns=(moment, moment))


def names(folder, happens, said=None):
    """Return the names of the files that a queue runs, with the look before which each began."""
    stop = Looks(happens)
    announce = print if said is None else said.append
    return [(path.name, stop.count) for path in files_in(folder, stop, announce)]


def test_files_are_run_in_the_order_of_their_names(tmp_path):
    """Catches: the order in which they came, or that of the disk; a file that is run twice."""
    for name in ("b.toml", "c.toml", "a.toml", "notes.txt", ".d.toml"):
        write(tmp_path / name)
    (tmp_path / "folder.toml").mkdir()
    found = names(tmp_path, lambda count: write(tmp_path / "0.toml") if count == 9 else None)
    assert [name for name, _ in found] == ["a.toml", "b.toml", "c.toml", "0.toml"]


def test_a_file_is_read_when_nobody_writes_it_any_more(tmp_path):
    """Catches: half a file that is taken for the whole, because half of it is TOML too."""

    def write_on(count):
        if count <= 6:
            write(tmp_path / "a.toml", "x = 1\n" * count, count)

    ((name, look),) = names(tmp_path, write_on)
    assert (name, look) == ("a.toml", 6 + SETTLED_LOOKS)


def test_a_file_that_was_mended_is_run_again(tmp_path):
    """Catches: a corrected file that waits until the server is started anew."""
    write(tmp_path / "a.toml")
    found = names(tmp_path, lambda count: write(tmp_path / "a.toml", "[run]\n", 2_000) if count == 10 else None)
    assert [name for name, _ in found] == ["a.toml", "a.toml"]


def test_the_operator_is_told_once_that_the_queue_waits(tmp_path):
    """Catches: a silent server, and one that says so every second."""
    said = []
    names(tmp_path, lambda count: None, said)
    assert said == [f"waiting for run files in {tmp_path}"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    """Catches: a server that waits for ever because of a mistyped name."""
    with pytest.raises(UsageError, match="no folder"):
        names(tmp_path / "nowhere", lambda count: None)


def test_a_file_that_vanishes_while_one_looks_does_not_end_the_queue(tmp_path, monkeypatch):
    """Catches: a FileNotFoundError, because an operator has taken a file out of the queue."""
    write(tmp_path / "a.toml")
    real = Path.is_file

    def gone(path):
        there = real(path)
        path.unlink(missing_ok=True)
        return there

    monkeypatch.setattr(queue.Path, "is_file", gone)
    assert names(tmp_path, lambda count: None) == []


def test_a_run_that_fails_is_named_and_the_next_one_runs():
    """Catches: a queue that ends with its first broken file, and a failure that nobody is told of."""
    ran, said = [], []

    def run(path):
        ran.append(path.name)
        if path.name == "b.toml":
            error = StorageError("the folder is there already", code="run-exists")
            error.add_note("This goes on")
            raise error

    errors = run_each([Path("a.toml"), Path("b.toml"), Path("c.toml")], run, Stop(), said.append)
    assert ran == ["a.toml", "b.toml", "c.toml"]
    assert [error.code for error in errors] == ["run-exists"]
    assert "queue: b.toml: run-exists: The folder is there already.\nThis goes on" in said
    assert said[-1] == "queue: c.toml is done"


def test_a_queue_that_is_stopped_begins_no_further_run():
    """Catches: a Ctrl-C that ends one run and starts the next one."""
    stop, ran = Stop(), []

    def run(path):
        ran.append(path)
        stop.request()
        stop.check()

    with pytest.raises(Interrupted):
        run_each([Path("a.toml"), Path("b.toml")], run, stop, print)
    assert ran == [Path("a.toml")]


def test_a_list_is_checked_before_its_first_run(tmp_path):
    """Catches: a mistake in the last file that is found days later; two runs of one name."""
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    write(first, '[run]\nname = "june"\n[strategy]\nname = "fedavg"\n')
    write(second, "[run]\nrounds = 0.5\n")
    with pytest.raises(ConfigError, match=r"b\.toml"):
        check_files([first, second], [])
    write(second, '[run]\nname = "june"\n')
    with pytest.raises(UsageError, match="are both of the run 'june'"):
        check_files([first, second], [])
    write(second, '[run]\nname = "july"\n')
    check_files([first, second], [])
