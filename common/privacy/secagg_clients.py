"""How many clients a sum takes, where a site may bring several: what server and sites each check by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import SecureAggregationError


def fewest_sites(counts: Mapping[str, int], min_clients: int) -> int:
    """Return the fewest sites that have `min_clients` clients together, and at least 2: a sum of one hides nothing.

    With one client a site it is `min_clients`. It goes into the threshold of the shares, so that no smaller sum can
    be opened at all.

    Args:
        counts: how many clients each site has.
        min_clients: that a sum takes.

    Raises:
        SecureAggregationError: `secagg-too-few`, all of them have not as many.
    """
    left, sites = min_clients, 0
    for count in sorted(counts.values(), reverse=True):
        if left <= 0:
            break
        left, sites = left - count, sites + 1
    if left > 0 or len(counts) < 2:
        raise SecureAggregationError(
            f"{sum(counts.values())} clients at {len(counts)} sites",
            f"{min_clients} clients at 2 sites or more",
            code="secagg-too-few",
        )
    return max(sites, 2)


def check_sum(counts: Mapping[str, int], min_clients: int) -> None:
    """Do nothing if these sites may make a sum.

    Raises:
        SecureAggregationError: `secagg-too-few`.
    """
    fewest_sites(counts, min_clients)
