"""Flower's own strategies do the averaging, on guarded updates.

After the guard the accepted updates are handed to a strategy as if the sites had sent them in the order of their
names, with the current model at zero: the strategy then works in update space. There Krum's distances do not drown
in the rounding of large weights, and adaptive optimisers see the pseudo-gradient they are defined on (Reddi et al.
2021, arXiv:2003.00295, algorithm 2). What it returns is added to the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.registry import Registry
from tsugiki.common.settings import StrategySettings
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.strategies.settings import STRATEGY_SETTINGS
from tsugiki.common.wire.arrays import ARRAY_KEY
from tsugiki.common.wire.spec import Vector

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg

    Maker = Any

Moments = dict[str, npt.NDArray[np.float64]]
"""What a strategy remembers between rounds (`m_t`, `v_t`, `momentum_vector`), by attribute name."""

STRATEGIES: Registry[Maker] = Registry("strategy")
"""Makers of Flower strategies, under the names of `tsugiki.common.strategies.settings.STRATEGY_SETTINGS`."""

_MOMENTS = {"m_t": dict, "v_t": dict, "momentum_vector": list}
"""In what Flower's strategies keep them: arrays by name, or in order. There is one array here."""


@STRATEGIES.register("svd")
@STRATEGIES.register("flora")
@STRATEGIES.register("rolora")
@STRATEGIES.register("ffa")
@STRATEGIES.register("fedavg")
def _fedavg(settings: Any) -> FedAvg:
    """McMahan et al. 2017, arXiv:1602.05629, algorithm 1; `server/run/factors.py` has what `flora` and `svd` add."""
    from flwr.serverapp.strategy import FedAvg

    return FedAvg()


@STRATEGIES.register("fedprox")
def _fedprox(settings: Any) -> FedAvg:
    """Li et al. 2020, arXiv:1812.06127, algorithm 2; the term itself lives in the client's loop."""
    from flwr.serverapp.strategy import FedProx

    return FedProx(proximal_mu=settings.proximal_mu)


@STRATEGIES.register("fedavgm")
def _fedavgm(settings: Any) -> FedAvg:
    """Hsu et al. 2019, arXiv:1909.06335, section 4."""
    from flwr.serverapp.strategy import FedAvgM

    return FedAvgM(server_learning_rate=settings.server_learning_rate, server_momentum=settings.server_momentum)


@STRATEGIES.register("fedadam")
def _fedadam(settings: Any) -> FedAvg:
    """Reddi et al. 2021, arXiv:2003.00295, algorithm 2."""
    from flwr.serverapp.strategy import FedAdam

    return FedAdam(eta=settings.server_learning_rate, beta_1=settings.beta_1, beta_2=settings.beta_2, tau=settings.tau)


@STRATEGIES.register("fedmedian")
def _fedmedian(settings: Any) -> FedAvg:
    """Yin et al. 2018, arXiv:1803.01498, algorithm 1, option 1."""
    from flwr.serverapp.strategy import FedMedian

    return FedMedian()


@STRATEGIES.register("krum")
def _krum(settings: Any) -> FedAvg:
    """Blanchard et al. 2017, section 4 (NeurIPS 30)."""
    from flwr.serverapp.strategy import Krum

    return Krum(num_malicious_nodes=settings.num_malicious_sites)


def aggregate(
    settings: StrategySettings, state: Mapping[str, npt.NDArray[Any]], round_: int, accepted: Sequence[WeightedUpdate]
) -> tuple[Vector, Moments]:
    """Return the aggregated update, shape (size,), and what the strategy wants to remember.

    Nothing is kept on an object between rounds, so that a checkpoint holds everything.

    Args:
        settings: which strategy, and its settings.
        state: what the last round returned; empty in the first.
        round_: counted from 1.
        accepted: at least one, in any order.
    """
    from flwr.app import Array, ArrayRecord

    logging.getLogger("flwr").setLevel(logging.ERROR)  # it would report counts that the guard has already recorded
    strategy: Any = STRATEGIES.get(settings.name)(settings)
    ordered = sorted(accepted, key=lambda reply: reply.site)
    zero = np.zeros_like(ordered[0].update)
    if hasattr(strategy, "momentum_vector"):
        strategy.current_arrays = ArrayRecord({ARRAY_KEY: Array(zero)})
    elif hasattr(strategy, "current_arrays"):
        strategy.current_arrays = {ARRAY_KEY: zero}
    for name, moment in state.items():
        kept = np.array(moment)
        setattr(strategy, name, [kept] if _MOMENTS[name] is list else {ARRAY_KEY: kept})
    arrays, _ = strategy.aggregate_train(round_, [_as_reply(reply, ArrayRecord, Array) for reply in ordered])
    remembered = {
        name: np.asarray(getattr(strategy, name)[0 if kind is list else ARRAY_KEY], np.float64)
        for name, kind in _MOMENTS.items()
        if getattr(strategy, name, None) is not None
    }
    return arrays[ARRAY_KEY].numpy().astype(np.float32), remembered


def _as_reply(reply: WeightedUpdate, array_record: Any, array: Any) -> Any:
    """Return a guarded update as a message of the form that Flower's strategies expect."""
    from flwr.app import Message, MetricRecord, RecordDict

    content = RecordDict(
        {
            "arrays": array_record({ARRAY_KEY: array(reply.update)}),
            "metrics": MetricRecord({"num-examples": reply.weight}),
        }
    )
    return Message(content, dst_node_id=1, message_type="train")


def missing_implementations() -> set[str]:
    """Return names with settings but no strategy, or the other way round; a contract test wants none."""
    return set(STRATEGIES.names()) ^ set(STRATEGY_SETTINGS.names())
