"""Any bytes give a value or an error of ours: each fuzz target, with the same examples in every run."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzzing import TARGETS, Target, probe
from tsugiki.common.errors import WireError

EXAMPLES = 60
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_give_a_value_or_a_code(name):
    """Catches: a decoder that raises what nobody expects, takes memory as the sender says, or never ends."""
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS)
    @given(target.examples)
    def run(example):
        probe(target, example)

    run()


def _raise(error):
    raise error


def _grow(example):
    return bytearray(100_000_000)


@pytest.mark.parametrize(
    ("decode", "expected"),
    [
        (lambda example: example, None),
        (lambda example: _raise(WireError("no array", code="decode")), None),
        (lambda example: _raise(ValueError("no array")), ValueError),
        (lambda example: _raise(RecursionError()), RecursionError),
        (_grow, AssertionError),
    ],
)
def test_a_probe_finds_what_it_looks_for(decode, expected):
    """Catches: a probe that lets pass what the test above is there for."""
    target = Target(st.none(), decode)
    if expected is None:
        probe(target, None)
    else:
        with pytest.raises(expected):
            probe(target, None)
