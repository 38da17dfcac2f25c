"""How many sites a sum takes when each may bring several clients."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.secagg.counts import check_sum, counted_on, fewest_sites


@pytest.mark.parametrize(
    ("counts", "least", "sites"),
    [
        ([1, 1, 1, 1, 1], 3, 3),
        ([1, 1, 1], 3, 3),
        ([1, 1, 1], 1, 2),
        ([50, 50, 50], 90, 2),
        ([50, 50, 50], 101, 3),
        ([1000, 1, 1], 90, 2),
        ([40, 1, 1, 1], 42, 3),
    ],
)
def test_the_fewest_sites(counts, least, sites):
    """Catches: clients counted as sites; a sum of one gateway; the small gateways counted first."""
    assert fewest_sites({f"site-{n}": count for n, count in enumerate(counts)}, least) == sites


def test_a_sum_takes_enough_sites_too():
    """Catches: the number of sites left to the clients that they claim."""
    counts = {"a": 1000, "b": 1, "c": 1}
    assert fewest_sites(counts, 90, min_sites=3) == 3
    with pytest.raises(SecureAggregationError):
        check_sum(counts, 90, min_sites=4)


@pytest.mark.parametrize(("counts", "least"), [([1, 1], 3), ([1000], 90), ([], 1), ([49, 50], 100)])
def test_too_few_clients_or_a_single_site_make_no_sum(counts, least):
    """Catches: a sum over fewer clients than the plan's, whose noise would be too little; a sum of one."""
    with pytest.raises(SecureAggregationError) as caught:
        check_sum({f"site-{n}": count for n, count in enumerate(counts)}, least)
    assert caught.value.code == "secagg-too-few"


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12), st.integers(1, 300))
def test_no_smaller_number_of_sites_could_do(counts, least):
    """Catches: a threshold above what an honest sum may need, or below what any sum needs."""
    named = {f"site-{n}": count for n, count in enumerate(counts)}
    if sum(counts) < least:
        with pytest.raises(SecureAggregationError):
            fewest_sites(named, least)
        return
    sites, largest = fewest_sites(named, least), sorted(counts, reverse=True)
    assert sum(largest[:sites]) >= least
    assert sites == 2 or sum(largest[: sites - 1]) < least


def test_what_is_counted_on():
    """Catches: the own number cut; numbers of others taken as the server says them."""
    counts = {"a": 50, "b": 50, "c": 2}
    assert counted_on(counts, "a", 1) == {"a": 50, "b": 1, "c": 1}
    assert counted_on(counts, "b", 20) == {"a": 20, "b": 50, "c": 2}
