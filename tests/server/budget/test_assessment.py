"""A run's plan, judged: who learns how much, what dropouts cost, and whether there is anything to learn from."""

import math
from dataclasses import replace

import pytest

from tests.support.budget import assert_accounted, independent_epsilon, private_plan
from tsugiki.common.errors import UsageError
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.mechanisms import releases_of
from tsugiki.server.budget.alternatives import noise_on_mean
from tsugiki.server.budget.assessment import _scaled_epsilon, assess, check_hope, clients_asked, judge


def assessed(mode, clients=100, **settings):
    """Return what is said about a plan in which all clients take part."""
    plan = private_plan(mode, clients, **settings)
    return assess(plan, plan.enrolled_clients, True, plan.target_epsilon or 8.0)


def told(found):
    """Return the adversaries' epsilons by name."""
    return {view.who: view.epsilon for view in found.views}


def test_each_adversary_sees_what_its_mode_shows():
    """Catches: the trusted server called private, and an adversary whose view the settings change left out."""
    assert told(assessed("central"))["uploads"] == math.inf
    local = told(assessed("local"))
    assert local["release"] == local["uploads"] <= 8.0
    for secure in (False, True):
        found = assessed("distributed", secure_aggregation=secure, target_epsilon=8.0)
        assert told(found)["outsiders"] == told(found)["sums"] < told(found)["release"] <= 8.0
        assert told(found)["uploads"] > 200
        here = {"release": True, "outsiders": True, "sums": secure, "uploads": not secure}
        assert {view.who: view.here for view in found.views} == here
        assert {view.who for view in found.views if view.budget == 8.0} == {"release", *(["sums"] if secure else [])}


@pytest.mark.parametrize("mode", ["central", "distributed", "local"])
@pytest.mark.parametrize(("rounds", "delta"), [(1, 1e-5), (25, 1e-6), (100, 1e-5)])
def test_every_epsilon_is_another_accountants(mode, rounds, delta):
    """Catches: rounds or delta that are not the plan's."""
    found = assessed(mode, rounds=rounds, delta=delta)
    releases = {**releases_of(replace(found.plan, secure_aggregation=True)), **releases_of(found.plan)}
    assert set(told(found)) == set(releases)
    for who, release in releases.items():
        assert_accounted(told(found)[who], release, rounds, delta)


def test_a_sampled_release_is_amplified_and_the_servers_view_is_not():
    """Catches: the secret of who was asked kept from the one who asked; privacy notes, section 1.5: z = 0.9359."""
    settings = {"sampling": "poisson", "strategy": {"fraction_train": 0.1}}
    plan = private_plan("central", 5, enrolled=1_000, **settings)
    found = assess(plan, 100, True, 8.0)
    assert plan.noise_multiplier == pytest.approx(0.9359, rel=1e-3)
    assert told(found) == {"release": pytest.approx(8.0, rel=2e-3), "uploads": math.inf}
    assert [noise.clients for noise in found.noise] == [100]


def test_between_any_two_updates_the_noise_counts_half():
    """Catches: zero-out adjacency sold as strict local privacy; the sensitivity is 2 C."""
    found = assessed("local")
    upload = releases_of(found.plan)["uploads"]
    halved = replace(upload, noise_multiplier=upload.noise_multiplier / 2)
    assert found.strict_epsilon == pytest.approx(independent_epsilon(halved, 100, 1e-5), rel=2e-3)
    assert found.strict_epsilon > 2 * told(found)["uploads"]
    assert assessed("central").strict_epsilon is None


def test_missing_noise_costs_what_the_privacy_notes_say():
    """Catches: a share of the standard deviation taken for one of the variance; section 1.3: 8.53, 9.16, 12.26."""
    plan = private_plan("central", noise_multiplier=6.0023)
    costs = [_scaled_epsilon(plan, "release", share) for share in (0.9, 0.8, 0.5)]
    assert costs == pytest.approx([8.53, 9.16, 12.26], abs=5e-3)


