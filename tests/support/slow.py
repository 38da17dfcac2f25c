"""A toy federation on a clock of its own, whose sites take as long as a test says, or never answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from tests.support.toy import SPEC, toy_app, toy_config, toy_context
from tsugiki.common.config.run import RunConfig
from tsugiki.server.engines.in_process import Fault, InProcessGrid
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.roster import Roster


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, pause: float) -> None:
        """Let time pass."""
        self.pauses.append(pause)
        self.now += max(pause, 1e-6)  # a rest too small to add would be slept for ever

    def rule(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        """Take the place of the server's clock."""
        for module in ("tsugiki.server.engines.grid", "tsugiki.server.run.roster"):
            monkeypatch.setattr(f"{module}.time", self)
        return self


Takes = Callable[[str, str, int], float | None]
"""From site, message type and round (0: a hello) to the seconds until the answer; None: it never comes."""


Away = Callable[[float], Collection[str]]
"""From the time to the sites that are not connected then."""


class SlowGrid(InProcessGrid):
    """A grid as it is deployed: several sites work at once, each for as long as `takes` says."""

    sequential = False
    simulated = False

    def __init__(
        self,
        sites: Sequence[str],
        clock: Clock,
        takes: Takes,
        away: Away,
        fault: Fault | None,
        app: ClientApp | None,
    ) -> None:
        super().__init__(app or toy_app(list(sites)), len(sites), fault)
        self._sites = sites
        self._away = away
        self._clock = clock
        self._takes = takes
        self._due: dict[str, float] = {}
        self.asked: list[tuple[str, str, int]] = []

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are connected now."""
        away = self._away(self._clock.now)
        return [node for node in super().get_node_ids() if self._sites[node - 1] not in away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages, and settle when each is answered."""
        messages = list(messages)
        ids = super().push_messages(messages)
        for message_id, message in zip(ids, messages, strict=True):
            site = self._sites[message.metadata.dst_node_id - 1]
            request = (site, str(message.metadata.message_type), int(message.metadata.group_id or 0))
            self.asked.append(request)
            seconds = self._takes(*request)
            if seconds is not None:
                self._due[message_id] = self._clock.now + seconds
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the answers that have come by now."""
        due = [one for one in sorted(message_ids, key=int) if self._due.get(one, float("inf")) <= self._clock.now]
        return [reply for one in due for reply in super(SlowGrid, self).pull_messages([one])]


def slow_context(
    folder: Path,
    sites: Sequence[str],
    clock: Clock,
    takes: Takes,
    config: RunConfig | None = None,
    away: Away = lambda now: (),
    fault: Fault | None = None,
    app: ClientApp | None = None,
    **fields: Any,
) -> RunContext:
    """Return the context of a run on a `SlowGrid`, after its hello; `fields` replaces others of `RunContext`."""
    config = config or toy_config(folder)
    folder.mkdir(exist_ok=True)
    ctx = toy_context(folder, toy_app(list(sites)), len(sites), config, **fields)
    grid = SlowGrid(sites, clock, takes, away, fault, app)
    roster = Roster(grid, config, SPEC, None, ctx.audit, ctx.stop)
    roster.wait(lambda count: None)
    return replace(ctx, grid=grid, roster=roster)


def rounds_asked(ctx: RunContext, site: str, kind: str = "train") -> list[int]:
    """Return the rounds in which a site was asked to do something, in the order of asking."""
    assert isinstance(ctx.grid, SlowGrid)
    return [number for name, one, number in ctx.grid.asked if (name, one) == (site, kind)]
