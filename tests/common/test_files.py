import errno
import json
import math
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tsugiki.common import files
from tsugiki.common.errors import StorageError
from tsugiki.common.files import (
    append_line,
    cut_file,
    locked,
    make_folder,
    read_json,
    read_lines,
    to_json,
    write_atomically,
)

SIDES = ("common", "client", "server")


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
    monkeypatch.setattr(files.os, "fsync", failing(number))
    assert code_of(lambda: write_atomically(tmp_path / "file", b"new")) == code
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Catches: a rename before the content was flushed, which a power cut turns into an empty file."""
    happened = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: happened.append("sync") or sync(number))
    monkeypatch.setattr("pathlib.os.replace", lambda *paths: happened.append("rename") or replace(*paths))
    write_atomically(tmp_path / "file", b"x")
    assert happened == ["sync", "rename", "sync"]


def test_a_new_file_of_lines_has_its_name_on_the_disk(tmp_path, monkeypatch):
    """Catches: a first line that is on the disk under no name: a power cut loses the file of a charge or a count."""
    flushed = []
    sync = os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda number: flushed.append(os.fstat(number).st_ino) or sync(number))
    append_line(tmp_path / "lines", {"a": 1})
    assert flushed == [(tmp_path / "lines").stat().st_ino, tmp_path.stat().st_ino]
    append_line(tmp_path / "lines", {"b": 2})
    assert len(flushed) == 3


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


@pytest.mark.parametrize("line", ["3", "null", "[]", '"text"', "[" * 100_000])
def test_a_line_that_is_no_record_is_damage(tmp_path, line):
    """Catches: a traceback instead of a code, for a log whose line is JSON and no object."""
    path = tmp_path / "lines"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    assert code_of(lambda: read_lines(path)) == "run-corrupt"


def test_a_line_that_cannot_be_appended_is_an_error(tmp_path, monkeypatch):
    """Catches: a record that is lost without a word."""
    monkeypatch.setattr(files.os, "fsync", failing(errno.ENOSPC))
    assert code_of(lambda: append_line(tmp_path / "lines", {})) == "disk-full"
    assert code_of(lambda: append_line(tmp_path / "missing" / "lines", {})) == "not-writable"


def test_lines_are_strict_json(tmp_path):
    """Catches: an encoding that other readers do not take."""
    append_line(tmp_path / "lines", {"name": "Übung", "value": 0.1})
    assert (tmp_path / "lines").read_bytes().isascii()
    assert json.loads((tmp_path / "lines").read_text()) == {"name": "Übung", "value": 0.1}


def test_what_commands_print_and_remember_is_written_in_one_place():
    """Catches: a second way of writing JSON, in which an infinite epsilon is no JSON."""
    root = Path(__file__).resolve().parents[2]
    paths = [
        path for side in ("server/commands", "server/deploy", "client/site") for path in (root / side).glob("*.py")
    ]
    assert len(paths) > 15
    writes = [path.name for path in paths if "json.dumps" in path.read_text("utf-8")]
    # two hashes, and the rows of a file for people
    assert sorted(writes) == ["approvals.py", "site.py", "split.py"]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    """Catches: NaN and Infinity in a file, which strict readers refuse; only the outermost ones replaced."""
    record = {"loss": math.inf, "sites": {"a": [1.5, -math.inf], "b": (math.nan, 10**400)}, "ok": True, "none": None}
    expected = {"loss": None, "sites": {"a": [1.5, None], "b": [None, 10**400]}, "ok": True, "none": None}
    append_line(tmp_path / "lines", record)
    assert read_lines(tmp_path / "lines") == [json.loads(to_json(record, indent=1))] == [expected]


@pytest.mark.parametrize(
    "line", [b'{"a": "\xff"}', b"\xff", b'{"a": "\xc3"}', "{}".encode("utf-16"), b"[]", b"1", b"null", b"[" * 100_000]
)
def test_a_line_that_is_no_object_is_corrupt(tmp_path, line):
    """Catches: a decoder's own exception for a byte that is no UTF-8, or a list where an object is looked into."""
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n' + line + b"\n")
    assert code_of(lambda: read_lines(tmp_path / "lines")) == "run-corrupt"


@pytest.mark.parametrize("content", [b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_a_file_without_an_object_is_corrupt(tmp_path, content):
    """Catches: a decoder's own exception instead of ours; a list or a number that passes for an object."""
    (tmp_path / "file").write_bytes(content)
    assert code_of(lambda: read_json(tmp_path / "file")) == "run-corrupt"
    (tmp_path / "file").write_bytes(b'{"a": 1}')
    assert read_json(tmp_path / "file") == {"a": 1}


def test_a_lock_keeps_others_out_until_it_is_free(tmp_path):
    """Catches: a lock that two hold at once; one that is not waited for, or not released after an error."""
    path = tmp_path / ".lock"
    entered = []

    def enter():
        with locked(path):
            entered.append("second")

    second = threading.Thread(target=enter)
    with suppress(KeyError), locked(path):
        second.start()
        second.join(timeout=0.2)
        entered.append("first")
        raise KeyError
    second.join(timeout=10)
    assert entered == ["first", "second"]
    with locked(path, wait=False):
        assert code_of(lambda: locked(path, wait=False).__enter__()) == "locked"


def test_a_lock_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    """Catches: an OSError's traceback; a folder that has vanished and comes back empty, with the lock alone in it."""
    gone = tmp_path / "gone"
    assert code_of(lambda: locked(gone / ".lock").__enter__()) == "not-writable"
    assert not gone.exists()
    monkeypatch.setattr(Path, "stat", failing(errno.ENOSPC))
    assert code_of(lambda: locked(tmp_path / ".lock").__enter__()) == "disk-full"


LINKS = {"symbolic": os.symlink, "hard": os.link}


@pytest.fixture
def victim(tmp_path):
    """A file of somebody else, to which a planted link leads."""
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("link", LINKS)
def test_a_temporary_file_is_not_written_through_a_link(tmp_path, victim, link):
    """Catches: a link planted under the temporary name, whose target is emptied and filled."""
    LINKS[link](victim, tmp_path / ".file.tmp")
    write_atomically(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / ".file.tmp").exists()


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "audit.jsonl", "privacy-ledger.jsonl"])
def test_no_line_is_appended_through_a_link(tmp_path, victim, link, name):
    """Catches: a log that grows in somebody else's file."""
    LINKS[link](victim, tmp_path / name)
    assert code_of(lambda: append_line(tmp_path / name, {})) == "linked"
    assert victim.read_text() == "precious"


