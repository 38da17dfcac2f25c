"""Other plans: their noise against the privacy notes, their epsilons against another accountant."""

import math
from dataclasses import replace

import dp_accounting
import pytest

from tests.support.budget import assert_accounted, independent_epsilon, private_config, private_plan
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.mechanisms import releases_of
from tsugiki.common.privacy.planning import make_plan
from tsugiki.server.budget.alternatives import (
    calibrated,
    everything_seen,
    levers,
    most_rounds,
    noise_on_mean,
    scaled,
    table,
    without_slack,
)

MODES = ("central", "distributed", "local")
SAMPLED = {"sampling": "poisson", "strategy": {"fraction_train": 0.1}}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("central", (0.060023, 0.0060023, 0.00060023)),
        ("distributed", (0.060023, 0.0060023, 0.00060023)),
        ("local", (0.60023, 0.18981, 0.060023)),
    ],
)
def test_the_noise_on_the_mean_is_that_of_the_privacy_notes(mode, expected):
    """Catches: a sum's noise taken for a mean's, a share for all of it; privacy notes, section 3, z = 6.0023."""
    for clients, value in zip((100, 1_000, 10_000), expected, strict=True):
        plan = private_plan(mode, clients, noise_multiplier=6.0023, clip_norm=1.0)
        assert noise_on_mean(plan, clients).coordinate == pytest.approx(value, rel=1e-4)
        double = replace(plan, clip_norm=2.0)
        assert noise_on_mean(double, clients).coordinate == pytest.approx(2 * value, rel=1e-4)
        assert noise_on_mean(double, clients).bound == pytest.approx(noise_on_mean(plan, clients).bound)


@pytest.mark.parametrize(
    ("dimension", "clients", "bound"),
    [(12_880, 100, 0.147), (12_880, 10_000, 14.7), (80, 100, 1.86), (80, 10_000, 186)],
)
def test_the_bound_is_that_of_the_privacy_notes(dimension, clients, bound):
    """Catches: a bound by coordinate instead of by norm; privacy notes, section 3, z = 6."""
    noise = noise_on_mean(private_plan("central", clients, noise_multiplier=6.0, dimension=dimension), clients)
    assert noise.bound == pytest.approx(bound, rel=4e-3)
    assert noise.norm == pytest.approx(noise.coordinate * math.sqrt(dimension))


def test_more_than_the_least_number_of_clients_and_dishonest_ones_make_more_noise():
    """Catches: the price of slack forgotten: z C / sqrt(h n_min n') on the mean."""
    plan = private_plan("distributed", 80, enrolled=100, honest_fraction=0.5, noise_multiplier=6.0)
    assert noise_on_mean(plan, 100).coordinate == pytest.approx(6.0 / math.sqrt(0.5 * 80 * 100))


def test_a_sampled_mean_is_divided_by_what_is_expected():
    """Catches: the number who came, which is secret, taken as the divisor."""
    plan = private_plan("central", 5, enrolled=1_000, noise_multiplier=2.0, **SAMPLED)
    assert noise_on_mean(plan, 90).coordinate == noise_on_mean(plan, 110).coordinate == pytest.approx(2.0 / 100)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [2.0, 8.0])
def test_calibration_finds_what_a_run_would(mode, target):
    """Catches: planned noise that is not the run's."""
    config = private_config(mode, target_epsilon=target)
    plan = make_plan(config, 5_000)
    assert calibrated(replace(plan, noise_multiplier=1.0, target_epsilon=0.0), target) == plan


@pytest.mark.parametrize(
    ("rounds", "target", "expected"), [(1, 8.0, 0.6002), (10, 8.0, 1.8981), (100, 8.0, 6.0023), (100, 2.0, 19.9381)]
)
def test_calibration_finds_the_values_of_the_privacy_notes(rounds, target, expected):
    """Catches: another relation or another composition; privacy notes, section 1.5."""
    plan = calibrated(private_plan("central", rounds=rounds), target)
    assert expected <= plan.noise_multiplier <= 1.001 * expected


