"""The data that a client process keeps between messages. `common/model/load.py` keeps the base model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tsugiki.client.training.trainer import Watch
from tsugiki.common.model.graft import Graft
from tsugiki.common.tasks.base import Encoded, Tail

RowsKey = tuple[str, str, str]
"""The site's identity, which part of its rows, and the settings that they were tokenised with."""


@dataclass(frozen=True)
class PreparedRows:
    """One part of a site's rows, ready for the model.

    Args:
        encoded: the tokenised rows; None if the site keeps no such rows.
        clients: row numbers of each client of the site; empty for rows that are not trained on.
        notes: codes for what is unusual about the rows.
    """

    encoded: Encoded | None
    clients: tuple[list[int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class SiteCache:
    """What one process keeps between messages, for all its sites.

    Args:
        rows: tokenised rows.
        tails: the trainable end of the network with the features of a site's training rows, and its graft.
        moments: the optimiser's state of each client, by (site, SHA-256 of the run, client), with its last round.
        watch: called after each training step.
        adapter_bytes: of the largest adapter of a run that was opened here, as it travels; 0 before the first.
    """

    rows: dict[RowsKey, PreparedRows] = field(default_factory=dict)
    tails: dict[RowsKey, tuple[Graft, Tail | None]] = field(default_factory=dict)
    moments: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = field(default_factory=dict)
    watch: Watch = lambda step, steps, losses: None
    adapter_bytes: int = 0

    def clear(self) -> None:
        """Forget all rows, tails and moments. The step watcher stays."""
        self.rows.clear()
        self.tails.clear()
        self.moments.clear()

    def tail(self, key: RowsKey, graft: Graft, encoded: Encoded) -> Tail | None:
        """Return the trainable end of the network with the rows' features, which are computed once for a graft.

        Args:
            key: of the rows.
            graft: whose frozen part computes the features. Tails of other grafts are dropped.
            encoded: the rows.

        Returns:
            None if the task has no such end.
        """
        # Features hold for one graft only, and take memory: those of other grafts are dropped.
        kept = self.tails.get(key)
        if kept is None or kept[0] is not graft:
            self.tails = {other: entry for other, entry in self.tails.items() if entry[0] is graft}
            kept = (graft, graft.task.tail(graft.base, encoded))
            self.tails[key] = kept
        return kept[1]

    def moments_of(self, site: str, run: str, clients: Iterable[str], round_number: int) -> dict[str, dict[str, Any]]:
        """Return the optimiser's state of each client, to be changed in place; it is empty at the start of a run.

        The states of other runs are dropped. A state from a later round is dropped too: it belongs to an earlier run
        with the same settings.

        Args:
            site: identity of the site.
            run: SHA-256 of the run's configuration.
            clients: their names.
            round_number: counted from 1.
        """
        self.moments = {key: entry for key, entry in self.moments.items() if key[1] == run}
        found: dict[str, dict[str, Any]] = {}
        for client in clients:
            last, state = self.moments.get((site, run, client), (0, {}))
            # A state of an earlier run with the same settings must not go on in this one.
            if round_number == 1 or last > round_number:
                state = {}
            self.moments[site, run, client] = (round_number, state)
            found[client] = state
        return found


_PROCESS = SiteCache()


def of_process() -> SiteCache:
    """Return this process's cache. It is not part of the ClientApp, because Ray pickles the app for every message."""
    return _PROCESS


def watch_training(watch: Watch) -> None:
    """Call `watch` after each training step of this process."""
    of_process().watch = watch


def adapter_bytes() -> int:
    """Return the bytes of the largest adapter that this process has made for a run; 0 before the first."""
    return of_process().adapter_bytes
