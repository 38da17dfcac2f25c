"""A head in closed form before round 1: sites send sums of their features, and training starts from a linear probe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.files import unwritable
from tsugiki.common.head_sums import HeadSums, pack_sums, solve, unpack_sums, zero_sums
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.linear_head import LinearHead, warm_head_of, with_head
from tsugiki.common.settings import HeadedSettings, StrategySettings
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import HeadSumsRequest, to_record
from tsugiki.server.run import checkpoint
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.collect import address, receive
from tsugiki.server.run.context import RunContext
from tsugiki.server.run.guard import check_head_sums
from tsugiki.server.run.influence import weights_of
from tsugiki.server.run.measuring import ADJUSTED_NOTE, LABEL_SKEW, LABEL_SKEW_NOTE, class_shares, label_skew
from tsugiki.server.run.replies import AcceptedStep, Asked, Rejected

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

_SPILLED = ".sums-"
_NUMBER_BYTES = 8
MOST_LENGTH = 10.0
"""How often the median site's length of features a site's may be; longer ones would outweigh all others."""


@dataclass(frozen=True)
class _Spilled:
    """The accepted sums of a site, on disk: the server's memory must not grow with the number of sites.

    Args:
        path: of the packed sums.
        rows: how many rows they are over.
        length: root mean square of the rows' features.
        counts: of the rows of each class.
    """

    path: Path
    rows: int
    length: float
    counts: npt.NDArray[np.float64]


_Reply = AcceptedStep[_Spilled]


def with_warm_head(ctx: RunContext, graft: Graft, state: State) -> State:
    """Return the state before round 1 with the head in closed form; the state as it is where no head is computed.

    The head is checkpointed at once. A run that was interrupted before that asks again.

    Args:
        ctx: of the run.
        graft: the model, with the adapter's initial values.
        state: to start or go on from.

    Raises:
        Interrupted: the user asked to stop.
    """
    trains = ctx.config.run.rounds > 0  # else the adapter is evaluated as it is
    if state.evaluated_round >= 0 or "warm_head" in state.record or not trains:
        return state
    head = warm_head_of(graft, ctx.config)
    if isinstance(head, str):
        if head:
            ctx.progress.note(f"no head before round 1: {head}")
        return state
    ctx.progress.note(f"computing the head from sums of {head.width} features, which all sites send once")
    for left in ctx.folder.glob(f"{_SPILLED}*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=ctx.folder, prefix=_SPILLED) as folder:
        ctx.grid.limit_replies(head.numbers * _NUMBER_BYTES)
        replies, rejected, traffic = _collect(ctx, graft, head, Path(folder))
        ctx.grid.limit_replies(graft.spec.size * _NUMBER_BYTES)
        total = zero_sums(head.width, head.classes)
        # in the order of names, so that the order of arrival changes nothing
        factors = _row_factors({reply.site: reply.content.rows for reply in replies}, ctx.config.strategy)
        for reply in replies:
            sums = unpack_sums(np.load(reply.content.path), head.width, head.classes)
            if factors[reply.site] < 1:
                sums = sums.scaled(factors[reply.site])
            total = total.plus(sums)
    reasons = {reply.site: reply.reason for reply in rejected}
    record = _record(replies, reasons, traffic)
    reason = _why_not(ctx, replies, total)
    if reason:
        ctx.audit.write("no-warm-head", accepted=[reply.site for reply in replies], rejected=reasons)
        ctx.progress.note(f"no head before round 1: {reason}")
        return state
    record["warm_head"]["label_skew"] = label_skew(np.array([reply.content.counts for reply in replies]))
    return _start_from(ctx, graft, head, state, total, record)


def _collect(
    ctx: RunContext, graft: Graft, head: LinearHead, folder: Path
) -> tuple[list[_Reply], list[Rejected], dict[str, int]]:
    """Ask all sites for their sums; return the accepted and the rejected replies by site name, and the bytes."""
    arrays = encode(graft.initial, graft.spec)
    config = ctx.config_for_sites
    timeout_s = ctx.round_timeout_s

    def request(nonce: str, node: int) -> RecordDict:
        return to_record(HeadSumsRequest(config, 0, ctx.spec.sha256, nonce), arrays)

    def judge(reply: Message, asked: Asked) -> _Reply | Rejected:
        verdict = check_head_sums(reply, asked, head.width, head.classes)
        if isinstance(verdict, Rejected):
            return verdict
        spilled = _spill(verdict.content, folder / f"{asked.site}.npy")
        return AcceptedStep(verdict.site, spilled, verdict.clients, verdict.size_bytes)

    members = list(ctx.roster.members().values())
    asked, messages = address(members, 0, "query.head_sums", request, timeout_s)
    replies, rejected = receive(ctx, 0, asked, messages, judge)
    traffic = {
        "bytes_down": sum(len(array.data) for array in arrays.values()) * len(messages),
        "bytes_up": sum(reply.size_bytes for reply in replies) + sum(reply.size_bytes for reply in rejected),
    }
    kept, too_long = _without_outliers(replies)
    return kept, sorted([*rejected, *too_long], key=lambda reply: reply.site), traffic


def _spill(sums: HeadSums, path: Path) -> _Spilled:
    try:
        np.save(path, pack_sums(sums), allow_pickle=False)
    except OSError as error:
        raise unwritable(path, error) from error
    squares = float(np.trace(sums.gram[:-1, :-1]))
    return _Spilled(path, sums.rows, float(np.sqrt(squares / sums.rows)), np.array(sums.moments[-1]))


def _without_outliers(replies: Sequence[_Reply]) -> tuple[list[_Reply], list[Rejected]]:
    """Return the replies whose features are about as long as the median site's, and the rejected others.

    All sites have the same base, so that their features have about the same length.
    """
    if not replies:
        return [], []
    lengths = sorted(reply.content.length for reply in replies)
    most = MOST_LENGTH * lengths[(len(lengths) - 1) // 2]  # the lower median: of two sites, the other one counts
    kept = [reply for reply in replies if reply.content.length <= most]
    detail = f"features longer than {most:.4g}"
    too_long = [
        Rejected(reply.site, "norm", detail, reply.size_bytes) for reply in replies if reply.content.length > most
    ]
    return kept, too_long


def _row_factors(rows: Mapping[str, int], settings: StrategySettings) -> dict[str, float]:
    """Return how much a row of each site counts in the sums, at most 1: sites weigh as in a round of training."""
    weights = weights_of(rows, settings)
    each = {site: weights[site] / rows[site] for site in rows}
    most = max(each.values(), default=1.0)
    return {site: one / most for site, one in each.items()}


def _why_not(ctx: RunContext, replies: Sequence[_Reply], total: HeadSums) -> str:
    """Return why no head can be computed from these replies; empty if it can."""
    clients = sum(reply.clients for reply in replies)
    least = ctx.config.strategy.min_clients
    if clients < least:
        return f"sums of {clients} clients, and strategy.min_clients = {least}"
    if total.classes < 2:
        return "the sites' rows have one class"
    return ""


def _record(replies: Sequence[_Reply], rejected: dict[str, Any], traffic: dict[str, int]) -> dict[str, Any]:
    """Return what round 0's line in metrics.jsonl says about the head, but for its solution."""
    rows = {reply.site: reply.content.rows for reply in replies}
    return {"warm_head": {"sites": rows, "rejected": rejected}, **traffic}