def test_plans_that_no_run_would_accept_are_not_offered():
    """Catches: noise that does not exist in the table as if it could be had."""
    plan = private_plan("distributed", 4)
    assert calibrated(replace(plan, rounds=100_000), 0.5) is not None
    assert calibrated(replace(plan, mode="central", delta=1e-300), 1e-5) is None


@pytest.mark.parametrize("mode", MODES)
def test_every_epsilon_of_the_table_is_another_accountants(mode):
    """Catches: an adversary taken for another, rounds left out, an upload without its share."""
    plan = private_plan(mode, 50)
    rows = table(plan, 8.0, 50)
    assert [(row.clients, row.mode) for row in rows] == [(n, m) for n in (50, 100, 1_000, 10_000) for m in MODES]
    for row in rows:
        z, n, share = row.noise_multiplier, row.clients, math.sqrt(row.clients)
        expected = {
            "central": {"release": Release("gaussian", z), "uploads": Release("gaussian", 0.0)},
            "local": {"release": Release("gaussian", z), "uploads": Release("gaussian", z)},
            "distributed": {
                "release": Release("skellam", z * math.sqrt((n - 1) / n), dimension=12_880),
                "outsiders": Release("skellam", z, dimension=12_880),
                "sums": Release("skellam", z, dimension=12_880),
                "uploads": Release("skellam", z / share, dimension=12_880),
            },
        }[row.mode]
        assert set(row.epsilon) == set(expected)
        for who, release in expected.items():
            assert_accounted(row.epsilon[who], release, 100, 1e-5)
        assert 7.98 < row.epsilon["release"] <= 8.0
        assert row.noise.coordinate == pytest.approx(z / (share if row.mode == "local" else n))


def test_the_table_of_a_run_with_gateways_counts_what_they_know():
    """Catches: gateways left out of other plans; gateways of 100 clients in a plan for 100, which is refused."""
    plan = private_plan("distributed", 1_000, max_clients_per_site=100)
    rows = {row.clients: row for row in table(plan, 8.0, 1_000) if row.mode == "distributed"}
    for clients, known in ((100, 10), (1_000, 100), (10_000, 100)):
        noise = rows[clients].noise_multiplier * math.sqrt((clients - known) / clients)
        assert_accounted(rows[clients].epsilon["release"], Release("skellam", noise, dimension=12_880), 100, 1e-5)
        assert 7.98 < rows[clients].epsilon["release"] <= 8.0
    alone = private_plan("distributed", 2, max_clients_per_site=1)
    assert without_slack(alone, "distributed", 1).max_clients_per_site == 1
    lonely = next(row for row in table(replace(alone, max_clients_per_site=2), 8.0, 2) if row.mode == "distributed")
    assert lonely.noise is None


def test_what_the_server_sees_without_secure_aggregation_is_at_least_the_exact_gaussian():
    """Catches: the sum's epsilon told for an upload's; privacy notes, section 0: 209, 1,612, 14,588 by exact Gaussians.

    Ours are Skellam noise: where so little noise is left, its bound is up to twice as high.
    """
    rows = {row.clients: row for row in table(private_plan("distributed"), 8.0, 100) if row.mode == "distributed"}
    for clients, published in ((100, 209), (1_000, 1_612), (10_000, 14_588)):
        exact = dp_accounting.get_epsilon_gaussian(6.0023 / math.sqrt(100 * clients), 1e-5)
        assert exact == pytest.approx(published, rel=3e-3)
        row = rows[clients]
        exact = dp_accounting.get_epsilon_gaussian(row.noise_multiplier / math.sqrt(100 * clients), 1e-5)
        assert exact < row.epsilon["uploads"] < 2 * exact


def test_what_belongs_to_a_mode_does_not_go_to_another():
    """Catches: local noise that is amplified by sampling, and a share made larger for dishonest clients of a server."""
    sampled = private_plan("central", 5, enrolled=1_000, noise_multiplier=1.0, **SAMPLED)
    assert without_slack(sampled, "local", 100).sampling_probability == 1
    assert without_slack(sampled, "central", 100).enrolled_clients == 1_000
    shared = private_plan("distributed", honest_fraction=0.5)
    assert without_slack(shared, "distributed", 10).honest_fraction == 0.5
    assert without_slack(shared, "central", 10).honest_fraction == 1


