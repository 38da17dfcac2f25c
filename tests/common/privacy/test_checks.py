"""What is wrong with a run's privacy settings is told before any site is contacted, all of it, each with its mend."""

import pytest

from tsugiki.common.config.parse import parse
from tsugiki.common.config.rules import privacy_problems
from tsugiki.common.errors import ConfigError

NOISY = {"mode": "central", "noise_multiplier": 1.0}
HIDDEN = {"mode": "distributed", "secure_aggregation": True}


def problems(privacy, **sections):
    """Return {key: problem} of a run's settings."""
    try:
        parse({"privacy": privacy, **sections})
    except ConfigError as error:
        return {problem.key: problem for problem in error.problems}
    return {}


CASES = {
    "no noise": ({"mode": "central"}, {}, "privacy.target_epsilon", "tsugiki budget"),
    "no noise, locally": ({"mode": "local"}, {}, "privacy.target_epsilon", "tsugiki budget"),
    "no noise, in shares": ({"mode": "distributed"}, {}, "privacy.target_epsilon", "tsugiki budget"),
    "no sum": (NOISY, {"strategy": {"name": "fedmedian"}}, "strategy.name", "fedavg"),
    "krum": (NOISY, {"strategy": {"name": "krum"}}, "strategy.name", "fedavg"),
    "metrics of private rows": (NOISY, {"evaluation": {"at_sites": True}}, "evaluation.at_sites", "remove"),
    "masks, centrally": ({**NOISY, "secure_aggregation": True}, {}, "privacy.secure_aggregation", "distributed"),
    "honesty, centrally": ({**NOISY, "honest_fraction": 0.5}, {}, "privacy.honest_fraction", "remove"),
    "sampling, locally": ({**NOISY, "mode": "local", "sampling": "poisson"}, {}, "privacy.sampling", "remove"),
    "sampling, in shares": ({**NOISY, "mode": "distributed", "sampling": "poisson"}, {}, "privacy.sampling", "remove"),
    "delta": ({**NOISY, "delta": 0.01, "enrolled_clients": 100}, {}, "privacy.delta", "1e-03"),
    "delta of a simulation": (
        {**NOISY, "delta": 0.01},
        {"simulation": {"data": "x.csv", "clients": 100}},
        "privacy.delta",
        "1e-03",
    ),
    "a sum of one": (HIDDEN, {"strategy": {"min_clients": 1}}, "strategy.min_clients", "raise it"),
    "too few sites": (
        {**HIDDEN, "min_sites": 4},
        {"simulation": {"data": "x.csv", "clients": 30, "clients_per_site": 10}, "strategy": {"min_clients": 30}},
        "privacy.min_sites",
        "clients_per_site",
    ),
    "a member that knows all noise but a part of a share": (
        {"mode": "distributed", "noise_multiplier": 1.0, "honest_fraction": 0.6},
        {"strategy": {"min_clients": 3}},
        "strategy.min_clients",
        "raise it",
    ),
    "a member that knows all noise": (
        {"mode": "distributed", "target_epsilon": 8.0},
        {"strategy": {"min_clients": 1}},
        "strategy.min_clients",
        "raise it",
    ),
    "a gateway that knows all noise": (
        {"mode": "distributed", "target_epsilon": 8.0, "max_clients_per_site": 50},
        {"strategy": {"min_clients": 50}},
        "strategy.min_clients",
        "raise it",
    ),
    "a simulated gateway that knows all noise": (
        {"mode": "distributed", "target_epsilon": 8.0},
        {"simulation": {"data": "x.csv", "clients": 60, "clients_per_site": 30}, "strategy": {"min_clients": 30}},
        "strategy.min_clients",
        "clients_per_site",
    ),
    "more sites than clients": ({**HIDDEN, "min_sites": 5, "enrolled_clients": 4}, {}, "privacy.min_sites", "lower"),
    "sites for nothing": ({**NOISY, "min_sites": 3}, {}, "privacy.min_sites", "remove"),
    "sites without privacy": ({"min_sites": 3}, {}, "privacy.min_sites", "privacy.mode"),
    "gateways without privacy": ({"max_clients_per_site": 3}, {}, "privacy.max_clients_per_site", "privacy.mode"),
    "gateways that are refused": (
        {**NOISY, "max_clients_per_site": 2},
        {"simulation": {"data": "x.csv", "clients": 40, "clients_per_site": 10}},
        "privacy.max_clients_per_site",
        "raise",
    ),
    "a quorum above all": (
        {**NOISY, "enrolled_clients": 5},
        {"strategy": {"min_clients": 6}},
        "strategy.min_clients",
        "lower",
    ),
    "a budget for nothing": ({"target_epsilon": 1.0}, {}, "privacy.target_epsilon", "privacy.mode"),
    "noise for nothing": ({"noise_multiplier": 1.0}, {}, "privacy.noise_multiplier", "privacy.mode"),
    "masks for nothing": ({"secure_aggregation": True}, {}, "privacy.secure_aggregation", "privacy.mode"),
    "rows and bf16": (
        {"examples": {"target_epsilon": 1.0}},
        {"train": {"precision": "bf16"}},
        "train.precision",
        "remove",
    ),
    "rows and accumulation": (
        {"examples": {"noise_multiplier": 1.0}},
        {"train": {"gradient_accumulation_steps": 2}},
        "train.gradient_accumulation_steps",
        "",
    ),
}


