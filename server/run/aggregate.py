"""From guarded updates to one step of the adapter.

Flower's own strategies do the averaging. After the guard the updates are handed to one as if the sites had sent them
in the order of their names, with the current model at zero: the strategy then works in update space. There Krum's
distances do not drown in the rounding of large weights, and adaptive optimisers see the pseudo-gradient they are
defined on (Reddi et al. 2021, arXiv:2003.00295, algorithm 2). What it returns is added to the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.config.run import RunConfig
from tsugiki.common.rng import generator
from tsugiki.common.strategies import Strategy, WeightedUpdate, strategy_of
from tsugiki.common.strategies.base import Moments
from tsugiki.common.wire.arrays import ARRAY_KEY
from tsugiki.common.wire.spec import BLOCK, AdapterSpec, Vector, blocks
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.kept import KeptMoment, let_go

_MOMENTS = {"m_t": dict, "v_t": dict, "momentum_vector": list}
"""The containers of moments in Flower's strategies: by array name, or a list. There is one array here."""

_FLOWER_BLOCK = 2**17
"""How many numbers, of all updates together, Flower's strategy gets at once."""
_SHORTEST_BLOCK = 2**15
"""How many numbers of each update it gets at least: each of its calls takes time of its own."""


def step(
    config: RunConfig,
    spec: AdapterSpec,
    state: State,
    updates: Sequence[WeightedUpdate],
    folder: Path | None = None,
) -> tuple[Vector, Moments]:
    """Return the step of the round after `state`, shape (spec.size,), and the strategy's moments.

    Args:
        config: the run.
        spec: of the adapter.
        state: after the last round.
        updates: at least one, in any order; their mean alone suffices where the strategy needs no more.
        folder: of the run, for large moments; None: they stay in memory.

    Raises:
        StorageError: the moments cannot be written.
    """
    strategy = strategy_of(config.strategy)
    round_number = state.round + 1
    update, moments = aggregate(strategy, state.strategy, round_number, updates, folder)
    draw = generator(config.run.seed, "fresh-factors", round_number)
    return strategy.combine(spec, state.vector, update, _in_order(updates), draw), moments


def aggregate(
    strategy: Strategy,
    moments: Mapping[str, npt.NDArray[Any]],
    round_number: int,
    updates: Sequence[WeightedUpdate],
    folder: Path | None = None,
) -> tuple[Vector, Moments]:
    """Return the update that Flower's strategy makes of the sites' updates, shape (size,), and its moments.

    A coordinate-wise strategy gets one block of all updates at a time, because Flower copies whatever it gets several
    times. Nothing is kept on an object between rounds, so that a checkpoint holds everything.

    Args:
        strategy: of the run.
        moments: from the last round; empty in the first.
        round_number: counted from 1.
        updates: at least one, in any order.
        folder: of the run, for large moments; None: they stay in memory.

    Raises:
        StorageError: the moments cannot be written.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # it would report counts that the guard has already recorded
    ordered = _in_order(updates)
    if strategy.selects:
        return _selected(strategy, round_number, ordered), {}
    if len(ordered) == 1 and _is_plain_mean(strategy):
        return ordered[0].update, {}
    size = len(ordered[0].update)
    length = size
    if strategy.coordinate_wise:
        length = max(_SHORTEST_BLOCK, _FLOWER_BLOCK // len(ordered))
    step = np.empty(size, np.float32)
    kept: dict[str, KeptMoment] = {}
    for part in blocks(size, length):
        before = {name: np.array(moment[part], np.float32) for name, moment in moments.items()}
        let_go(moments.values())
        cut = [replace(one, update=one.update[part]) for one in ordered]
        step[part], after = _aggregate_block(strategy, before, round_number, cut)
        for name, moment in after.items():
            if name not in kept:
                kept[name] = KeptMoment(folder, size)
            kept[name].add(moment)
    return step, {name: moment.vector() for name, moment in kept.items()}


def _aggregate_block(
    strategy: Strategy, moments: Moments, round_number: int, ordered: Sequence[WeightedUpdate]
) -> tuple[npt.NDArray[Any], Moments]:
    """Return what Flower's strategy makes of a block of the updates, which are in order, and its moments there."""
    from flwr.app import Array, ArrayRecord

    flower: Any = strategy.make()
    # the current model is at zero, so that the strategy works on updates
    zero = np.zeros_like(ordered[0].update)
    if hasattr(flower, "momentum_vector"):
        flower.current_arrays = ArrayRecord({ARRAY_KEY: Array(zero)})
    elif hasattr(flower, "current_arrays"):
        flower.current_arrays = {ARRAY_KEY: zero}
    # the object is new: it gets the moments of the last round
    for name, moment in moments.items():
        _set_moment(flower, name, moment)
    replies = [_as_reply(one, ArrayRecord, Array) for one in ordered]
    arrays, _ = flower.aggregate_train(round_number, replies)
    return arrays[ARRAY_KEY].numpy(), _moments_of(flower)


