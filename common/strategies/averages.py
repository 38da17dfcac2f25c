"""Strategies that Flower implements: means, server optimisers on the mean, and robust aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from tsugiki.common.errors import Problem
from tsugiki.common.settings import StrategySettings
from tsugiki.common.strategies.base import STRATEGIES, Strategy, WeightedUpdate
from tsugiki.common.wire.spec import AdapterSpec, Vector

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

    from tsugiki.common.config.run import RunConfig


class _MeanSettings(StrategySettings):
    """Settings of the strategies whose step is the mean update times a rate."""

    server_learning_rate: float = Field(
        default=1.0,
        gt=0,
        description="Factor on the mean update. Raise it, to at most the number of sites, if sites take one or few "
        "small steps between two averages; with many local steps a factor of 2 can already diverge. Lower it when "
        "the metric goes up and down from round to round.",
    )


class _Mean(Strategy):
    """The weighted mean of the updates, times the server's rate."""

    linear = True
    needs_each_update = False
    coordinate_wise = True

    def combine(
        self,
        spec: AdapterSpec,
        before: Vector,
        update: Vector,
        updates: Sequence[WeightedUpdate],
        draw: np.random.Generator,
    ) -> Vector:
        """Return the mean update, scaled by the server's rate."""
        rate = self.settings.server_learning_rate
        if rate == 1:
            return update
        return update * np.float32(rate)


class FedAvgSettings(_MeanSettings):
    """Weighted mean of the updates."""

    name: Literal["fedavg"] = Field(default="fedavg", description="The strategy: how the server combines updates.")


@STRATEGIES.register("fedavg")
class FedAvg(_Mean):
    """Weighted mean. Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1."""

    name = "fedavg"
    Settings = FedAvgSettings

    def make(self) -> FlowerFedAvg:
        """Return Flower's FedAvg."""
        from flwr.serverapp.strategy import FedAvg

        return FedAvg()


class FedProxSettings(_MeanSettings):
    """FedAvg with a proximal term at the client."""

    name: Literal["fedprox"] = Field(default="fedprox", description="The strategy: how the server combines updates.")
    proximal_mu: float = Field(
        default=0.01,
        ge=0,
        description="Weight of (mu/2)*||local - global||^2 in the loss at a site. Raise it when sites with "
        "different data drift apart in a round.",
    )


@STRATEGIES.register("fedprox")
class FedProx(_Mean):
    """Weighted mean; the proximal term is in the client's loop.

    Source: Li et al. 2020, arXiv:1812.06127, algorithm 2.
    """

    name = "fedprox"
    Settings = FedProxSettings

    def make(self) -> FlowerFedAvg:
        """Return Flower's FedProx."""
        from flwr.serverapp.strategy import FedProx

        return FedProx(proximal_mu=self.settings.proximal_mu)


class FedAvgMSettings(StrategySettings):
    """FedAvg with momentum at the server."""

    name: Literal["fedavgm"] = Field(default="fedavgm", description="The strategy: how the server combines updates.")
    server_learning_rate: float = Field(
        default=1.0,
        gt=0,
        description="Factor on the server's step. Lower it when the metric goes up and down from round to round.",
    )
    server_momentum: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of the last step that the next one repeats. Lower it when the metric goes up and down "
        "from round to round.",
    )


@STRATEGIES.register("fedavgm")
class FedAvgM(Strategy):
    """Momentum on the mean update. Source: Hsu et al. 2019, arXiv:1909.06335, section 4."""

    name = "fedavgm"
    Settings = FedAvgMSettings
    linear = True
    needs_each_update = False
    coordinate_wise = True

    def make(self) -> FlowerFedAvg:
        """Return Flower's FedAvgM."""
        from flwr.serverapp.strategy import FedAvgM

        return FedAvgM(
            server_learning_rate=self.settings.server_learning_rate, server_momentum=self.settings.server_momentum
        )


