"""Strategies that work on LoRA's factors: a mean of A and B is not the mean of B A."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tsugiki.common.adapters.lora import LoraSettings
from tsugiki.common.errors import Problem
from tsugiki.common.settings import AdapterSettings, StrategySettings
from tsugiki.common.strategies.base import STRATEGIES, Strategy, WeightedUpdate
from tsugiki.common.strategies.factors import A, B
from tsugiki.common.strategies.products import Layer, Matrix, Product, Tensors, layers, mean_change, project, shares
from tsugiki.common.wire.spec import AdapterSpec, Vector, pack, unpack

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg

    from tsugiki.common.config.run import RunConfig

WHOLE_RANK = 65_536
"""A rank above that of any layer; each layer uses its own full rank instead."""


class FactorStrategy(Strategy):
    """A strategy on LoRA's factors. Heads and other tensors are averaged."""

    needs_lora = True
    coordinate_wise = True

    def make(self) -> FedAvg:
        """Return Flower's FedAvg."""
        from flwr.serverapp.strategy import FedAvg

        return FedAvg()


class FfaSettings(StrategySettings):
    """LoRA with A frozen at its seeded values: the mean of B is exact."""

    name: Literal["ffa"] = Field(default="ffa", description="The strategy: how the server combines updates.")


@STRATEGIES.register("ffa")
class Ffa(FactorStrategy):
    """A frozen, mean of B: exact, since B A is linear in B. Source: Sun et al. 2024 (ICLR), section 4."""

    name = "ffa"
    Settings = FfaSettings
    linear = True
    needs_each_update = False
    freezes_a = True


class RoloraSettings(StrategySettings):
    """LoRA's factors in turn, B in odd rounds and A in even ones: the mean of either is exact."""

    name: Literal["rolora"] = Field(default="rolora", description="The strategy: how the server combines updates.")


@STRATEGIES.register("rolora")
class Rolora(FactorStrategy):
    """B in odd rounds, A in even ones, so that the mean of a round is exact.

    Source: Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
    arXiv:2502.01755, algorithm 1.
    """

    name = "rolora"
    Settings = RoloraSettings
    needs_each_update = False
    same_part = False

    def problems(self, config: RunConfig) -> list[Problem]:
        """Return a problem if the optimiser would count the steps of both factors together."""
        train = config.train
        if not train.persist_optimizer or train.bias_correction:
            return []
        expected = "true with strategy rolora and persist_optimizer, which count the steps of both factors apart"
        return [Problem("train.bias_correction", "false", expected, "remove it")]

    def trained_part(self, spec: AdapterSpec, round_number: int) -> AdapterSpec:
        """Return all but A in odd rounds, all but B in even ones. B comes first: A learns nothing while B is zero."""
        part = super().trained_part(spec, round_number)
        resting = A if round_number % 2 else B
        return replace(part, tensors=tuple(tensor for tensor in part.tensors if resting not in tensor.name))


class ProductStrategy(FactorStrategy):
    """A strategy that forms the exact mean of the clients' B A, and computes new factors from it."""

    sees_factors = True
    same_part = False

    @abstractmethod
    def factors(self, layer: Layer, before: Tensors, mean: Product, draw: np.random.Generator) -> dict[str, Matrix]:
        """Return the new factors of a layer, by name.

        Args:
            layer: the layer.
            before: the adapter that sites started from, by tensor name.
            mean: the mean of the sites' B A in this layer, merged pair included.
            draw: random numbers of this run and round.
        """

    def combine(
        self,
        spec: AdapterSpec,
        before: Vector,
        update: Vector,
        updates: Sequence[WeightedUpdate],
        draw: np.random.Generator,
    ) -> Vector:
        """Return the step to the new factors; heads and other tensors are as in `update`."""
        old = unpack(before, spec)
        moved = unpack(update, spec)
        changes = [unpack(one.update, spec) for one in updates]
        new: dict[str, Matrix] = {}
        with threadpool_limits(1, "blas"):  # its threads cost more than they save here
            for layer in layers(spec):
                new |= self.factors(layer, old, mean_change(layer, old, changes, shares(updates)), draw)
        # A step is a difference, so that heads and other tensors can be taken from `update` as they are.
        stepped = {name: (values - old[name]).astype(np.float32) for name, values in new.items()}
        return pack({**moved, **stepped}, spec)


class FloraSettings(StrategySettings):
    """Exact sum of LoRA's products, merged into a second pair; sites train a fresh pair in each round."""

    name: Literal["flora"] = Field(default="flora", description="The strategy: how the server combines updates.")
    merged_rank: int = Field(
        default=0,
        ge=0,
        le=65_536,
        description="Rank of the pair that holds what earlier rounds have learned, and that travels to the sites. "
        "With 0 it is the rank of the layer, and the sum is always exact. Set it to send less.",
    )


@STRATEGIES.register("flora")
class Flora(ProductStrategy):
    """A fresh pair in each round, and a merged pair that stacks, rank by rank, what all sites have learned.

    Source: Wang et al. 2024, arXiv:2409.05976, section 3 (FLoRA). The paper adds the stack to the base's weights; here
    the base is unchanged, and a second pair that sites do not train holds the sum, exactly while its rank suffices.
    """

    name = "flora"
    Settings = FloraSettings
    fills_merged_pair = True

    def complete(self, adapter: AdapterSettings) -> AdapterSettings:
        """Return LoRA's settings with a merged pair of the strategy's rank, else the adapter's, else the full one."""
        if not isinstance(adapter, LoraSettings):
            return adapter
        rank = self.settings.merged_rank or adapter.merged_rank or WHOLE_RANK
        return adapter.model_copy(update={"merged_rank": rank})

    def factors(self, layer: Layer, before: Tensors, mean: Product, draw: np.random.Generator) -> dict[str, Matrix]:
        """Return a merged pair that holds the mean, and a fresh pair that changes nothing."""
        pair = layer.pair
        merged = layer.merged
        assert merged is not None  # noqa: S101  # `complete` sets adapter.merged_rank
        b, a = project(mean, len(before[merged.a]))
        rank, width = before[pair.a].shape
        # A is drawn as LoRA draws it; with B at zero, the fresh pair does not change the layer.
        fresh = draw.uniform(-1, 1, (rank, width)) / np.sqrt(width)
        return {merged.b: b, merged.a: a, pair.b: np.zeros((len(b), rank)), pair.a: fresh}


class SvdSettings(StrategySettings):
    """Best approximation, of LoRA's rank, to the exact mean of the products; sites may have smaller ranks."""

    name: Literal["svd"] = Field(default="svd", description="The strategy: how the server combines updates.")


@STRATEGIES.register("svd")
class Svd(ProductStrategy):
    """The best factors of the mean of B A. Source: Bai et al. 2024, arXiv:2402.11505, section 3 (FlexLoRA)."""

    name = "svd"
    Settings = SvdSettings
    mixed_ranks = True

    def factors(self, layer: Layer, before: Tensors, mean: Product, draw: np.random.Generator) -> dict[str, Matrix]:
        """Return the pair of the adapter's rank that is nearest to the mean."""
        b, a = project(mean, len(before[layer.pair.a]))
        return {layer.pair.b: b, layer.pair.a: a}
