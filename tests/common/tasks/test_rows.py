"""Token ids in flat arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsugiki.common.tasks.rows import TokenRows

ROWS = st.lists(st.lists(st.integers(0, 99_999), max_size=9), max_size=12)


@given(ROWS)
def test_rows_are_those_of_the_lists(lists):
    """Catches: a row that begins or ends one token off; empty rows lost; numbers narrowed."""
    rows = TokenRows.of(lists)
    assert len(rows) == len(lists)
    assert rows.lists() == lists
    assert [rows[at].tolist() for at in range(len(rows))] == lists
    assert rows.lengths().tolist() == [len(one) for one in lists]
    assert (rows.values.dtype, rows.offsets.dtype) == (np.int32, np.int64)


@given(ROWS.filter(len), st.data())
def test_take_returns_the_rows_asked_for(lists, data):
    """Catches: rows in the order of the file, a row that cannot be taken twice, tokens of a neighbour."""
    chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    taken = TokenRows.of(lists).take(chosen)
    assert taken.lists() == [lists[row] for row in chosen]
    assert taken.values.dtype == np.int32
    assert TokenRows.of(lists).take(range(1)).lists() == lists[:1]


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_parts_are_joined(parts):
    """Catches: offsets that begin anew in each part."""
    joined = TokenRows.joined([TokenRows.of(part) for part in parts])
    assert joined.lists() == [row for part in parts for row in part]


def test_rows_are_spread_among_empty_ones():
    """Catches: tokens that move to another row."""
    spread = TokenRows.of([[1, 2], [3]]).spread(np.array([1, 4]), 6)
    assert spread.lists() == [[], [1, 2], [], [], [3], []]
    assert spread.take([4, 1]).lists() == [[3], [1, 2]]


@pytest.mark.parametrize("row", [-1, 2, 9])
def test_no_row_beside_those_there_are(row):
    """Catches: row -1, whose two offsets are those of the end and of the first row: an empty row."""
    with pytest.raises(IndexError):
        TokenRows.of([[1], [2]])[row]


def test_a_row_is_a_view():
    """Catches: a copy of each row in each batch; memory of lists."""
    rows = TokenRows.of([[1, 2, 3]] * 1000)
    assert np.shares_memory(rows[5], rows.values)
    assert rows.values.nbytes + rows.offsets.nbytes <= 8 * 3000