def test_no_line_is_appended_through_a_link_that_leads_nowhere(tmp_path):
    """Catches: a file that appears wherever the link's maker wants one."""
    (tmp_path / "lines").symlink_to(tmp_path / "elsewhere")
    assert code_of(lambda: append_line(tmp_path / "lines", {})) == "linked"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
def test_a_pipe_in_a_logs_place_is_refused_at_once(tmp_path):
    """Catches: a run that waits for ever until somebody reads the pipe; lines that go to the reader."""
    os.mkfifo(tmp_path / "lines")
    assert code_of(lambda: append_line(tmp_path / "lines", {})) == "not-writable"
    reader = os.open(tmp_path / "lines", os.O_RDONLY | os.O_NONBLOCK)
    assert code_of(lambda: append_line(tmp_path / "lines", {})) == "linked"
    os.close(reader)


@pytest.mark.parametrize("link", LINKS)
def test_no_file_is_cut_through_a_link(tmp_path, victim, link):
    """Catches: the repair of a log's last line that empties somebody else's file."""
    LINKS[link](victim, tmp_path / "log")
    assert code_of(lambda: cut_file(tmp_path / "log", 0)) == "linked"
    assert victim.read_text() == "precious"


def test_a_linked_lock_is_refused(tmp_path, victim):
    """Catches: a lock file opened through a link, which empties the target; one whose code says nothing of a link."""
    (tmp_path / ".lock").symlink_to(victim)
    assert code_of(lambda: locked(tmp_path / ".lock").__enter__()) == "linked"
    assert victim.read_text() == "precious"


def test_a_linked_folder_is_refused_and_one_above_it_is_not(tmp_path):
    """Catches: files written and deleted behind a link; an output folder on another disk refused."""
    (tmp_path / "target").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "target")
    assert code_of(lambda: make_folder(tmp_path / "linked")) == "linked"
    make_folder(tmp_path / "linked" / "inner")
    make_folder(tmp_path / "linked" / "inner")
    assert (tmp_path / "target" / "inner").is_dir()
    assert code_of(lambda: make_folder(tmp_path / "gone" / "inner")) == "not-writable"
    make_folder(tmp_path / "gone" / "inner", parents=True)


WRITES = re.compile(
    r"""\.write_text\(|\.write_bytes\(|open\([^)\n]*["'](?:w|a|r\+)b?\+?["']|os\.open\(|os\.truncate\(|\.touch\("""
    r"""|np\.save|save_file\(|torch\.save|TemporaryFile\(|shutil\.copy"""
)
IN_A_NEW_FOLDER = "its folder was made by the same command under a name that did not exist"
NAMELESS = "`tempfile` makes it under a name that did not exist"
ELSEWHERE = {
    "client/site/split.py": IN_A_NEW_FOLDER,
    "common/data/images.py": IN_A_NEW_FOLDER,
    "common/adapters/own_base.py": IN_A_NEW_FOLDER,
    "common/model/exported.py": IN_A_NEW_FOLDER,
    "server/export/check.py": IN_A_NEW_FOLDER,
    "server/export/export.py": IN_A_NEW_FOLDER,
    "server/export/probe.py": IN_A_NEW_FOLDER,
    "server/run/kept.py": NAMELESS,
    "server/run/warm_head.py": NAMELESS,
}
"""Modules that open a file for writing themselves, and why no link can be in its place."""


def test_files_are_opened_for_writing_in_one_module():
    """Catches: a new file of a run that is written through whatever link is in its place."""
    modules = {path.relative_to(ROOT).as_posix(): path for name in SIDES for path in (ROOT / name).rglob("*.py")}
    assert "common/files.py" in modules
    assert WRITES.search(modules["common/files.py"].read_text("utf-8"))
    writing = {name for name, path in modules.items() if WRITES.search(path.read_text("utf-8"))}
    assert writing - {"common/files.py"} == set(ELSEWHERE)


def test_no_module_needs_unix():
    """Catches: a site that cannot start on Windows, because a module it imports exists on Unix only."""
    modules = [path for name in SIDES for path in (ROOT / name).rglob("*.py")]
    assert modules
    unix = re.compile(r"^\s*(import|from) (fcntl|termios|pwd|grp|resource)\b", re.MULTILINE)
    assert [path for path in modules if unix.search(path.read_text("utf-8"))] == []
