"""The settings of strategies: found by name, with ranges that keep the averaging sensible."""

import pytest
from pydantic import ValidationError

from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ConfigError
from tsugiki.common.strategies import STRATEGIES


def test_a_run_finds_its_strategys_settings():
    """Catches: settings that no run file can reach."""
    assert STRATEGIES.names()
    for name in STRATEGIES.names():
        chosen = parse({"strategy": {"name": name}}).strategy
        assert type(chosen) is STRATEGIES.get(name).Settings


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fedprox", {"proximal_mu": -0.1}),
        ("fedavgm", {"server_momentum": 1.0}),
        ("fedavgm", {"server_learning_rate": 0.0}),
        ("fedadam", {"beta_2": 1.0}),
        ("fedadam", {"tau": 0.0}),
        ("krum", {"num_malicious_sites": -1}),
        ("fedavg", {"server_momentum": 0.5}),
    ],
)
def test_values_that_make_no_sense_are_refused(name, values):
    """Catches: momentum that never ends, a step of nothing, a setting of another strategy taken in silence."""
    with pytest.raises(ValidationError):
        STRATEGIES.get(name).Settings(**values)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"strategy": {"name": "svd"}, "adapter": {"method": "ia3"}}, "adapter.method"),
        ({"strategy": {"name": "ffa"}, "adapter": {"freeze_a": "no"}}, "adapter.freeze_a"),
        ({"strategy": {"name": "rolora"}, "adapter": {"freeze_a": "yes"}}, "adapter.freeze_a"),
        ({"strategy": {"name": "svd"}, "adapter": {"use_dora": True}}, "adapter.use_dora"),
        ({"strategy": {"name": "flora"}, "adapter": {"init": "orthogonal"}}, "adapter.init"),
        ({"strategy": {"name": "svd"}, "train": {"persist_optimizer": True}}, "train.persist_optimizer"),
        ({"strategy": {"name": "fedavg"}, "simulation": {"ranks": [2, 4]}}, "simulation.ranks"),
        ({"strategy": {"name": "svd"}, "adapter": {"init": "orthogonal"}}, "adapter.init"),
        ({"strategy": {"name": "svd"}, "simulation": {"ranks": [99]}}, "simulation.ranks"),
        ({"strategy": {"name": "svd"}, "simulation": {"ranks": 4}}, "simulation.ranks"),
        (
            {"strategy": {"name": "svd"}, "simulation": {"data": "a.csv", "clients_per_site": 2}},
            "simulation.clients_per_site",
        ),
        (
            {"strategy": {"name": "rolora"}, "train": {"persist_optimizer": True, "bias_correction": False}},
            "train.bias_correction",
        ),
        ({"strategy": {"name": "krum", "min_clients": 4, "num_malicious_sites": 1}}, "strategy.min_clients"),
        ({"strategy": {"name": "flora"}, "privacy": {"mode": "central", "target_epsilon": 8.0}}, "strategy.name"),
        ({"strategy": {"name": "rolora"}, "privacy": {"examples": {"target_epsilon": 8.0}}}, "strategy.name"),
    ],
)
def test_what_does_not_go_together_is_refused(sections, key):
    """Catches: a strategy that would silently not find its factors, or be less than exact."""
    with pytest.raises(ConfigError) as caught:
        parse(sections)
    assert key in [problem.key for problem in caught.value.problems]


def test_strategies_set_what_follows_for_the_factors():
    """Catches: `ffa` with A trained, `flora` without a pair to merge into, and both where nobody asked."""
    assert parse({"strategy": {"name": "ffa"}}).adapter.freeze_a == "yes"
    assert parse({"strategy": {"name": "flora"}}).adapter.merged_rank > 4096
    assert parse({"strategy": {"name": "flora", "merged_rank": 12}}).adapter.merged_rank == 12
    plain = parse({"strategy": {"name": "svd"}}).adapter
    assert (plain.freeze_a, plain.merged_rank) == ("auto", 0)


def test_a_private_run_is_told_of_its_strategy_alone():
    """Catches: a setting refused that nobody wrote: privacy freezes A by itself."""
    with pytest.raises(ConfigError) as caught:
        parse({"strategy": {"name": "svd"}, "privacy": {"mode": "central", "target_epsilon": 8.0}})
    assert [problem.key for problem in caught.value.problems] == ["strategy.name"]