class FedAdamSettings(StrategySettings):
    """Adam at the server, on the mean update."""

    name: Literal["fedadam"] = Field(default="fedadam", description="The strategy: how the server combines updates.")
    server_learning_rate: float = Field(
        default=3e-2,
        gt=0,
        description="Learning rate of the server's Adam: a bound on how far a number moves in a round. Lower it, for "
        "example to 1e-2, when the metric goes up and down from round to round.",
    )
    beta_1: float = Field(default=0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    beta_2: float = Field(default=0.99, ge=0, lt=1, description="Decay of Adam's second moment.")
    tau: float = Field(
        default=1e-3,
        gt=0,
        description="Added to the root of Adam's second moment. Raise it to make Adam less adaptive.",
    )


@STRATEGIES.register("fedadam")
class FedAdam(Strategy):
    """Adam on the mean update. Source: Reddi et al. 2021, arXiv:2003.00295, algorithm 2."""

    name = "fedadam"
    Settings = FedAdamSettings
    linear = True
    needs_each_update = False
    coordinate_wise = True

    def make(self) -> FlowerFedAvg:
        """Return Flower's FedAdam."""
        from flwr.serverapp.strategy import FedAdam

        return FedAdam(
            eta=self.settings.server_learning_rate,
            beta_1=self.settings.beta_1,
            beta_2=self.settings.beta_2,
            tau=self.settings.tau,
        )


class FedMedianSettings(StrategySettings):
    """Coordinate-wise median of the updates."""

    name: Literal["fedmedian"] = Field(
        default="fedmedian", description="The strategy: how the server combines updates."
    )


@STRATEGIES.register("fedmedian")
class FedMedian(Strategy):
    """Median of each coordinate. Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option 1."""

    name = "fedmedian"
    Settings = FedMedianSettings
    coordinate_wise = True

    def make(self) -> FlowerFedAvg:
        """Return Flower's FedMedian."""
        from flwr.serverapp.strategy import FedMedian

        return FedMedian()


class TrimmedMeanSettings(StrategySettings):
    """Coordinate-wise mean of the updates without the extremes."""

    name: Literal["trimmed_mean"] = Field(
        default="trimmed_mean", description="The strategy: how the server combines updates."
    )
    min_clients: int = Field(
        default=5, ge=1, le=100_000, description="The quorum: at least 1 / trim_fraction, so that something is trimmed."
    )
    trim_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=0.5,
        description="Share of the updates that is left out at either end, for each number of the adapter, rounded "
        "down. It has to cover the sites that may lie: 0.2 covers one of five to nine. With three sites set 0.34.",
    )


@STRATEGIES.register("trimmed_mean")
class TrimmedMean(Strategy):
    """Mean of each coordinate without its extremes.

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option 2.
    """

    name = "trimmed_mean"
    Settings = TrimmedMeanSettings
    coordinate_wise = True

    def make(self) -> FlowerFedAvg:
        """Return Flower's FedTrimmedAvg."""
        from flwr.serverapp.strategy import FedTrimmedAvg

        return FedTrimmedAvg(beta=self.settings.trim_fraction)

    def problems(self, config: RunConfig) -> list[Problem]:
        """Return a problem if nothing would be trimmed from a round of the quorum."""
        settings: TrimmedMeanSettings = self.settings
        if int(settings.trim_fraction * settings.min_clients) >= 1:
            return []
        expected = "at least 1 / trim_fraction, or nothing is left out"
        return [Problem("strategy.min_clients", str(settings.min_clients), expected, "raise either of them")]


class KrumSettings(StrategySettings):
    """The one update that is closest to its neighbours."""

    name: Literal["krum"] = Field(default="krum", description="The strategy: how the server combines updates.")
    min_clients: int = Field(
        default=5, ge=1, le=100_000, description="The quorum: at least 2 * num_malicious_sites + 3."
    )
    num_malicious_sites: int = Field(
        default=1,
        ge=0,
        description="How many sites may send false updates. Raise it only with more sites: see min_clients.",
    )


@STRATEGIES.register("krum")
class Krum(Strategy):
    """The update closest to its neighbours. Source: Blanchard et al. 2017, section 4 (NeurIPS 30)."""

    name = "krum"
    Settings = KrumSettings
    selects = True

    def make(self) -> FlowerFedAvg:
        """Return Flower's Krum."""
        from flwr.serverapp.strategy import Krum

        return Krum(num_malicious_nodes=self.settings.num_malicious_sites)

    def problems(self, config: RunConfig) -> list[Problem]:
        """Return a problem if the quorum is so small that lying sites could outvote the others."""
        settings: KrumSettings = self.settings
        if settings.min_clients >= 2 * settings.num_malicious_sites + 3:
            return []
        expected = "at least 2 * num_malicious_sites + 3, which krum needs"
        return [Problem("strategy.min_clients", str(settings.min_clients), expected, "raise min_clients")]
