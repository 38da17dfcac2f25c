"""Splits: every row once, the same for a seed, as skewed as asked for."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.common.data.partition import by_column, dirichlet, iid, site_names
from tsugiki.common.errors import DataError
from tsugiki.common.rng import generator
from tsugiki.common.settings import NAME_PATTERN

STEADY = settings(deadline=None, derandomize=True)


def holds_every_row_once(parts, rows):
    """Whether the parts are ascending and together hold 0 to rows - 1."""
    ascending = all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    return ascending and sorted(np.concatenate(parts).tolist()) == list(range(rows))


@STEADY
@given(rows=st.integers(1, 200), clients=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_iid_is_even_and_complete(rows, clients, seed):
    """Catches: the remainder dropped, or all of it in the last part."""
    if clients > rows:
        with pytest.raises(DataError, match=f"lower clients to {rows} or fewer"):
            iid(rows, clients, seed)
        return
    parts = iid(rows, clients, seed)
    assert holds_every_row_once(parts, rows)
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1


def test_iid_depends_on_the_seed_alone():
    """Catches: blocks of the file in the place of a random split, and a global generator."""
    first, again, other = (iid(100, 3, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0], np.arange(34))


@STEADY
@given(
    labels=st.lists(st.integers(0, 4), min_size=60, max_size=150),
    clients=st.integers(1, 4),
    alpha=st.floats(1.0, 1e6),
    min_rows=st.integers(0, 8),
)
def test_dirichlet_is_complete_and_keeps_the_least(labels, clients, alpha, min_rows):
    """Catches: rows lost between the cuts, empty parts, and the first draw returned though it is too uneven."""
    parts = dirichlet(labels, clients, alpha, min_rows, 7)
    assert len(parts) == clients
    assert holds_every_row_once(parts, len(labels))
    assert min(len(part) for part in parts) >= max(min_rows, 1)


def test_dirichlet_draws_the_shares_of_each_class():
    """Catches: shares drawn once for all classes, for each client, or with another alpha. The formula spelled out."""
    labels = ["b"] * 300 + ["a"] * 500
    parts = dirichlet(labels, 4, 0.5, 1, 3)
    shares = generator(3, "partition", "dirichlet", "shares")
    for rows in (range(300, 800), range(300)):
        ends = np.floor(np.cumsum(shares.dirichlet([0.5] * 4)) * len(rows))
        expected = np.diff([0, *ends[:3], len(rows)])
        assert [np.isin(part, rows).sum() for part in parts] == expected.tolist()


def test_alpha_sets_the_skew():
    """Catches: alpha inverted or ignored."""
    labels = np.arange(2000) % 4

    def largest_share(alpha):
        parts = dirichlet(labels, 4, alpha, 1, 0)
        return np.mean([np.bincount(labels[part], minlength=4).max() / len(part) for part in parts])

    assert largest_share(0.05) > 0.7
    assert largest_share(1e4) < 0.3


def test_dirichlet_depends_on_the_seed_alone_and_deals_at_random():
    """Catches: a global generator, and a class cut in the order of the file, which sorts clients by time."""
    first, again, other = (dirichlet([0] * 200, 3, 5.0, 1, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert np.diff(first[0]).max() > 1


def test_dirichlet_gives_up_with_numbers():
    """Catches: an endless redraw, or advice without the values to change."""
    with pytest.raises(DataError, match=r"100 draws with alpha = 0\.001 .* 10 clients") as caught:
        dirichlet([0, 1] * 100, 10, 0.001, 5, 0)
    assert "raise alpha" in caught.value.hint


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_alpha_out_of_range(alpha):
    """Catches: NaN, which compares false, and values where NumPy's shares sum to 0."""
    with pytest.raises(DataError, match="alpha"):
        dirichlet([0, 1], 1, alpha, 1, 0)


@pytest.mark.parametrize(("clients", "min_rows"), [(0, 1), (-1, 1), (11, 0), (3, 4)])
def test_contradictory_requests(clients, min_rows):
    """Catches: a hundred draws, or a ValueError of NumPy, for what can never be met."""
    with pytest.raises(DataError, match=r"10 rows are too few for|clients = ") as caught:
        dirichlet([0, 1] * 5, clients, 1.0, min_rows, 0)
    assert caught.value.code == "shard-partition"
    with pytest.raises(DataError, match="clients"):
        iid(10, clients if clients < 1 else 11, 0)


@STEADY
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip))
def test_by_column_names_are_safe(value):
    """Catches: separators, dots in front, or nothing at all in what becomes a folder's name."""
    (name,) = by_column([value, value])
    assert re.fullmatch(NAME_PATTERN, name)
    assert not name.endswith("\n")


@STEADY
@given(st.lists(st.sampled_from(["b", "A", "c 1", "c/2", "é"]), min_size=1))
def test_by_column_is_complete_and_sorted(values):
    """Catches: rows lost or mixed, and parts in the order of the file, which a new file would change."""
    parts = by_column(values)
    assert list(parts) == sorted(parts)
    assert holds_every_row_once(list(parts.values()), len(values))
    assert all(len({values[row] for row in part}) == 1 for part in parts.values())


def test_by_column_groups_and_names():
    """Catches: a value's rows split, accents lost with their letter, and two foreign names taken for one."""
    assert list(by_column(["x" * 100])) == ["x" * 64]
    parts = by_column(["Zürich", "../etc", "Zürich", "東京", "大阪", "東京"])
    assert {name: part.tolist() for name, part in parts.items() if not name.startswith("group-")} == {
        "etc": [1],
        "zurich": [0, 2],
    }
    assert sorted(part.tolist() for name, part in parts.items() if name.startswith("group-")) == [[3, 5], [4]]


@pytest.mark.parametrize(
    ("values", "where"),
    [(["Ward Jane", "x", "ward-jane"], "rows 1 and 3"), (["a", " ", ""], "2 rows .* row 2")],
)
def test_by_column_refuses_by_row_number(values, where):
    """Catches: two values merged into one site, and a value repeated in the message."""
    with pytest.raises(DataError, match=where) as caught:
        by_column(values)
    assert caught.value.code == "shard-partition"
    assert "jane" not in repr(caught.value).lower()


def test_by_column_has_a_limit():
    """Catches: a site for each row of a column of texts."""
    assert len(by_column([str(number) for number in range(1000)])) == 1000
    with pytest.raises(DataError, match="1001 values"):
        by_column([str(number) for number in range(1001)])


@pytest.mark.parametrize(("count", "last"), [(1, "site-0"), (10, "site-9"), (11, "site-10"), (101, "site-100")])
def test_site_names_sort_by_number(count, last):
    """Catches: site-10 before site-2, and a digit too many for round counts."""
    names = site_names(count)
    assert len(names) == count
    assert names[-1] == last
    assert names == sorted(names)
    assert len(set(map(len, names))) == 1
