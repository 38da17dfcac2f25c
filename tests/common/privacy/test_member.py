"""A site of the sums knows its own noise: what it learns by that is what the account of the models says.

The exact epsilon of Gaussian noise is computed here, by Balle and Wang 2018, arXiv:1805.06530, theorem 8.
"""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from scipy import optimize, stats

from tests.support.private import plan_of
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.errors import ConfigError
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import epsilon_after, mechanism_of
from tsugiki.common.privacy.noise import noise_generator

DELTA = 1e-5
SIZE = 200_000
TOLERANCE = 5.4 * math.sqrt(0.5 / SIZE)
"""Of a standard deviation's ratio to what it should be: a right one is outside once in ten million runs."""


def exact_epsilon(noise, rounds=1):
    """Return the epsilon of so many Gaussian releases, whose noise is given over their sensitivity."""
    shift = math.sqrt(rounds) / noise

    def left(value):
        lost = stats.norm.cdf(shift / 2 - value / shift)
        return lost - math.exp(value + stats.norm.logcdf(-shift / 2 - value / shift)) - DELTA

    return optimize.brentq(left, 0, 500, xtol=1e-12)


def plan_for(sites, *, size=SIZE, rounds=1, **options):
    """Return the plan of a distributed run with a budget of 8."""
    options = {"target_epsilon": 8.0, "delta": DELTA, "max_clients_per_site": 1, **options}
    return plan_of("distributed", size, clients=sites, rounds=rounds, **options)


def known_noise(plan, clients):
    """Return the noise of a site's clients, in levels: what the site itself has drawn and sent."""
    return mechanism_of(plan).client_noise(plan, noise_generator(), clients)


def unknown_noise(plan, sites, own):
    """Return the noise that is left of a sum after one of its sites has subtracted its own, over the clip norm."""
    total = ProtectedSum.empty(plan)
    total.add(np.zeros((sites - own, plan.dimension)))
    mine = known_noise(plan, own)
    seen = total.levels + mine  # the opened sum of null updates
    return float(np.std(seen - mine)) / LEVELS


def test_the_closed_form_here_is_the_published_one():
    """Catches: a wrong formula below, under which any account would look right. Values: privacy notes, section 1.5."""
    for noise, rounds, published in ((0.6002, 1, 8.0), (1.8981, 10, 8.0), (6.0023, 100, 8.0), (19.9381, 100, 2.0)):
        assert exact_epsilon(noise, rounds) == pytest.approx(published, rel=5e-4)


@pytest.mark.parametrize("sites", [2, 3, 4, 5])
def test_a_site_that_subtracts_its_own_noise_learns_no_more_than_is_claimed(sites):
    """Catches: an account in which a site's own noise hides the others from it: 11.35 where 8.00 was claimed."""
    plan = plan_for(sites)
    claimed = epsilon_after(plan, 1)["release"]
    left = unknown_noise(plan, sites, own=1) * (1 + TOLERANCE)
    assert exact_epsilon(left) <= claimed <= 8.0


@pytest.mark.parametrize(("clients", "own", "honest"), [(10, 4, 1.0), (10, 9, 1.0), (20, 3, 0.5)])
def test_a_gateway_that_subtracts_the_noise_of_all_its_clients_learns_no_more_either(clients, own, honest):
    """Catches: one share where a site may know those of all clients behind it; and dishonest ones that it counts on."""
    plan = plan_for(clients, max_clients_per_site=own, honest_fraction=honest)
    claimed = epsilon_after(plan, 1)["release"]
    silent = round(clients * (1 - honest))
    left = unknown_noise(plan, clients - silent, own) * (1 + TOLERANCE)
    assert exact_epsilon(left) <= claimed <= 8.0
    assert claimed > 8.0 * (1 - 2e-3)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("sites", [2, 3, 5, 10, 100])
def test_the_epsilon_of_a_site_is_that_of_another_account(sites, rounds, secure):
    """Catches: a bound below the exact epsilon of the noise that a site does not know, or 6 % above it."""
    plan = plan_for(sites, size=75_000, rounds=rounds, secure_aggregation=secure)
    printed = epsilon_after(plan, rounds)
    noise = plan.noise_multiplier / math.sqrt(sites) * math.sqrt(sites - 1)
    distributions = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-3).compose(GaussianDpEvent(noise), rounds)
    assert exact_epsilon(noise, rounds) <= printed["release"] <= 8.0
    assert printed["release"] == pytest.approx(exact_epsilon(noise, rounds), rel=1e-3)
    assert printed["release"] == pytest.approx(distributions.get_epsilon(DELTA), rel=2e-3)
    # Who is in no sum, outsider or server of opened sums, knows no noise.
    assert printed["outsiders"] == pytest.approx(exact_epsilon(plan.noise_multiplier, rounds), rel=1e-3)
    assert printed["outsiders"] < printed["release"]
    if secure:
        assert printed["sums"] == printed["outsiders"]


@pytest.mark.parametrize(
    "options",
    [{"sites": 1}, {"sites": 2, "honest_fraction": 0.75}, {"sites": 50, "max_clients_per_site": 50}],
    ids=["alone", "half a share", "one gateway"],
)
def test_a_plan_in_which_a_site_may_know_nearly_all_noise_is_refused(options):
    """Catches: a plan whose epsilon for another site is infinite, or made for less than one honest client."""
    with pytest.raises(ConfigError, match=r"strategy\.min_clients.*a site knows the noise of its own") as caught:
        plan_for(options.pop("sites"), **options)
    (found,) = caught.value.problems
    assert found.hint


def test_modes_without_shares_of_noise_stay():
    """Catches: a site that is taken to know the server's noise, or another client's."""
    for mode in ("central", "local"):
        plan = plan_of(mode, clients=1, rounds=1, target_epsilon=8.0, delta=DELTA, max_clients_per_site=50)
        assert plan.noise_multiplier == pytest.approx(0.6002, rel=1e-3)
        assert "outsiders" not in epsilon_after(plan, 1)
