"""Split one file over simulated sites. Deployed sites have their own files and do not use this module.

A part is an ascending int64 array of row numbers: a site's rows keep the order of the file, and training shuffles
them. Every row is in exactly one part, and the same seed gives the same parts.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import Code, DataError
from tsugiki.common.rng import generator

Rows = npt.NDArray[np.int64]

MAX_DRAWS = 100
MAX_GROUPS = 1000
MAX_ALPHA = 1e6
"""A larger alpha gives an even split; much larger still, NumPy's sum over the clients overflows."""

_CODE: Code = "shard-partition"


def site_names(count: int) -> list[str]:
    """Return `site-0`, `site-1`, ..., zero-padded to equal width, so that they sort by number."""
    width = len(str(count - 1))
    return [f"site-{number:0{width}}" for number in range(count)]


def iid(rows: int, clients: int, seed: int) -> list[Rows]:
    """Split at random into parts whose sizes differ by at most 1.

    Raises:
        DataError: `shard-partition`, fewer rows than clients.
    """
    _check_enough(rows, clients, 1)
    order = generator(seed, "partition", "iid").permutation(rows)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(
    labels: Sequence[Any] | npt.NDArray[Any], clients: int, alpha: float, min_rows: int, seed: int
) -> list[Rows]:
    """Split so that the clients' shares of each class differ, more so for a smaller `alpha`.

    For each class, in sorted order, the clients' shares are drawn from a symmetric Dirichlet distribution. The whole
    draw is repeated until every client has `min_rows` rows. This is flwr-datasets' `DirichletPartitioner` without
    self-balancing, except that the rows of a class are dealt in random order, not in the order of the file.

    Args:
        labels: the class of each row.
        clients: number of parts.
        alpha: concentration, above 0, up to 1e6.
        min_rows: fewest rows of a part; 0 counts as 1.
        seed: the run's seed.

    Raises:
        DataError: `shard-partition`, `alpha` is out of range, or each of 100 draws left some part with too few rows.

    Source: Yurochkin et al. 2019, arXiv:1905.12022. Hsu et al. 2019, arXiv:1909.06335, which made alpha the
    usual measure of skew, draws the classes of each client instead, with equally many rows for all clients.
    """
    least = max(min_rows, 1)
    _check_enough(len(labels), clients, least)
    if not 0 < alpha <= MAX_ALPHA:
        raise DataError(f"alpha = {alpha} is out of range", f"above 0, up to {MAX_ALPHA:g}", code=_CODE)
    classes = _shuffled_classes(np.asarray(labels), generator(seed, "partition", "dirichlet", "order"))
    shares = generator(seed, "partition", "dirichlet", "shares")
    best = 0
    for _ in range(MAX_DRAWS):
        parts = _deal(classes, clients, alpha, shares)
        smallest = min(len(part) for part in parts)
        if smallest >= least:
            return parts
        best = max(best, smallest)
    hint = "raise alpha or lower clients"
    if best:
        hint = f"raise alpha, lower clients, or lower min_rows to {best}"
    raise DataError(
        f"in the best of {MAX_DRAWS} draws with alpha = {alpha} the smallest of {clients} clients has {best} rows",
        f"min_rows = {least}",
        hint,
        code=_CODE,
    )


def _shuffled_classes(labels: npt.NDArray[Any], order: np.random.Generator) -> list[Rows]:
    """Return the rows of each class, classes sorted, rows in random order."""
    numbers = np.unique(labels, return_inverse=True)[1]
    shuffled = order.permutation(len(labels))
    return [shuffled[numbers[shuffled] == number] for number in range(numbers.max() + 1)]


def _deal(classes: list[Rows], clients: int, alpha: float, shares: np.random.Generator) -> list[Rows]:
    """Return one draw: every class is cut at its cumulative shares."""
    hands: list[list[Rows]] = [[] for _ in range(clients)]
    for rows in classes:
        ends = (np.cumsum(shares.dirichlet(np.full(clients, alpha))) * len(rows)).astype(np.int64)
        # The last cut is left out: rounding must not lose the last rows of a class.
        for hand, piece in zip(hands, np.split(rows, ends[:-1]), strict=True):
            hand.append(piece)
    return [np.sort(np.concatenate(hand)) for hand in hands]


def by_column(values: Sequence[str]) -> dict[str, Rows]:
    """Split by a column: one part for each value, under a name made from the value, sorted by name.

    A name matches `tsugiki.common.settings.NAME_PATTERN`. It is the value in lower case, without accents and other
    non-ASCII characters; `-` replaces what else a name must not contain. If nothing is left, the name is `group-` and
    eight digits of the value's SHA-256.

    Raises:
        DataError: `shard-partition`, a value is blank, two values get one name, or there are more than 1000 values.
    """
    blank = [row for row, value in enumerate(values) if not value.strip()]
    if blank:
        raise DataError(
            f"{len(blank)} rows have no value to split by, the first is row {blank[0] + 1}",
            "a value in every row",
            code=_CODE,
        )
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    if len(groups) > MAX_GROUPS:
        raise DataError(
            f"the column has {len(groups)} values", f"at most {MAX_GROUPS}", "split by another column", code=_CODE
        )
    parts: dict[str, Rows] = {}
    for value, rows in groups.items():
        name = _name(value)
        if name in parts:
            both = f"the values in rows {parts[name][0] + 1} and {rows[0] + 1} differ"
            raise DataError(f"{both} but become one site name", "a name of its own for each", "rename one", code=_CODE)
        parts[name] = np.asarray(rows, np.int64)
    return dict(sorted(parts.items()))


def _name(value: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", ascii_only).strip("-._")[:64]
    return name or f"group-{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def _check_enough(rows: int, clients: int, least: int) -> None:
    if clients < 1:
        raise DataError(f"clients = {clients} is too small", "at least 1", code=_CODE)
    if clients * least > rows:
        hint = "give more rows"
        if rows >= least:
            hint = f"lower clients to {rows // least} or fewer"
        raise DataError(
            f"{rows} rows are too few for {clients} clients",
            f"at least {clients * least}, {least} for each",
            hint,
            code=_CODE,
        )
