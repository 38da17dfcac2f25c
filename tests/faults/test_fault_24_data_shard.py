"""Fault 24: a site's data shard is wrong. Each case gives its code, with counts only."""

import pytest

from tsugiki.common.data.columns import Column
from tsugiki.common.data.shard import read
from tsugiki.common.errors import DataError
from tsugiki.common.settings import DataFormat

PRIVATE = "Patient Jane hf_abc"
GOOD = f"{PRIVATE},no\n{PRIVATE},yes\n"


def one_class(folder):
    """Two rows, one class."""
    (folder / "shard.csv").write_text(f"text,label\n{PRIVATE},no\n{PRIVATE},no\n")


def missing(folder):
    """No file."""


def empty(folder):
    """A header only."""
    (folder / "shard.csv").write_text("text,label\n")


def one_example(folder):
    """One row where two are asked for."""
    (folder / "shard.csv").write_text(f"text,label\n{PRIVATE},no\n")


def label_out_of_range(folder):
    """A third class of two; its name is private too."""
    (folder / "shard.csv").write_text(f"text,label\n{GOOD}{PRIVATE},{PRIVATE}\n")


def invalid_utf_8(folder):
    """A byte that no UTF-8 text has."""
    (folder / "shard.csv").write_bytes(f"text,label\n{GOOD}{PRIVATE}".encode() + b"\xff,no\n")


def line_of_10_mb(folder):
    """A line of 10 MB."""
    (folder / "shard.csv").write_text(f"text,label\n{GOOD}{PRIVATE * 550_000},no\n")


def symlink_out(folder):
    """A link to a good file elsewhere."""
    (folder.parent / "elsewhere.csv").write_text(f"text,label\n{GOOD}")
    (folder / "shard.csv").symlink_to(folder.parent / "elsewhere.csv")


FAULTS = {
    missing: "shard-missing",
    empty: "shard-empty",
    one_example: "shard-too-small",
    label_out_of_range: "shard-label-range",
    invalid_utf_8: "shard-encoding",
    line_of_10_mb: "shard-line-too-long",
    symlink_out: "shard-outside",
}


def read_shard(folder):
    """Read as a site would, with at least two rows."""
    columns = (Column("text", "text"), Column("label", "label"))
    return read(folder / "shard.csv", columns, DataFormat(), labels=("no", "yes"), min_rows=2, inside=folder)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_gives_its_code_and_no_text(tmp_path, fault):
    """Catches: another exception than DataError, a wrong code, and private text in the error or what it came from."""
    folder = tmp_path / "data"
    folder.mkdir()
    fault(folder)
    with pytest.raises(DataError) as caught:
        read_shard(folder)
    assert caught.value.code == FAULTS[fault]
    error = caught.value
    while error is not None:
        assert PRIVATE not in str(error)
        assert PRIVATE not in repr(error)
        error = error.__context__


def test_one_class_is_a_note(tmp_path):
    """Catches: a site of one class, which other sites complement, refused."""
    one_class(tmp_path)
    assert read_shard(tmp_path).notes == ("shard-one-class",)