def test_a_sum_over_too_few_clients_costs_more():
    """Catches: dropouts counted from those who came instead of from the least number; a site taken for an outsider."""
    found = assessed("distributed", enrolled=150)
    assert [(one.clients, one.share) for one in found.dropouts] == [(90, 0.9), (80, 0.8), (50, 0.5)]
    for one in found.dropouts:
        left = found.plan.noise_multiplier * math.sqrt((one.clients - 1) / 100)
        assert_accounted(one.epsilon, Release("skellam", left, dimension=12_880), 100, 1e-5)
    costs = [one.epsilon for one in found.dropouts]
    assert 8.0 < costs[0] < costs[1] < costs[2]
    assert [one.clients for one in assessed("distributed", 4).dropouts] == [3, 2]
    alone = assessed("distributed", 2).dropouts
    assert [(one.clients, one.epsilon) for one in alone] == [(1, math.inf)]
    assert assessed("central").dropouts == assessed("local").dropouts == ()


def test_more_clients_than_the_least_are_too_much_noise():
    """Catches: the price of slack left out: sqrt(n' / (h n_min)) times the noise of a sum."""
    found = assessed("distributed", 80, enrolled=100, honest_fraction=0.8)
    assert found.growth == pytest.approx(math.sqrt(100 / 64))
    assert [noise.clients for noise in found.noise] == [80, 100]
    on_sum = found.noise[-1].coordinate * 100
    assert on_sum == pytest.approx(found.growth * found.plan.noise_multiplier)
    assert assessed("central", 80, enrolled=100).growth == 1.0


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [(0.01, "hopeless"), (0.099, "hopeless"), (0.1, "hard"), (0.99, "hard"), (1.0, "possible"), (math.inf, "no-noise")],
)
def test_the_verdict_follows_from_the_bound(bound, verdict):
    """Catches: a plan that drowns in noise called possible."""
    assert judge(bound) == verdict


def test_the_verdict_is_on_all_clients_and_levers_come_with_a_bad_one():
    """Catches: advice where none is needed, and none where it is."""
    good = assessed("central", 1_000)
    assert (good.verdict, good.levers) == ("possible", ())
    bad = assessed("distributed", 4, enrolled=120)
    assert bad.verdict == "hopeless"
    assert [lever.name for lever in bad.levers] == ["clients", "parameters", "rounds", "epsilon"]
    assert bad.noise[-1] == noise_on_mean(bad.plan, 120)
    between = assessed("distributed", 50, enrolled=120)
    assert [judge(noise.bound) for noise in between.noise] == ["hopeless", "hard"]
    assert between.verdict == "hard"


def test_a_budget_that_the_noise_does_not_keep_ends_the_run():
    """Catches: a run that stops long before its last round, planned as if it did not."""
    found = assessed("local", noise_multiplier=6.0, target_epsilon=3.0, rounds=25)
    assert found.rounds_allowed < 25
    release = releases_of(found.plan)["uploads"]
    spent = [independent_epsilon(release, found.rounds_allowed + more, 1e-5) for more in (0, 1)]
    assert spent[0] <= 3.0 < spent[1]
    assert assessed("local").rounds_allowed == assessed("local", noise_multiplier=6.0).rounds_allowed == 100


def test_sums_without_noise_have_no_epsilon():
    """Catches: secure aggregation alone taken for differential privacy."""
    found = assessed("distributed", secure_aggregation=True)
    assert set(told(found).values()) == {math.inf}
    assert (found.verdict, found.growth, found.dropouts, found.levers) == ("no-noise", 1.0, (), ())
    assert found.noise[-1].coordinate == 0


def test_a_plan_without_hope_is_refused_and_one_with_little_is_not():
    """Catches: a budget spent for noise; and a rule of thumb that forbids what only looks hard."""
    hopeless = private_plan("distributed", 4, target_epsilon=1.0)
    assert assess(hopeless, 4, True, 1.0).verdict == "hopeless"
    with pytest.raises(UsageError, match="Nothing can be learned") as caught:
        check_hope(hopeless, 1.0)
    assert caught.value.code == "plan-hopeless"
    assert "--yes" in caught.value.hint
    hard = replace(hopeless, noise_multiplier=hopeless.noise_multiplier / 1000, dimension=1000)
    assert assess(hard, 4, True, 1.0).verdict in ("hard", "possible")
    check_hope(hard, 1.0)


def test_all_clients_that_are_asked_count():
    """Catches: a large federation that is refused by the noise of its smallest sum, or a sample taken for everybody."""
    plan = private_plan("distributed", 10, enrolled=1_000)
    assert [clients_asked(plan, share) for share in (1.0, 0.5, 0.001)] == [1000, 500, 10]
    sampled = private_plan("central", 5, enrolled=1_000, sampling="poisson", strategy={"fraction_train": 0.1})
    assert clients_asked(sampled, 0.1) == 100