@pytest.mark.parametrize(("privacy", "sections", "key", "mend"), CASES.values(), ids=list(CASES))
def test_a_problem_is_told_with_its_mend(privacy, sections, key, mend):
    """Catches: a promise that the run would not keep, accepted; a refusal that does not say what to do."""
    found = problems(privacy, **sections)
    assert list(found) == [key]
    assert mend in found[key].hint
    assert found[key].expected
    assert found[key].value


def test_the_mends_mend():
    """Catches: advice that leads to the next refusal."""
    assert not problems({**NOISY, "delta": 1e-3, "enrolled_clients": 100})
    assert not problems({**NOISY, "mode": "distributed", "secure_aggregation": True})
    assert not problems({**HIDDEN}, strategy={"min_clients": 2})
    assert not problems({"mode": "local", "target_epsilon": 3.0})
    shared = {"mode": "distributed", "target_epsilon": 8.0}
    assert not problems(shared, strategy={"min_clients": 2})
    assert not problems({**shared, "honest_fraction": 0.6}, strategy={"min_clients": 4})
    assert not problems({**shared, "honest_fraction": 0.2}, strategy={"min_clients": 10})  # 0.2 * 10 - 1 may round
    assert not problems({**shared, "max_clients_per_site": 50}, strategy={"min_clients": 51})
    assert not problems({"examples": {"target_epsilon": 1.0}}, train={"gradient_accumulation_steps": 1})


@pytest.mark.parametrize(
    "privacy",
    [
        {},
        {"delta": 0.5},
        NOISY,
        {"mode": "local", "target_epsilon": 8.0},
        {"mode": "distributed", "noise_multiplier": 1.0},
        HIDDEN,
        {**NOISY, "sampling": "poisson"},
        {**NOISY, "delta": 0.0099, "enrolled_clients": 100},
        {"examples": {"target_epsilon": 8.0}},
    ],
)
def test_what_is_right_is_not_refused(privacy):
    """Catches: a check that goes too far, and a bound that is off by one."""
    assert problems(privacy) == {}


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam"])
def test_strategies_that_need_the_sum_alone_are_allowed(strategy):
    """Catches: post-processing of the noisy mean refused."""
    assert problems(NOISY, strategy={"name": strategy}) == {}


def test_a_delta_of_exactly_one_over_the_clients_is_refused():
    """Catches: a mechanism that gives away one client at random, and calls itself private."""
    assert list(problems({**NOISY, "delta": 0.01, "enrolled_clients": 100})) == ["privacy.delta"]


def test_all_problems_at_once():
    """Catches: a refusal a run for each mistake."""
    found = problems(
        {"mode": "local", "secure_aggregation": True, "honest_fraction": 0.5, "sampling": "poisson", "delta": 0.9},
        strategy={"name": "fedmedian", "min_clients": 2},
        evaluation={"at_sites": True},
        train={"gradient_accumulation_steps": 2},
    )
    wanted = {"strategy.name", "evaluation.at_sites", "privacy.secure_aggregation", "privacy.honest_fraction"}
    assert set(found) == wanted | {"privacy.sampling", "privacy.delta"}


def test_a_right_run_has_no_problems():
    """Catches: a list that is never empty, or a function that wants more than the configuration."""
    assert privacy_problems(parse({})) == []


def test_metrics_of_rows_under_dp_sgd_are_refused():
    """Catches: exact metrics of rows that DP-SGD is to protect, because no client-level mode is on."""
    raw = {"privacy": {"examples": {"noise_multiplier": 1.0}}, "evaluation": {"at_sites": True}}
    with pytest.raises(ConfigError, match=r"evaluation\.at_sites = true: must be false with DP-SGD"):
        parse(raw)


@pytest.mark.parametrize(("each", "fits"), [(1, False), (2, True)])
def test_more_sites_than_a_sum_holds_are_refused(each, fits):
    """Catches: a run that every site refuses in its first round; clients behind gateways counted as sites."""
    raw = {
        "privacy": {"mode": "distributed", "secure_aggregation": True},
        "simulation": {"clients": 300, "clients_per_site": each, "data": "a.csv"},
    }
    if fits:
        assert parse(raw).privacy.secure_aggregation
        return
    with pytest.raises(ConfigError, match="with 300 sites: a sum has at most 255"):
        parse(raw)
