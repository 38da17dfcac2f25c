"""The settings of strategies: found by name, with ranges that keep the averaging sensible."""

import pytest
from pydantic import ValidationError

from common.config import parse
from common.strategies import STRATEGY_SETTINGS


def test_a_run_finds_its_strategys_settings():
    """Catches: settings that no run file can reach."""
    assert STRATEGY_SETTINGS.names()
    for name in STRATEGY_SETTINGS.names():
        chosen = parse({"strategy": {"name": name}}).strategy
        assert type(chosen) is STRATEGY_SETTINGS.get(name)


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
        STRATEGY_SETTINGS.get(name)(**values)
