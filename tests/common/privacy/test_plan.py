"""The plan: every number that the account depends on, found from the settings, equal at server and site, and frozen."""

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from tests.support.private import plan_of, private_config
from tsugiki.common.config.parse import parse, site_config
from tsugiki.common.errors import ConfigError
from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import MECHANISMS, epsilon_after, mean_noise, mechanism_of, releases_of
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.arrays import decode_levels, encode_levels

SIZE = 1000
each_mode = pytest.mark.parametrize("mode", MECHANISMS.names())


def problem(config, dimension=SIZE):
    """Return the one problem of a plan that has to be refused."""
    with pytest.raises(ConfigError) as caught:
        make_plan(config, dimension)
    (found,) = caught.value.problems
    assert found.hint
    return found


def test_a_run_without_privacy_has_no_plan():
    """Catches: a plan, and with it a ledger, for a run that promises nothing."""
    config = parse({})
    assert make_plan(config, SIZE) is None
    assert config.with_plan(None) is config


# From settings to numbers


@each_mode
def test_a_budget_is_kept_for_all_rounds_and_no_more(mode):
    """Catches: noise calibrated for one round, for another adversary than the mode is there against, or too much."""
    plan = plan_of(mode, SIZE, rounds=20, target_epsilon=4.0, delta=1e-6)
    who = mechanism_of(plan).budgeted[0]
    assert epsilon_after(plan, 20)[who] <= 4.0
    assert epsilon_after(plan, 21)[who] > 4.0
    assert epsilon_after(plan, 20)[who] > 4.0 * (1 - 2e-3)
    assert epsilon_after(plan, 0) == dict.fromkeys(releases_of(plan), 0.0)


def test_every_adversary_is_accounted_for():
    """Catches: the epsilon of one adversary told for all; the server's view left out."""
    central, openly = (epsilon_after(plan_of(mode, noise_multiplier=2.0), 5) for mode in ("central", "distributed"))
    assert central["uploads"] == math.inf
    assert central["release"] == pytest.approx(
        epsilon([releases_of(plan_of("central", noise_multiplier=2.0))["release"]] * 5, 1e-5)
    )
    assert openly["uploads"] > openly["release"]


def test_sampling_needs_less_noise():
    """Catches: calibration that does not count on the sampling which the account counts on."""
    options = {"clients": 100, "rounds": 5, "target_epsilon": 4.0}
    few = {"fraction_train": 0.1, "min_clients": 2}
    sampled = plan_of("central", sampling="poisson", strategy=few, **options)
    assert sampled.sampling_probability == 0.1
    assert sampled.noise_multiplier < 0.6 * plan_of("central", strategy=few, **options).noise_multiplier
    assert epsilon_after(sampled, 5)["release"] <= 4.0


def test_a_given_noise_multiplier_stays():
    """Catches: the budget that turns a given noise multiplier down (or up)."""
    assert plan_of("local", noise_multiplier=3.0, target_epsilon=1.0).noise_multiplier == 3.0
    assert plan_of("distributed", secure_aggregation=True).noise_multiplier == 0.0


def test_a_plan_made_from_its_own_numbers_is_the_same():
    """Catches: a resumed run, whose file has the plan's numbers, with another plan."""
    config = private_config("distributed", target_epsilon=3.0)
    plan = make_plan(config, SIZE)
    stated = config.with_plan(plan)
    assert make_plan(stated, SIZE) == plan
    assert stated.with_plan(plan) == stated
    assert stated.privacy.noise_multiplier == plan.noise_multiplier > 0


@pytest.mark.parametrize(
    ("raw", "clients"),
    [
        ({"privacy": {"enrolled_clients": 9}, "simulation": {"data": "x.csv", "clients": 5}}, 9),
        ({"simulation": {"data": "x.csv", "clients": 5}}, 5),
        ({"simulation": {"clients": 5}, "strategy": {"min_clients": 3}}, 3),
    ],
)
def test_how_many_clients_are_enrolled(raw, clients):
    """Catches: the simulation's default number of clients taken in a deployed run."""
    config = parse(raw)
    assert config.enrolled_clients == clients
    raw["privacy"] = {"mode": "central", "noise_multiplier": 1.0, **raw.get("privacy", {})}
    config = parse(raw)
    plan = make_plan(config, SIZE)
    assert plan.enrolled_clients == config.with_plan(plan).privacy.enrolled_clients == clients


