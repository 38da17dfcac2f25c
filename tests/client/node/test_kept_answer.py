"""The answer to the last request to train, on the disk."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tsugiki.client.node.kept_answer import KeptAnswer


def content(value=1.0):
    """Return the content of a reply with an update."""
    arrays = ArrayRecord({"update": Array(np.full(1000, value, np.float32))})
    return RecordDict({"reply": ConfigRecord({"site": "acme", "rows": 7}), "arrays": arrays})


def test_the_same_bytes_are_read(tmp_path):
    """Catches: a copy whose numbers, settings or order differ, which the server would take for another update."""
    written = content()
    KeptAnswer(tmp_path / "kept").keep("asked", written)
    read = KeptAnswer(tmp_path / "kept").read("asked")
    assert read.object_id == written.object_id
    assert read["arrays"]["update"].numpy().tolist() == [1.0] * 1000


def test_it_answers_its_own_request_only(tmp_path):
    """Catches: yesterday's update as the answer to today's round."""
    kept = KeptAnswer(tmp_path / "kept")
    kept.keep("asked", content())
    assert kept.read("another") is None
    kept.keep("another", content(2.0))
    assert kept.read("asked") is None
    kept.forget()
    kept.forget()
    assert kept.read("another") is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_nothing_is_kept():
    """Catches: a file in the current folder of a node that has none."""
    kept = KeptAnswer(None)
    kept.keep("asked", content())
    assert kept.read("asked") is None
    kept.forget()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header", "link"])
def test_a_damaged_file_is_no_answer(tmp_path, damage):
    """Catches: a traceback, or another update than was trained, from a disk that lost part of the file."""
    path = tmp_path / "kept"
    kept = KeptAnswer(path)
    kept.keep("asked", content())
    whole = path.read_bytes()
    path.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(whole)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        spoiled = bytearray(whole)
        spoiled[-100] ^= 1
        path.write_bytes(
            {"cut": whole[:-100], "flipped": bytes(spoiled), "empty": b"", "header": b"\xff" * 16 + whole}[damage]
        )
    assert kept.read("asked") is None


def test_a_full_disk_costs_the_copy_and_not_the_round(tmp_path, caplog):
    """Catches: a round that is lost because its copy cannot be written."""
    kept = KeptAnswer(tmp_path / "missing" / "kept")
    kept.keep("asked", content())
    assert "not kept" in caplog.text
    assert kept.read("asked") is None
