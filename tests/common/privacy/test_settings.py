"""The settings of `[privacy]`, and their form as Flower's run config."""

import pytest
from pydantic import ValidationError

from tsugiki.common.config.files import from_run_config, read, to_run_config, to_toml
from tsugiki.common.config.parse import parse, site_config
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError
from tsugiki.common.privacy.mechanisms import MECHANISMS
from tsugiki.common.privacy.settings import ExamplePrivacySection, PrivacySection

EXAMPLES = {"target_epsilon": 3.0, "delta": 1e-4}


def refused(**settings):
    """Whether settings are refused, and where."""
    with pytest.raises(ValidationError) as caught:
        PrivacySection(**settings)
    return [".".join(map(str, error["loc"])) for error in caught.value.errors()]


def test_nothing_is_promised_by_default():
    """Catches: a default that adds noise, or one that only looks as if it did."""
    privacy = PrivacySection()
    assert (privacy.mode, privacy.noise_multiplier, privacy.target_epsilon) == ("none", 0.0, 0.0)
    assert (privacy.sampling, privacy.honest_fraction, privacy.insecure_noise_seed) == ("fixed", 1.0, 0)
    assert not privacy.secure_aggregation
    assert not privacy.examples.enabled
    assert parse({}).privacy == privacy


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mode": "global"}, "mode"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": float("inf")}, "clip_norm"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"noise_multiplier": -0.1}, "noise_multiplier"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier"),
        ({"honest_fraction": 0.0}, "honest_fraction"),
        ({"honest_fraction": 1.1}, "honest_fraction"),
        ({"secure_aggregation": "yes"}, "secure_aggregation"),
        ({"sampling": "uniform"}, "sampling"),
        ({"enrolled_clients": -1}, "enrolled_clients"),
        ({"insecure_noise_seed": -1}, "insecure_noise_seed"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"examples": {"epsilon": 1.0}}, "examples.epsilon"),
        ({"examples": {"max_grad_norm": 0.0}}, "examples.max_grad_norm"),
        ({"examples": {"delta": 1.0}}, "examples.delta"),
        ({"examples": "none"}, "examples"),
        ({"examples": "{broken"}, "examples"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, key):
    """Catches: a misspelt or impossible setting that leaves the default in force, which promises nothing."""
    assert refused(**settings) == [key]


def test_every_mode_but_none_has_a_mechanism():
    """Catches: a mode that can be asked for and is not there."""
    for mode in MECHANISMS.names():
        assert PrivacySection(mode=mode).mode == mode


@pytest.mark.parametrize(
    ("settings", "enabled"),
    [
        ({}, False),
        ({"delta": 1e-6, "max_grad_norm": 2.0}, False),
        ({"target_epsilon": 1.0}, True),
        ({"noise_multiplier": 1.0}, True),
    ],
)
def test_rows_are_protected_once_there_is_a_budget_or_noise(settings, enabled):
    """Catches: DP-SGD that is on, or off, by something that is not noise."""
    assert ExamplePrivacySection(**settings).enabled is enabled


def test_examples_travel_as_text():
    """Catches: a table that Flower's run config cannot carry, or that comes back as a string."""
    assert PrivacySection(examples='{"target_epsilon": 3.0, "delta": 0.0001}').examples == ExamplePrivacySection(
        **EXAMPLES
    )
    config = parse({"privacy": {"examples": EXAMPLES, "mode": "central", "noise_multiplier": 0.5}})
    flat = to_run_config(config)
    assert isinstance(flat["privacy.examples"], str)
    assert from_run_config(flat) == config
    assert from_run_config({"privacy.examples": ""}).privacy.examples == ExamplePrivacySection()


def test_a_broken_text_of_examples_is_a_problem_of_the_file():
    """Catches: a traceback for a slip in Flower's run config."""
    with pytest.raises(ConfigError) as caught:
        from_run_config({"privacy.examples": "{broken"})
    assert [problem.key for problem in caught.value.problems] == ["privacy.examples"]


def test_a_private_run_survives_its_own_file(tmp_path):
    """Catches: a resumed run with other privacy settings than it began with."""
    config = parse({"privacy": {"mode": "distributed", "target_epsilon": 2.5, "delta": 1e-6, "examples": EXAMPLES}})
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert read(tmp_path / "run.toml") == config


def test_sites_are_told_all_but_where_the_ledger_is():
    """Catches: a setting that a site needs for its own plan left out; the operator's paths given away."""
    config = parse(
        {"privacy": {"mode": "local", "noise_multiplier": 2.0, "ledger": "/home/op/x.jsonl", "examples": EXAMPLES}}
    )
    told = site_config(config.for_sites()).privacy
    assert told == config.privacy.model_copy(update={"ledger": ""})
    assert "/home/op" not in config.for_sites()


def test_settings_that_the_plan_holds_are_not_in_the_hash_of_the_run():
    """Catches: a run refused as foreign where the plan says more precisely what differs, and the other way round."""

    def run(**privacy) -> RunConfig:
        return parse({"privacy": {"mode": "central", "noise_multiplier": 1.0, **privacy}})

    assert run().sha256 == run(noise_multiplier=2.0, clip_norm=0.5, ledger="x", enrolled_clients=50).sha256
    assert run().sha256 != run(mode="local").sha256
    assert run().sha256 != run(examples=EXAMPLES).sha256


def test_every_setting_is_described():
    """Catches: a setting that `tsugiki config show` cannot explain."""
    for section in (PrivacySection, ExamplePrivacySection):
        assert all(field.description for field in section.model_fields.values())
