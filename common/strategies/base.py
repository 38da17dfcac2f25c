"""The base class of strategies: which part of the adapter sites train, and how the server combines their updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import Problem
from tsugiki.common.registry import Registry
from tsugiki.common.settings import AdapterSettings, StrategySettings
from tsugiki.common.wire.spec import AdapterSpec, Vector

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg

    from tsugiki.common.config.run import RunConfig

Moments = dict[str, npt.NDArray[np.float32]]
"""The arrays that a strategy keeps between rounds, each of shape (size,), by the attribute of Flower's strategy."""


@dataclass(frozen=True)
class WeightedUpdate:
    """One update that the server aggregates.

    Args:
        site: name of the site; updates are summed in the order of these names.
        update: local minus received adapter, shape (size,).
        weight: weight in a mean, at least 1: the site's rows, or fewer (`strategy.weighting`).
        clients: number of clients in the update; more than one if a gateway has averaged its clients.
    """

    site: str
    update: Vector
    weight: int
    clients: int = 1


class Strategy(ABC):
    """One way to combine the updates of a round. Instances hold settings only.

    The attributes say what a strategy needs. The rules between settings (`common/config/rules.py`) and the sites read
    them, so a new strategy is refused wherever it would not work.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[StrategySettings]]
    linear: ClassVar[bool] = False
    """Whether it needs only the weighted mean of the updates. The private modes compute nothing else."""
    needs_each_update: ClassVar[bool] = True
    """Whether it needs every update of a round. If not, the server adds updates up as they arrive and keeps none."""
    coordinate_wise: ClassVar[bool] = False
    """Whether Flower's strategy treats every number of the adapter by itself. Then it works on one block at a time."""
    selects: ClassVar[bool] = False
    """Whether Flower's strategy returns one of the updates, chosen by nothing but their distances from each other."""
    needs_lora: ClassVar[bool] = False
    """Whether it works on LoRA's factors A and B."""
    freezes_a: ClassVar[bool] = False
    """Whether A keeps its initial values, and only B is exchanged."""
    sees_factors: ClassVar[bool] = False
    """Whether it forms B A of each client. A gateway would send the mean of its clients' factors instead."""
    fills_merged_pair: ClassVar[bool] = False
    """Whether it adds what was learned to LoRA's second pair, which sites do not train (`adapter.merged_rank`)."""
    mixed_ranks: ClassVar[bool] = False
    """Whether sites may train only the first components of each LoRA pair."""
    same_part: ClassVar[bool] = True
    """Whether sites train the same numbers in every round. DP-SGD needs that."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def make(self) -> FedAvg:
        """Return Flower's strategy that averages the updates, with these settings."""

    def complete(self, adapter: AdapterSettings) -> AdapterSettings:
        """Return the adapter's settings, completed with the values that this strategy needs."""
        return adapter

    def problems(self, config: RunConfig) -> list[Problem]:
        """Return conflicts of this strategy with the run, except those that follow from its attributes.

        Args:
            config: the run. Its adapter is LoRA where `needs_lora` is set.
        """
        return []

    def trained_part(self, spec: AdapterSpec, round_number: int) -> AdapterSpec:
        """Return the part of an adapter that sites train and send back in a round; the rest stays as they received it.

        Args:
            spec: the spec of the whole adapter. Only the server changes its merged pairs.
            round_number: counted from 1.
        """
        return replace(spec, tensors=tuple(tensor for tensor in spec.tensors if tensor.part != "merged"))

    def combine(
        self,
        spec: AdapterSpec,
        before: Vector,
        update: Vector,
        updates: Sequence[WeightedUpdate],
        draw: np.random.Generator,
    ) -> Vector:
        """Return the server's step, shape (spec.size,); by default the step of Flower's strategy.

        Args:
            spec: the spec of the adapter.
            before: the adapter that sites started from, shape (spec.size,).
            update: the step that Flower's strategy computed from the updates, shape (spec.size,).
            updates: at least one, sorted by site name. Where `needs_each_update` is false, it is their mean alone.
            draw: random numbers of this run and round.
        """
        return update


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "tsugiki.strategies", Strategy)


def strategy_of(settings: StrategySettings) -> Strategy:
    """Return the strategy that a run's settings choose.

    Raises:
        RegistryError: it is not registered here.
    """
    return STRATEGIES.get(settings.name)(settings)


def names_with(trait: Callable[[type[Strategy]], bool]) -> tuple[str, ...]:
    """Return the names of all strategies with a trait, sorted."""
    return tuple(name for name in STRATEGIES.names() if trait(STRATEGIES.get(name)))
