"""Check that a sum has enough clients and sites. The server and every site run these checks themselves.

A site cannot check how many clients another site has: the server says it. So it counts on its own clients and on one at
each other site, unless its policy says more. The account needs the noise of `n_min` clients in every opened sum, of
which a share `honest_fraction` is counted; a site that opens no sum of fewer clients than `n_min`, by what it counts
on, has that noise whatever the server says.
"""

from __future__ import annotations

from collections.abc import Mapping

from tsugiki.common.errors import SecureAggregationError


def fewest_sites(counts: Mapping[str, int], min_clients: int, min_sites: int = 2) -> int:
    """Return the fewest sites that have `min_clients` clients together, and at least `min_sites`.

    With one client at each site, the result is `min_clients`. The threshold of the shares is computed from it, so that
    no smaller sum can be opened at all.

    Args:
        counts: number of clients at each site.
        min_clients: the least number of clients in a sum.
        min_sites: the least number of sites in a sum, 2 or more: a sum of one hides nothing.

    Raises:
        SecureAggregationError: `secagg-too-few`, if all sites together have too few clients, or are too few.
    """
    left = min_clients
    sites = 0
    for count in sorted(counts.values(), reverse=True):  # the largest sites reach the number first
        if left <= 0:
            break
        left = left - count
        sites = sites + 1
    if left > 0 or len(counts) < min_sites:
        raise SecureAggregationError(
            f"{sum(counts.values())} clients at {len(counts)} sites are too few",
            f"{min_clients} clients at {min_sites} sites or more",
            code="secagg-too-few",
        )
    return max(sites, min_sites)


def check_sum(counts: Mapping[str, int], min_clients: int, min_sites: int = 2) -> None:
    """Check that these sites may form a sum.

    Raises:
        SecureAggregationError: `secagg-too-few`, if they may not.
    """
    fewest_sites(counts, min_clients, min_sites)


def counted_on(counts: Mapping[str, int], own: str, most: int) -> dict[str, int]:
    """Return how many clients of each site a site counts on.

    Args:
        counts: by site name, as the server says.
        own: name of the site itself; its own number is not the server's word, because the site has checked it.
        most: how many clients of another site it counts on at most.
    """
    return {name: count if name == own else min(count, most) for name, count in counts.items()}
