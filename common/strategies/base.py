"""What a strategy works on."""

from __future__ import annotations

from dataclasses import dataclass

from tsugiki.common.wire.spec import Vector


@dataclass(frozen=True)
class WeightedUpdate:
    """One term of a weighted mean of updates.

    Args:
        site: name of its site; strategies sum in the order of these names.
        update: local minus global adapter, shape (size,), float32.
        weight: at least 1; a site's rows, where it tells them.
        clients: how many clients' updates are averaged in it, at least 1.
    """

    site: str
    update: Vector
    weight: int
    clients: int = 1