def test_rows_without_an_allowed_delta_are_refused():
    """Catches: a delta with which one client may be given away, in the table."""
    rows = table(private_plan("central", delta=1e-3), 8.0, 100)
    assert [row.noise is None for row in rows if row.mode == "central"] == [False, True, True]


WEAK_SIGNAL = {
    "central": (private_plan("central", 100), 100),
    "local": (private_plan("local", 1_000, dimension=500, rounds=10), 1_000),
    "distributed": (private_plan("distributed", 80, enrolled=100, honest_fraction=0.9), 100),
    "sampled": (private_plan("central", 5, enrolled=700, rounds=20, **SAMPLED), 70),
    "given": (private_plan("central", 400, noise_multiplier=9.0), 400),
}


@pytest.mark.parametrize("name", WEAK_SIGNAL)
def test_each_lever_alone_brings_the_bound_to_one_and_a_little_less_does_not(name):
    """Catches: a number that does not help when it is followed, or asks for much more than is needed."""
    plan, clients = WEAK_SIGNAL[name]
    target = plan.target_epsilon or independent_epsilon(releases_of(plan)["release"], plan.rounds, plan.delta)

    def bound(n=clients, d=plan.dimension, rounds=plan.rounds, epsilon=target):
        changed = replace(scaled(plan, n / clients), dimension=round(d), rounds=round(rounds))
        return noise_on_mean(calibrated(changed, epsilon), n).bound

    assert bound() < 1
    needed = {lever.name: lever.needed for lever in levers(plan, clients, target)}
    assert list(needed) == ["clients", "parameters", "rounds", "epsilon"]
    assert 1 <= bound(n=needed["clients"]) < 1.02
    assert 1 <= bound(d=needed["parameters"]) < 1.02
    assert bound(rounds=needed["rounds"]) >= 1
    assert bound(rounds=needed["rounds"] + 1 + 0.02 * needed["rounds"]) < 1
    assert 1 <= bound(epsilon=needed["epsilon"]) < 1.02


def test_so_many_clients_that_delta_has_to_be_smaller():
    """Catches: a number of clients for which the run file would be refused."""
    plan = private_plan("local", 4, dimension=1_000)
    lever = levers(plan, 4, 8.0)[0]
    assert lever.needed > 30_000
    assert lever.delta is None
    more = levers(replace(plan, dimension=100_000), 4, 8.0)[0]
    assert more.delta * more.needed < 1 <= plan.delta * more.needed
    changed = calibrated(replace(scaled(plan, more.needed / 4), dimension=100_000, delta=more.delta), 8.0)
    assert 1 <= noise_on_mean(changed, more.needed).bound < 1.02


def test_levers_that_cannot_help_say_so():
    """Catches: zero rounds, or zero parameters, recommended."""
    needed = {lever.name: lever.needed for lever in levers(private_plan("central", 2, target_epsilon=0.5), 2, 0.5)}
    assert needed["rounds"] is None
    assert needed["parameters"] is None
    assert needed["clients"] > 1_000
    assert needed["epsilon"] > 8


def test_most_rounds_is_the_last_that_fits():
    """Catches: a budget passed by one round, or never used up."""
    plan = private_plan("central", noise_multiplier=6.0)
    release = releases_of(plan)["release"]
    for most in (0.1, 1.0, 4.0, 100.0):
        allowed = most_rounds(release, most, plan)
        assert allowed == 0 or independent_epsilon(release, allowed, plan.delta) <= most * 1.001
        assert allowed == plan.rounds or independent_epsilon(release, allowed + 1, plan.delta) > most * 0.999


def test_everything_seen_has_both_sides_of_secure_aggregation():
    """Catches: a server that is told to see less than it would."""
    for secure in (False, True):
        plan = private_plan("distributed", secure_aggregation=secure, target_epsilon=8.0)
        assert list(everything_seen(plan)) == ["release", "outsiders", "sums", "uploads"]
    assert list(everything_seen(private_plan("central"))) == ["release", "uploads"]
