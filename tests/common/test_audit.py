import json
import os

import pytest

from tsugiki.common import audit
from tsugiki.common.audit import Anchor, AuditLog, verify
from tsugiki.common.errors import StorageError


@pytest.fixture
def path(tmp_path):
    """A log of four events."""
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(4):
        log.write("event", number=number)
    return tmp_path / "audit.jsonl"


def broken_at(path):
    """Return the line at which the chain is reported to break."""
    with pytest.raises(StorageError) as caught:
        verify(path)
    assert caught.value.code == "audit-broken"
    return int(str(caught.value).split("Line ")[1].split()[0])


def test_events_are_numbered_dated_and_in_order(path):
    """Catches: details lost, and times without a zone."""
    events = verify(path)
    assert [(event["sequence"], event["event"], event["number"]) for event in events] == [
        (number, "event", number) for number in range(4)
    ]
    assert all(event["time"].endswith("+00:00") for event in events)


def edit(path, change):
    """Change the lines of a log."""
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: lines.__setitem__(1, lines[1].replace('"number": 1', '"number": 9')), 2),
        (lambda lines: lines.pop(1), 2),
        (lambda lines: lines.pop(0), 1),
        (lambda lines: lines.insert(2, lines[1]), 3),
        (lambda lines: lines.reverse(), 1),
        (lambda lines: lines.__setitem__(2, '{"sequence": 2, "event": "made up"}'), 3),
    ],
)
def test_a_changed_log_is_found_out_at_the_first_wrong_line(path, change, line):
    """Catches: a hash that leaves out a field, the number or the link to the line before."""
    edit(path, change)
    assert broken_at(path) == line


def test_a_line_made_anew_breaks_the_next(path):
    """Catches: hashes that do not depend on the lines before: an editor who computes them anew would go unnoticed."""
    import hashlib

    def forge(lines):
        record = {key: value for key, value in json.loads(lines[1]).items() if key != "hash"} | {"number": 9}
        record["hash"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        lines[1] = json.dumps(record)

    edit(path, forge)
    assert broken_at(path) == 3


def test_a_log_is_continued(path):
    """Catches: a chain that starts anew when a run is resumed."""
    AuditLog(path).write("resumed")
    assert [event["sequence"] for event in verify(path)] == [0, 1, 2, 3, 4]


def test_a_broken_log_is_not_continued(path):
    """Catches: a chain that is whole from here on over lines that are not."""
    edit(path, lambda lines: lines.pop(0))
    with pytest.raises(StorageError):
        AuditLog(path)


@pytest.mark.parametrize("whole", [0, 2])
def test_after_a_crash_in_the_middle_of_a_line_the_log_goes_on(tmp_path, path, whole):
    """Catches: a new line glued to the cut-off one, also where that was the first."""
    lines = path.read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:whole]) + lines[whole][:30])
    AuditLog(cut).write("resumed")
    assert [event["event"] for event in verify(cut)] == ["event"] * whole + ["resumed"]


def test_a_value_cannot_forge_a_line(path):
    """Catches: a site's text written as it is: a line break in it would start a record of its own."""
    forged = 'x"}\n{"sequence": 5, "event": "finished"}\n\x1b[31m\u2028'
    AuditLog(path).write("hello", site=forged)
    events = verify(path)
    assert len(events) == 5
    assert events[-1]["site"] == forged
    assert len(path.read_text().splitlines()) == 5
    assert b"\x1b" not in path.read_bytes()


def flushes(monkeypatch):
    """Return a list that grows with every flush to the disk."""
    found = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: found.append(descriptor) or real(descriptor))
    return found


def test_many_events_are_flushed_once(path, monkeypatch):
    """Catches: a flush for each of ten thousand hellos, and a batch that does not continue the chain."""
    log = AuditLog(path)
    found = flushes(monkeypatch)
    log.write_all(("hello", {"site": f"site-{number}"}) for number in range(50))
    assert len(found) == 1
    log.write("round")
    assert len(found) == 2
    events = verify(path)
    assert [event["sequence"] for event in events] == list(range(55))
    assert [event["site"] for event in events[4:54]] == [f"site-{number}" for number in range(50)]


