"""Updates that come after their round has closed, and count in the next one at a discount.

With `strategy.late_updates = "next-round"` a site that did not answer in time is not asked for anything else while its
answer may still come. When it comes, while a later round is open, it is judged as it would have been in its own round,
and its update is added to the later round's mean. It is the move from the adapter of its own round, so it fits a later
adapter the less, the more rounds lie between. Its weight is therefore multiplied by (1 + s)^-0.5, where s is the number
of rounds by which it is late.

Source: Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization", arXiv:1903.03934, section 5 (the polynomial
staleness function with a = 0.5).

Who was late, and by how much, is in the round's line of metrics.jsonl. All of it is forgotten with the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tsugiki.server.engines.grid import Outstanding
from tsugiki.server.run.replies import Asked

if TYPE_CHECKING:
    from flwr.app import Message

MOST_ROUNDS_LATE = 8
"""An update that is late by more rounds is not waited for any more: its site is asked anew."""


def discounted(weight: int, rounds_late: int) -> int:
    """Return the weight of a late update, at least 1.

    Args:
        weight: that it would have in time.
        rounds_late: by which the update is late.
    """
    return max(1, round(weight / math.sqrt(1 + rounds_late)))


@dataclass
class Late:
    """The requests of closed rounds that may still be answered. It changes in the course of a run.

    Args:
        asked: the requests, by site name.
        outstanding: the messages, for the engine.
    """

    asked: dict[str, Asked] = field(default_factory=dict)
    outstanding: Outstanding = field(default_factory=Outstanding)

    def begin_round(self, round_number: int, nodes: Mapping[str, int]) -> None:
        """Forget the requests that are too old, and those to nodes that are no longer their sites'.

        Args:
            round_number: counted from 1.
            nodes: of the connected sites, by name.
        """
        for site, one in list(self.asked.items()):
            moved = nodes.get(site, one.node_id) != one.node_id
            if moved or round_number - one.round_number > MOST_ROUNDS_LATE:
                self.forget(site)

    def forget(self, site: str) -> None:
        """Wait no longer for what a site was asked in a closed round."""
        one = self.asked.pop(site, None)
        if one is not None:
            self.outstanding.forget(one.node_id)

    def expected(self) -> dict[str, int]:
        """Return the sites whose update may still come, each with the round in which it was asked."""
        return {site: one.round_number for site, one in sorted(self.asked.items())}

    def answered(self, reply: Message) -> Asked | None:
        """Return the request that a reply answers, if its sender is not asked for anything else; None: it is."""
        node = reply.metadata.src_node_id
        return next((one for one in self.asked.values() if one.node_id == node), None)

    def close_round(self, asked: Mapping[int, Asked], missing: Iterable[str]) -> None:
        """Take note of the sites that have not answered before their round closed.

        Args:
            asked: what each node was asked, by node id.
            missing: the names of these sites.
        """
        missing = set(missing)
        self.asked |= {one.site: one for one in asked.values() if one.site in missing}
        self.outstanding.keep_last({one.node_id for one in self.asked.values()})