@pytest.mark.parametrize(
    ("raw", "most"),
    [
        ({}, 1),
        ({"simulation": {"data": "a.csv", "clients": 60, "clients_per_site": 20}}, 20),
        ({"simulation": {"clients": 60, "clients_per_site": 20}}, 1),
        ({"privacy": {"max_clients_per_site": 5}, "simulation": {"data": "a.csv", "clients_per_site": 2}}, 5),
    ],
)
def test_how_many_clients_a_site_may_stand_for(raw, most):
    """Catches: a deployed gateway that is believed whatever it says; a simulation refused by default."""
    raw["privacy"] = {"mode": "central", "noise_multiplier": 1.0, **raw.get("privacy", {})}
    config = parse(raw)
    plan = make_plan(config, SIZE)
    assert plan.max_clients_per_site == config.with_plan(plan).privacy.max_clients_per_site == most


@each_mode
def test_a_site_makes_the_same_plan_from_what_it_is_sent(mode):
    """Catches: a number of the plan that does not travel, and a site that adds other noise than the account says."""
    options = {"clients": 30, "target_epsilon": 2.0, "ledger": "here.jsonl", "clip_norm": 0.3, "delta": 1e-6}
    config = private_config(mode, strategy={"min_clients": 7, "fraction_train": 0.5}, **options)
    plan = make_plan(config, SIZE)
    text = config.for_sites(plan)
    assert "here.jsonl" not in text
    assert json.loads(text)["privacy"]["noise_multiplier"] == plan.noise_multiplier > 0
    assert make_plan(site_config(text), SIZE) == plan


def test_a_site_needs_the_plan_of_a_simulation():
    """Catches: settings sent without the plan's numbers: a site does not know how many clients are simulated."""
    privacy = {"mode": "central", "noise_multiplier": 1.0}
    simulation = {"data": "x.csv", "clients": 50, "clients_per_site": 5}
    config = parse({"privacy": privacy, "simulation": simulation, "strategy": {"min_clients": 3}})
    plan = make_plan(config, SIZE)
    assert make_plan(site_config(config.for_sites(plan)), SIZE) == plan
    assert make_plan(site_config(config.for_sites()), SIZE) != plan


def test_a_plan_is_private_only_with_noise_that_nobody_can_foretell():
    """Catches: a seeded run, or one without noise, that calls itself private."""
    assert plan_of("central", noise_multiplier=1.0).private
    assert not plan_of("central", noise_multiplier=1.0, insecure_noise_seed=7).private
    assert not plan_of("distributed", secure_aggregation=True).private