def _start_from(
    ctx: RunContext, graft: Graft, head: LinearHead, state: State, total: HeadSums, record: dict[str, Any]
) -> State:
    """Return the state with the head that follows from the sums."""
    values = solve(total, bias=head.bias)
    vector = with_head(graft.initial, graft, head, values)
    if not np.isfinite(vector).all():
        ctx.audit.write("no-warm-head", accepted=sorted(record["warm_head"]["sites"]), rejected={})
        ctx.progress.note("no head before round 1: the sums have no finite solution")
        return state
    state = replace(state, class_shares=_shares_to_adjust_to(ctx, graft, total, record["warm_head"]["label_skew"]))
    about = {**record["warm_head"], "rows": total.rows, "ridge": values.ridge, "scale": values.scale}
    ctx.audit.write("warm-head", **about)
    state = replace(state, vector=vector, record={**record, "warm_head": about}, anchors=ctx.logs.anchors())
    # Takes the place of the checkpoint that the run began with: the evaluation of round 0 saves no adapter.
    checkpoint.save(ctx.folder / "checkpoint", state, ctx.config.fixed, ctx.spec.sha256)
    return state


def _shares_to_adjust_to(ctx: RunContext, graft: Graft, total: HeadSums, skew: float) -> tuple[float, ...]:
    """Return the federation's shares of the classes if sites are to adjust their losses to them, else nothing.

    Args:
        ctx: of the run.
        graft: the model.
        total: the sums of all sites.
        skew: how far the sites' shares are apart.
    """
    if skew <= LABEL_SKEW:
        return ()
    task = ctx.config.task
    off = not isinstance(task, HeadedSettings) or task.logit_adjustment == "off" or not graft.task.adjusts_logits
    # rows of the site's own shares choose the step of the round that is kept, which undoes an adjustment
    if off or ctx.config.train.validate_every_steps:
        ctx.progress.note(LABEL_SKEW_NOTE.format(skew=skew))
        return ()
    ctx.progress.note(ADJUSTED_NOTE.format(skew=skew))
    return class_shares(total.moments[-1])
