"""How many clients a sum takes, where a site may bring several: what server and sites each check by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from tsugiki.common.errors import SecureAggregationError


def fewest_sites(counts: Mapping[str, int], min_clients: int, min_sites: int = 2) -> int:
    """Return the fewest sites that have `min_clients` clients together, and at least `min_sites`.

    With one client a site it is `min_clients`. It goes into the threshold of the shares, so that no smaller sum can
    be opened at all.

    Args:
        counts: how many clients each site has.
        min_clients: that a sum takes.
        min_sites: that a sum takes, 2 or more: a sum of one hides nothing.

    Raises:
        SecureAggregationError: `secagg-too-few`, all of them have not as many.
    """
    left = min_clients
    sites = 0
    for count in sorted(counts.values(), reverse=True):
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
    """Do nothing if these sites may make a sum.

    Raises:
        SecureAggregationError: `secagg-too-few`.
    """
    fewest_sites(counts, min_clients, min_sites)