def _is_plain_mean(strategy: Strategy) -> bool:
    """Return whether Flower's strategy does nothing but average, so that a single update is the result."""
    from flwr.serverapp.strategy import FedAvg

    return type(strategy.make()).aggregate_train is FedAvg.aggregate_train


def _selected(strategy: Strategy, round_number: int, ordered: Sequence[WeightedUpdate]) -> Vector:
    """Return the update that Flower's strategy selects, shape (size,).

    Instead of the updates it gets points with the same distances from each other, one for each update and with as many
    numbers as there are updates. Their inner products are those of the updates (the Gram matrix).
    """
    values, vectors = np.linalg.eigh(gram([one.update for one in ordered]))
    points = vectors * np.sqrt(np.maximum(values, 0.0))  # rounding may leave an eigenvalue a little below zero
    stand_ins = [replace(one, update=point) for one, point in zip(ordered, points, strict=True)]
    chosen, _ = _aggregate_block(strategy, {}, round_number, stand_ins)
    nearest = int(np.square(points - chosen).sum(axis=1).argmin())
    selected: Vector = ordered[nearest].update.copy()
    return selected


def gram(vectors: Sequence[Vector]) -> npt.NDArray[np.float64]:
    """Return the inner products of all vectors with each other in float64, shape (count, count), block by block.

    The products are those of differences from the first vector. They leave all distances as they are, and are exact
    where vectors hardly differ.
    """
    total = np.zeros((len(vectors), len(vectors)))
    for part in blocks(len(vectors[0]), max(1024, BLOCK // len(vectors))):
        block = np.stack([vector[part] for vector in vectors]).astype(np.float64)
        block -= block[0].copy()
        total += block @ block.T
    return total


def _set_moment(flower: Any, name: str, moment: npt.NDArray[Any]) -> None:
    """Set a moment of Flower's strategy, in the container that it expects."""
    if _MOMENTS[name] is list:
        setattr(flower, name, [moment])
    else:
        setattr(flower, name, {ARRAY_KEY: moment})


def _moments_of(flower: Any) -> Moments:
    """Return the moments of Flower's strategy, each as long as its block."""
    found: Moments = {}
    for name, container in _MOMENTS.items():
        kept = getattr(flower, name, None)
        if kept is None:
            continue
        key = 0 if container is list else ARRAY_KEY
        found[name] = np.asarray(kept[key], np.float32)
    return found


def _in_order(updates: Sequence[WeightedUpdate]) -> list[WeightedUpdate]:
    """Return the updates by site name: sums in the order of arrival would differ in their last bits."""
    return sorted(updates, key=lambda one: one.site)


def _as_reply(one: WeightedUpdate, array_record: Any, array: Any) -> Any:
    """Return a guarded update as a message of the form that Flower's strategies expect."""
    from flwr.app import Message, MetricRecord, RecordDict

    content = RecordDict(
        {
            "arrays": array_record({ARRAY_KEY: array(one.update)}),
            "metrics": MetricRecord({"num-examples": one.weight}),
        }
    )
    return Message(content, dst_node_id=1, message_type="train")
