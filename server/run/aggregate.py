"""From guarded updates to one step of the adapter.

Flower's own strategies do the averaging. After the guard the updates are handed to one as if the sites had sent them
in the order of their names, with the current model at zero: the strategy then works in update space. There Krum's
distances do not drown in the rounding of large weights, and adaptive optimisers see the pseudo-gradient they are
defined on (Reddi et al. 2021, arXiv:2003.00295, algorithm 2). What it returns is added to the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.config.run import RunConfig
from tsugiki.common.rng import generator
from tsugiki.common.strategies import Strategy, WeightedUpdate, strategy_of
from tsugiki.common.strategies.base import Moments
from tsugiki.common.wire.arrays import ARRAY_KEY
from tsugiki.common.wire.spec import AdapterSpec, Vector
from tsugiki.server.run.checkpoint import State

_MOMENTS = {"m_t": dict, "v_t": dict, "momentum_vector": list}
"""In what Flower's strategies keep them: arrays by name, or in order. There is one array here."""


def step(
    config: RunConfig, spec: AdapterSpec, state: State, updates: Sequence[WeightedUpdate]
) -> tuple[Vector, Moments]:
    """Return the step of the round after `state`, shape (spec.size,), and what the strategy wants to remember.

    Args:
        config: the run.
        spec: of the adapter.
        state: after the last round.
        updates: at least one, in any order.
    """
    strategy = strategy_of(config.strategy)
    round_number = state.round + 1
    update, moments = aggregate(strategy, state.strategy, round_number, updates)
    draw = generator(config.run.seed, "fresh-factors", round_number)
    return strategy.combine(spec, state.vector, update, _in_order(updates), draw), moments


def aggregate(
    strategy: Strategy,
    moments: Mapping[str, npt.NDArray[Any]],
    round_number: int,
    updates: Sequence[WeightedUpdate],
) -> tuple[Vector, Moments]:
    """Return what Flower's strategy makes of the updates, shape (size,), and what it wants to remember.

    Nothing is kept on an object between rounds, so that a checkpoint holds everything.

    Args:
        strategy: of the run.
        moments: what the last round returned; empty in the first.
        round_number: counted from 1.
        updates: at least one, in any order.
    """
    from flwr.app import Array, ArrayRecord

    logging.getLogger("flwr").setLevel(logging.ERROR)  # it would report counts that the guard has already recorded
    flower: Any = strategy.make()
    ordered = _in_order(updates)
    zero = np.zeros_like(ordered[0].update)
    if hasattr(flower, "momentum_vector"):
        flower.current_arrays = ArrayRecord({ARRAY_KEY: Array(zero)})
    elif hasattr(flower, "current_arrays"):
        flower.current_arrays = {ARRAY_KEY: zero}
    for name, moment in moments.items():
        kept = np.array(moment)
        setattr(flower, name, [kept] if _MOMENTS[name] is list else {ARRAY_KEY: kept})
    arrays, _ = flower.aggregate_train(round_number, [_as_reply(one, ArrayRecord, Array) for one in ordered])
    remembered = {
        name: np.asarray(getattr(flower, name)[0 if kind is list else ARRAY_KEY], np.float64)
        for name, kind in _MOMENTS.items()
        if getattr(flower, name, None) is not None
    }
    return arrays[ARRAY_KEY].numpy().astype(np.float32), remembered


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