def test_a_batch_that_fails_is_no_part_of_the_chain(path, monkeypatch):
    """Catches: numbers and hashes that go on from events which are not on the disk."""
    log = AuditLog(path)

    def fail(*arguments):
        raise StorageError("no disk", code="disk-full")

    with monkeypatch.context() as patch:
        patch.setattr("tsugiki.common.audit.append_lines", fail)
        with pytest.raises(StorageError):
            log.write_all([("one", {}), ("two", {})])
    log.write("three")
    assert [event["event"] for event in verify(path)][4:] == ["three"]


def test_each_line_is_verified_once(path, monkeypatch):
    """Catches: a log that is read and hashed again from its start for each event."""
    log = AuditLog(path)
    hashed = []
    real = audit._hash
    monkeypatch.setattr(audit, "_hash", lambda body: hashed.append(body) or real(body))
    for number in range(5):
        log.write("event", number=number)
    assert len(hashed) == 5


def test_two_processes_share_a_log(path):
    """Catches: a log that does not know what the other process has written, and forks the chain."""
    one, other = AuditLog(path), AuditLog(path)
    for number in range(3):
        one.write("one", number=number)
        other.write("other", number=number)
    assert [event["event"] for event in verify(path)][4:] == ["one", "other"] * 3


def test_what_another_process_writes_is_verified(path):
    """Catches: a chain continued from a line that does not follow from the one before it."""
    log = AuditLog(path)
    with path.open("a") as file:
        file.write('{"sequence": 4, "event": "made up", "previous": "0", "hash": "0"}\n')
    with pytest.raises(StorageError) as caught:
        log.write("event")
    assert caught.value.code == "audit-broken"


@pytest.mark.parametrize("lines", [None, 2], ids=["moved away", "cut off"])
def test_a_log_that_became_shorter_is_read_anew(path, lines):
    """Catches: a chain that goes on from lines that are in another file now."""
    log = AuditLog(path)
    whole = path.read_text().splitlines(keepends=True)
    path.unlink()
    if lines:
        path.write_text("".join(whole[:lines]))
    log.write("event")
    assert [event["sequence"] for event in verify(path)] == list(range((lines or 0) + 1))


def test_a_byte_that_is_no_text_is_an_error_with_a_code(path):
    """Catches: a UnicodeDecodeError's traceback at the start of a run, from one damaged byte in its log."""
    log = AuditLog(path)
    log.write("first")
    log.write("second")
    content = bytearray(path.read_bytes())
    content[10] = 0x80
    path.write_bytes(content)
    for read in (verify, AuditLog):
        with pytest.raises(StorageError) as caught:
            read(path)
        assert caught.value.code == "run-corrupt"


def test_a_log_is_neither_continued_nor_repaired_through_a_link(tmp_path, path):
    """Catches: a link in the log's place, and the one line of somebody's file taken for a cut-off one and removed."""
    path.unlink(missing_ok=True)
    victim = tmp_path / "victim"
    victim.write_text("no line break at the end")
    path.symlink_to(victim)
    with pytest.raises(StorageError) as caught:
        AuditLog(path).write("joined")
    assert caught.value.code == "linked"
    assert victim.read_text() == "no line break at the end"


def test_a_line_that_another_process_left_unfinished_is_removed(path):
    """Catches: a new event glued to half a line of a process that was killed."""
    log = AuditLog(path)
    with path.open("a") as file:
        file.write('{"sequence": 4, "ev')
    log.write("event")
    assert [event["sequence"] for event in verify(path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("lines", "number", "expected"), [(0, 3, True), (2, 3, True), (3, 2, False), (-1, 2, False), (-9, 1, False)]
)
def test_an_anchor_is_a_number_of_first_lines(path, lines, number, expected):
    """Catches: a number below zero, which counts from the end, or an IndexError for one that is far below it."""
    path.unlink(missing_ok=True)
    log = AuditLog(path)
    for event in ("one", "two", "three")[:number]:
        log.write(event)
    records = verify(path)
    assert (
        Anchor(lines, records[lines - 1]["hash"] if 0 < lines <= number else records[-1]["hash"]).holds(records)
        == expected
    )
