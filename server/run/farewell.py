"""The last message of a run: its sites learn that it is over, how it ended, and in how many rounds they were."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsugiki.common.errors import Code
from tsugiki.common.files import read_lines
from tsugiki.common.wire.messages import ENDED, EndedRequest, to_record
from tsugiki.server.engines.grid import Stop, exchange
from tsugiki.server.run.context import RunContext

if TYPE_CHECKING:
    from flwr.app import RecordDict

log = logging.getLogger("tsugiki.server")

TELL_S = 5.0
"""How long the end of a run waits for its sites: an idle node looks for messages every 3 s."""
STOPPED_TELL_S = 1.0
"""The same for a run that its operator stops, and that somebody waits for. A site that trains then hears nothing."""


def tell_sites(ctx: RunContext, outcome: Code) -> None:
    """Tell the sites of a run that it is over. Nothing depends on it: a site that is away or busy is not waited for.

    Simulated sites are not told: they end with the run.

    Args:
        ctx: of the run.
        outcome: how it ended, as `stopped` in summary.json, or the code of the error that ended it.
    """
    if ctx.grid.simulated:
        return
    from flwr.app import Message

    timeout_s = STOPPED_TELL_S if outcome == "interrupted" else TELL_S
    try:
        lines = [line for line in read_lines(ctx.folder / "metrics.jsonl") if not line.get("voided")]
        connected = set(ctx.grid.get_node_ids())
        members = [member for member in ctx.roster.members().values() if member.node_id in connected]
        messages = [
            Message(_ended(ctx, lines, member.name, outcome), member.node_id, f"query.{ENDED}", ttl=2 * timeout_s)
            for member in members
        ]
        # a stop of its own: the operator's would end this at once
        answered = sum(not reply.has_error() for reply in exchange(ctx.grid, messages, timeout_s, Stop()))
    except Exception as error:  # noqa: BLE001  # a link that is broken fails in many ways, and the run has its result
        log.warning("the sites were not told that the run is over (%s)", type(error).__name__)
        return
    if answered < len(messages):
        log.warning("%d of %d sites have heard that the run is over", answered, len(messages))


def _ended(ctx: RunContext, lines: Sequence[Mapping[str, Any]], site: str, outcome: Code) -> RecordDict:
    rounds = max((line["round"] for line in lines), default=0)
    rounds_in = -1 if ctx.withholds else sum(site in line.get("accepted", {}) for line in lines)
    return to_record(EndedRequest(ctx.config.run.name, outcome, rounds, rounds_in))