def test_every_field_is_in_the_hash():
    """Catches: a field that could change under a running account."""
    plan = plan_of("distributed", noise_multiplier=1.0)
    others = {
        name: (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"
        for name, value in asdict(plan).items()
    }
    assert set(others) == {field.name for field in fields(plan)}
    hashes = {replace(plan, **{name: value}).sha256 for name, value in others.items()}
    assert len(hashes | {plan.sha256}) == len(others) + 1
    assert replace(plan).sha256 == plan.sha256


# What a sum is divided by, and what noise is left on it


def test_the_denominator_of_sampled_clients_is_known_beforehand():
    """Catches: a mean over those who were drawn: their number would be in every model."""
    sampled = plan_of(
        "central",
        clients=100,
        noise_multiplier=1.0,
        sampling="poisson",
        strategy={"fraction_train": 0.25, "min_clients": 2},
    )
    assert sampled.denominator == 25.0
    assert plan_of("central", clients=100, noise_multiplier=1.0, strategy={"fraction_train": 0.25}).denominator is None
    assert plan_of("central", noise_multiplier=1.0, sampling="poisson").denominator is None  # all of them, always


def test_the_price_of_dropout_tolerance():
    """Catches: shares by the number of clients that are asked: noise would be short when some do not answer."""
    plan = plan_of("distributed", clients=100, noise_multiplier=2.0, honest_fraction=0.5, strategy={"min_clients": 50})
    assert mean_noise(plan, 100) * 100 == pytest.approx(2.0 * math.sqrt(100 / (0.5 * 50)))
    assert mean_noise(plan, 25) * 25 == pytest.approx(2.0)  # those 25 that are honest


# Integers


def extreme(plan, clients):
    """Return the largest sum that a plan allows for: all clients push one coordinate, and noise of 8 sigma does too."""
    per_client = math.sqrt(mechanism_of(plan).client_variance(plan))
    return clients * LEVELS + math.floor(8 * math.sqrt(clients) * per_client)


def holds(plan, clients):
    """Whether the extremes of a sum, as integers of the plan's width, come back as they were."""
    largest = extreme(plan, clients)
    sums = np.array([largest, -largest, 0, 1, -1], np.int64)
    return bool((decode_levels(encode_levels(sums, plan.modulus_bits), 5, plan.modulus_bits).unpacked() == sums).all())


@each_mode
@pytest.mark.parametrize("clients", [2, 100, 1_000, 10_000, 10**6])
@pytest.mark.parametrize("z", [0.0, 1.0, 8.0, 20.0])
def test_a_sum_cannot_wrap_around(mode, clients, z):
    """Catches: a modulus for one update instead of the sum, for a sum without its noise, or without the sign."""
    strategy = {"min_clients": min(clients, 100_000)}
    plan = plan_of(mode, clients=clients, noise_multiplier=z or 1.0, delta=1e-8, strategy=strategy)
    assert holds(plan if z else replace(plan, noise_multiplier=0.0), clients)
    assert plan.modulus_bits in (32, 40, 48, 56)


def test_most_noise_and_most_clients_fit_too():
    """Catches: a width that the largest settings go beyond."""
    strategy = {"min_clients": 2}
    for z in (1.0, 1e4):
        assert holds(plan_of("local", clients=10**7, noise_multiplier=z, delta=1e-8, strategy=strategy), 10**7)


def test_less_than_one_honest_client_is_refused():
    """Catches: shares of more than the whole noise, for which no integer is wide enough."""
    options = {"clients": 100, "noise_multiplier": 400.0, "honest_fraction": 0.05, "strategy": {"min_clients": 2}}
    with pytest.raises(ConfigError, match=r"privacy\.honest_fraction"):
        plan_of("distributed", **options)


def test_shares_wrap_where_integers_are_narrower():
    """Catches: a check of the head-room above that any width passes."""
    plan = plan_of("distributed", clients=100_000, noise_multiplier=8.0, delta=1e-6)
    assert plan.modulus_bits == 40
    largest = np.array([extreme(plan, 100_000)])
    assert decode_levels(encode_levels(largest, 40), 1, 40).unpacked() == largest
    assert decode_levels(encode_levels(largest, 32), 1, 32).unpacked() != largest


@each_mode
def test_much_noise_is_planned_as_it_is(mode):
    """Catches: the limit of a sampler that draws in parts since, applied to the plan."""
    plan = plan_of(mode, noise_multiplier=5000.0)
    assert plan.noise_multiplier == 5000.0
    assert holds(plan, 4)


@each_mode
def test_a_budget_that_cannot_be_kept_is_refused(mode):
    """Catches: a traceback out of the calibration."""
    found = problem(private_config(mode, rounds=100_000, target_epsilon=1e-4))
    assert found.key in ("privacy.target_epsilon", "privacy.noise_multiplier")


def test_a_budget_without_noise_is_calibrated_wherever_it_is_read():
    """Catches: a site that is sent a budget and no noise multiplier, and takes it for a run without noise."""
    raw = {"privacy": {"mode": "local", "target_epsilon": 8.0}, "strategy": {"min_clients": 4}}
    plan = make_plan(parse(raw), 10)
    assert plan.private
    assert plan.noise_multiplier > 1
