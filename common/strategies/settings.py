"""The settings of the strategies, by which the server averages updates.

`server/run/aggregate.py` runs what is named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tsugiki.common.registry import Registry
from tsugiki.common.settings import StrategySettings

if TYPE_CHECKING:
    pass


STRATEGY_SETTINGS: Registry[type[StrategySettings]] = Registry("strategy")


@STRATEGY_SETTINGS.register("fedavg")
class FedAvgSettings(StrategySettings):
    """Weighted mean of the updates."""

    name: Literal["fedavg"] = Field(default="fedavg", description="the strategy")


@STRATEGY_SETTINGS.register("fedprox")
class FedProxSettings(StrategySettings):
    """FedAvg with a proximal term at the client."""

    name: Literal["fedprox"] = Field(default="fedprox", description="the strategy")
    proximal_mu: float = Field(default=0.01, ge=0, description="weight of (mu/2)*||local - global||^2")


@STRATEGY_SETTINGS.register("fedavgm")
class FedAvgMSettings(StrategySettings):
    """FedAvg with momentum at the server."""

    name: Literal["fedavgm"] = Field(default="fedavgm", description="the strategy")
    server_learning_rate: float = Field(default=1.0, gt=0, description="factor on the server's step")
    server_momentum: float = Field(default=0.5, gt=0, lt=1, description="share of the last step in the next")


@STRATEGY_SETTINGS.register("fedadam")
class FedAdamSettings(StrategySettings):
    """Adam at the server, on the mean update."""

    name: Literal["fedadam"] = Field(default="fedadam", description="the strategy")
    server_learning_rate: float = Field(default=1e-3, gt=0, description="step of the server's Adam")
    beta_1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta_2: float = Field(default=0.99, ge=0, lt=1, description="decay of the second moment")
    tau: float = Field(default=1e-3, gt=0, description="degree of adaptivity")


@STRATEGY_SETTINGS.register("fedmedian")
class FedMedianSettings(StrategySettings):
    """Coordinate-wise median of the updates."""

    name: Literal["fedmedian"] = Field(default="fedmedian", description="the strategy")


@STRATEGY_SETTINGS.register("krum")
class KrumSettings(StrategySettings):
    """The one update that is closest to its neighbours."""

    name: Literal["krum"] = Field(default="krum", description="the strategy")
    min_clients: int = Field(default=5, ge=1, le=100_000, description="quorum: at least 2 * num_malicious_sites + 3")
    num_malicious_sites: int = Field(default=1, ge=0, description="how many sites may lie")


@STRATEGY_SETTINGS.register("ffa")
class FfaSettings(StrategySettings):
    """LoRA with A frozen at its seeded values: the mean of B is exact."""

    name: Literal["ffa"] = Field(default="ffa", description="the strategy")


@STRATEGY_SETTINGS.register("rolora")
class RoloraSettings(StrategySettings):
    """LoRA's factors in turn, B in odd rounds and A in even ones: the mean of either is exact."""

    name: Literal["rolora"] = Field(default="rolora", description="the strategy")


@STRATEGY_SETTINGS.register("flora")
class FloraSettings(StrategySettings):
    """Exact sum of LoRA's products, merged into a second pair; sites train a fresh pair in each round."""

    name: Literal["flora"] = Field(default="flora", description="the strategy")
    merged_rank: int = Field(
        default=0,
        ge=0,
        le=65_536,
        description="rank of the pair that holds what earlier rounds have learned and travels to the sites; "
        "0: that of the layer, with which the sum is always exact",
    )


@STRATEGY_SETTINGS.register("svd")
class SvdSettings(StrategySettings):
    """Best approximation, of LoRA's rank, to the exact mean of the products; sites may have smaller ranks."""

    name: Literal["svd"] = Field(default="svd", description="the strategy")


WHOLE_RANK = 65_536
"""More than any layer has; each takes as much of it as it has."""


LORA_ONLY = ("ffa", "flora", "rolora", "svd")
"""Strategies that need LoRA's factors."""


EXACT_PRODUCTS = ("flora", "svd")
"""Strategies that form B A of every client, and so have to see each client's factors."""
