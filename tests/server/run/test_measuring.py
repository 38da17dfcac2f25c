"""When the aggregation error is measured."""

from types import SimpleNamespace

import numpy as np
import pytest

from tsugiki.common.config.parse import parse
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec
from tsugiki.server.run import measuring
from tsugiki.server.run.measuring import Pace, label_skew, measures_error

LORA = AdapterSpec(
    "t",
    "lora",
    "{}",
    "0" * 64,
    "float32",
    tuple(TensorSpec(f"x.lora_{half}.default.weight", (2, 2), "adapter") for half in "AB"),
)
PLAIN = AdapterSpec("t", "ia3", "{}", "0" * 64, "float32", (TensorSpec("w", (3,), "adapter"),))
SITES = [SimpleNamespace(clients=1)] * 3


def test_label_skew_is_the_distance_beyond_chance():
    """Catches: a random split of few rows called skewed; sites of one class each that are not."""
    draw = np.random.default_rng(7)
    even = draw.multinomial(50, np.full(20, 1 / 20), size=100).astype(float)
    assert label_skew(even) < 0.02
    apart = np.eye(5) * 1000
    assert label_skew(apart) == pytest.approx(0.8, abs=0.05)  # 1 less the share of a site's own class
    uneven = np.array([[500.0, 500.0], [900.0, 100.0]])
    assert label_skew(uneven) == pytest.approx(0.2, abs=0.02)


def test_measuring_takes_at_most_a_twentieth_of_the_time():
    """Catches: a measurement in every round however long it takes; one that is never made again."""
    pace = Pace()
    due = []
    for number in range(1, 41):
        if pace.is_due(number):
            due.append(number)
            pace.took(number, seconds=6.0, round_s=10.0)
    assert due == [1, 13, 25, 37]
    assert 6.0 * len(due) <= 0.05 * 10.0 * 48


def test_a_short_measurement_is_made_in_every_round():
    """Catches: rounds of milliseconds, in tests and demos, that lack their error."""
    pace = Pace()
    pace.took(1, seconds=0.01, round_s=0.001)
    assert pace.is_due(2)
    pace.took(2, seconds=1.0, round_s=0.0)
    assert not pace.is_due(1000)


@pytest.mark.parametrize(
    ("strategy", "spec", "sites", "wanted"),
    [
        ({}, LORA, SITES, True),
        ({"aggregation_error": "off"}, LORA, SITES, False),
        ({}, PLAIN, SITES, False),
        ({}, LORA, [*SITES, SimpleNamespace(clients=2)], False),
    ],
)
def test_it_is_measured_only_where_there_is_an_error(strategy, spec, sites, wanted):
    """Catches: updates kept for nothing: switched off, without LoRA, or with a gateway among the sites."""
    config = parse({"strategy": strategy})
    assert measures_error(config, spec, Pace(), 1, sites) is wanted
    assert measures_error(config, spec, Pace(2), 1, sites) is False


def test_large_updates_are_not_kept_for_the_measurement_alone(monkeypatch):
    """Catches: gigabytes written in a round for one number in a log."""
    monkeypatch.setattr(measuring, "MOST_BYTES", 4 * LORA.size * 3 - 1)
    assert not measures_error(parse({}), LORA, Pace(), 1, SITES)
    assert measures_error(parse({"strategy": {"name": "svd"}}), LORA, Pace(), 1, SITES)
