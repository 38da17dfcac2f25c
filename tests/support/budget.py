"""Privacy plans for tests, and an accountant that shares no code with ours."""

import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.planning import make_plan

RELATION = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
LEVELS = 2**16


def private_config(
    mode: str, clients: int = 100, *, enrolled: int = 0, rounds: int = 100, strategy: Any = None, **privacy: Any
) -> RunConfig:
    """Return a run with a privacy mode; without a budget or noise, epsilon is 8.

    Args:
        mode: of the run.
        clients: the least number in a sum.
        enrolled: 0: as many.
        rounds: planned.
        strategy: more settings of it.
        privacy: more settings of it.
    """
    if not {"target_epsilon", "noise_multiplier", "secure_aggregation"} & set(privacy):
        privacy["target_epsilon"] = 8.0
    sections = {
        "run": {"rounds": rounds},
        "strategy": {"min_clients": clients, **(strategy or {})},
        "privacy": {"mode": mode, "enrolled_clients": enrolled or clients, **privacy},
    }
    return parse(sections)


def private_plan(mode: str, clients: int = 100, *, dimension: int = 12_880, **settings: Any) -> Plan:
    """Return the plan of such a run."""
    plan = make_plan(private_config(mode, clients, **settings), dimension)
    assert plan is not None
    return plan


def independent_epsilon(release: Release, rounds: int, delta: float) -> float:
    """Return an epsilon by dp-accounting's own accountants; that of Skellam noise as if it were Gaussian."""
    if release.noise_multiplier == 0:
        return math.inf
    event = dp_accounting.GaussianDpEvent(release.noise_multiplier)
    if release.sampling_probability < 1:
        event = dp_accounting.PoissonSampledDpEvent(release.sampling_probability, event)
    renyi = RdpAccountant(neighboring_relation=RELATION).compose(event, rounds).get_epsilon(delta)
    if renyi > 100:  # beyond, a privacy loss distribution takes gigabytes: exact for a Gaussian alone
        return float(dp_accounting.get_epsilon_gaussian(release.noise_multiplier / math.sqrt(rounds), delta))
    return float(PLDAccountant(RELATION, 1e-3).compose(event, rounds).get_epsilon(delta))


def assert_accounted(found: float, release: Release, rounds: int, delta: float) -> None:
    """Assert that an epsilon is another accountant's; of Skellam noise, a little more than that of Gaussian noise."""
    exact = independent_epsilon(release, rounds, delta)
    if release.noise == "gaussian" or math.isinf(exact):
        assert found == pytest.approx(exact, rel=2e-3)
        return
    assert exact * (1 - 1e-6) <= found
    assert found <= skellam_epsilon(release.noise_multiplier, release.dimension, rounds, delta) * (1 + 1e-3)
    assert found <= 1.003 * exact or exact > 100


def skellam_epsilon(noise_multiplier: float, dimension: int, rounds: int, delta: float) -> float:
    """Return the Renyi bound of Skellam releases. Source: Agarwal et al. 2021, arXiv:2110.04995, theorem 3.5."""
    orders = [*range(2, 64), 72, 96, 128, 192, 256, 384, 512, 1024, 2048]
    variance = (LEVELS * noise_multiplier) ** 2
    taxicab = min(math.sqrt(dimension) * LEVELS, LEVELS**2)
    divergences = [
        order * LEVELS**2 / (2 * variance)
        + min(
            ((2 * order - 1) * LEVELS**2 + 6 * taxicab) / (4 * variance**2),
            3 * taxicab / (2 * variance),
        )
        for order in orders
    ]
    return float(compute_epsilon(orders, [rounds * divergence for divergence in divergences], delta)[0])
