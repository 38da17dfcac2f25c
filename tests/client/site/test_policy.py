"""What a site allows, one limit at a time."""

import pytest

from tests.support.private import plan_of, private_config
from tsugiki.client.site.policy import SitePolicy, guaranteed_noise
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import PolicyError
from tsugiki.common.privacy.settings import PrivacySection

FINGERPRINT = "0123456789abcdef" * 4


def run(**sections):
    """Return a run of 10 rounds."""
    base = {"task": {"name": "sequence-classification"}, "adapter": {"method": "lora"}, "run": {"rounds": 10}}
    return parse(base | sections)


def refusal(check, *arguments):
    """Return the code of a refusal, or "" if there is none."""
    try:
        check(*arguments)
    except PolicyError as error:
        return error.code if "site.toml" in str(error) else "an error that does not say where to change it"
    return ""


def test_nothing_is_forbidden_by_default():
    """Catches: a default that refuses what every tutorial does."""
    policy = SitePolicy()
    policy.check_run(run(), 5)
    policy.check_base(FINGERPRINT)
    policy.check_steps(10**9)
    assert policy.may_leave({"loss": 1.0, "accuracy": 0.5}) == {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("settings", "round_", "code"),
    [
        ({"tasks": ["sequence-classification"]}, 1, ""),
        ({"tasks": ["sentence-embedding"]}, 1, "policy-task"),
        ({"tasks": []}, 1, "policy-task"),
        ({"adapters": ["lora", "houlsby"]}, 1, ""),
        ({"adapters": ["houlsby"]}, 1, "policy-adapter"),
        ({"max_rounds": 10}, 10, ""),
        ({"max_rounds": 9}, 1, "policy-rounds"),
        ({"max_rounds": 10}, 11, "policy-rounds"),
    ],
)
def test_what_a_run_may_ask(settings, round_, code):
    """Catches: an empty list that allows everything; a server that goes on after the rounds that it announced."""
    assert refusal(SitePolicy(**settings).check_run, run(), round_) == code


@pytest.mark.parametrize(
    ("allowed", "code"),
    [
        (FINGERPRINT, ""),
        (FINGERPRINT[:12], ""),
        (FINGERPRINT[:11], "policy-base"),
        ("", "policy-base"),
        ("f" * 64, "policy-base"),
    ],
)
def test_which_base_models_may_be_used(allowed, code):
    """Catches: a prefix so short, or empty, that it fits many models."""
    assert refusal(SitePolicy(base_fingerprints=[allowed]).check_base, FINGERPRINT) == code


def test_how_much_may_be_trained():
    """Catches: a limit that is off by one."""
    policy = SitePolicy(max_local_steps=50)
    assert refusal(policy.check_steps, 50) == ""
    assert refusal(policy.check_steps, 51) == "policy-steps"


def test_which_metrics_may_leave():
    """Catches: a list that names what must not leave."""
    policy = SitePolicy(metrics=["accuracy"])
    assert policy.may_leave({"accuracy": 0.5, "loss": 1.0}) == {"accuracy": 0.5}
    assert SitePolicy(metrics=[]).may_leave({"accuracy": 0.5}) == {}


# Privacy

OPEN = (None, PrivacySection())
"""The plan and the settings of a run without privacy."""


def private(mode, **options):
    """Return the plan and the settings of a private run of four clients and noise 1."""
    options = {"noise_multiplier": 1.0, **options}
    return plan_of(mode, **options), private_config(mode, **options).privacy


def test_by_default_any_run_but_one_with_seeded_noise_is_allowed():
    """Catches: a default that refuses what every tutorial does; noise that hides nothing, taken for noise."""
    for asked in (OPEN, private("central"), private("local"), private("distributed", secure_aggregation=True)):
        assert refusal(SitePolicy().check_privacy, *asked) == ""
    assert refusal(SitePolicy().check_privacy, *private("local", insecure_noise_seed=7)) == "policy-seeded-noise"
    assert refusal(SitePolicy(seeded_noise=True).check_privacy, *private("local", insecure_noise_seed=7)) == ""


def test_a_seed_without_privacy_is_refused_too():
    """Catches: a seed that is looked at only where there is noise: DP-SGD draws from it as well."""
    settings = PrivacySection(insecure_noise_seed=7)
    assert refusal(SitePolicy().check_privacy, None, settings) == "policy-seeded-noise"


HIDDEN = {"secure_aggregation": True}


@pytest.mark.parametrize(
    ("settings", "asked", "code"),
    [
        ({"privacy_modes": ["local", "distributed"]}, private("local"), ""),
        ({"privacy_modes": ["local", "distributed"]}, private("central"), "policy-privacy-mode"),
        ({"privacy_modes": ["local", "distributed"]}, OPEN, "policy-privacy-mode"),
        ({"privacy_modes": ["none"]}, OPEN, ""),
        ({"privacy_modes": []}, private("local"), "policy-privacy-mode"),
        ({"secure_aggregation": True}, private("distributed", **HIDDEN), ""),
        ({"secure_aggregation": True}, private("distributed"), "policy-secure-aggregation"),
        ({"min_sites": 3}, private("distributed", min_sites=3, **HIDDEN), ""),
        ({"min_sites": 3}, private("distributed", min_sites=2, **HIDDEN), "policy-sites"),
        ({"min_sites": 3}, private("distributed"), ""),
        (
            {"max_row_epsilon": 9.0, "seeded_noise": True},
            private("local", insecure_noise_seed=7, examples={"noise_multiplier": 1.0}),
            "policy-row-epsilon",
        ),
        ({"secure_aggregation": True}, private("local"), "policy-secure-aggregation"),
        ({"secure_aggregation": True}, OPEN, "policy-secure-aggregation"),
        ({"min_noise_multiplier": 1.0}, private("local"), ""),
        ({"min_noise_multiplier": 1.0001}, private("local"), "policy-noise"),
        ({"min_noise_multiplier": 1.0}, private("central"), ""),
        ({"min_noise_multiplier": 1e-9}, OPEN, "policy-noise"),
        ({"min_noise_multiplier": 0.866}, private("distributed", **HIDDEN), ""),
        ({"min_noise_multiplier": 0.867}, private("distributed", **HIDDEN), "policy-noise"),
        ({"min_noise_multiplier": 1.0}, private("distributed"), "policy-noise"),
        ({"min_noise_multiplier": 0.5}, private("distributed"), ""),
        ({"min_noise_multiplier": 0.5001}, private("distributed"), "policy-noise"),
        ({"min_noise_multiplier": 0.1, "seeded_noise": True}, private("local", insecure_noise_seed=7), "policy-noise"),
        ({"max_epsilon": 1.0}, private("local"), ""),
        ({"max_epsilon": 1.0}, OPEN, "policy-epsilon"),
        ({"max_epsilon": 1.0, "seeded_noise": True}, private("local", insecure_noise_seed=7), "policy-epsilon"),
        ({"max_epsilon": 1.0}, private("distributed", noise_multiplier=0.0, **HIDDEN), "policy-epsilon"),
        ({"max_row_epsilon": 1.0}, private("local"), "policy-row-epsilon"),
        ({"max_row_epsilon": 1.0}, (None, PrivacySection(examples={"target_epsilon": 9.0})), ""),
        ({"max_row_epsilon": 1.0, "max_epsilon": 1.0}, private("local", examples={"noise_multiplier": 1.0}), ""),
    ],
)
def test_what_a_run_has_to_do_for_privacy(settings, asked, code):
    """Catches: a demand that another mode, or none, fulfils; the noise on a sum counted where only a share is sure."""
    assert refusal(SitePolicy(**settings).check_privacy, *asked) == code


@pytest.mark.parametrize(
    ("mode", "options", "noise"),
    [
        ("central", {}, 1.0),
        ("local", {}, 1.0),
        ("distributed", {}, 0.5),
        ("distributed", {"honest_fraction": 0.5}, 0.5**0.5),
        ("distributed", {"secure_aggregation": True}, 0.75**0.5),
        ("distributed", {"secure_aggregation": True, "max_clients_per_site": 3}, 0.5),
        ("distributed", {"secure_aggregation": True, "honest_fraction": 0.5}, 0.5**0.5),
        ("local", {"insecure_noise_seed": 7}, 0.0),
    ],
)
def test_the_noise_that_a_site_can_be_sure_of(mode, options, noise):
    """Catches: a site that counts on the noise of others whom it cannot see, or that one of them knows."""
    assert guaranteed_noise(private(mode, **options)[0]) == pytest.approx(noise)


def test_a_policy_of_nothing_but_numbers_makes_sense():
    """Catches: a negative budget, which would read as none; a delta of 1, with which any epsilon is small."""
    for settings in ({"max_epsilon": -1.0}, {"max_row_epsilon": -1.0}, {"min_noise_multiplier": -1.0}, {"delta": 1.0}):
        with pytest.raises(ValueError, match="Input should be"):
            SitePolicy(**settings)


@pytest.mark.parametrize(
    ("policy", "settings", "code"),
    [
        ({}, {}, ""),
        ({"head_sums": False}, {}, "policy-head-sums"),
        ({}, {"mode": "central", "noise_multiplier": 1.0}, "policy-head-sums"),
        ({}, {"examples": {"noise_multiplier": 1.0}}, "policy-head-sums"),
    ],
)
def test_sums_for_a_head(policy, settings, code):
    """Catches: sums of a site that keeps them; exact sums in a run that adds noise to all else."""
    assert refusal(SitePolicy(**policy).check_head_sums, PrivacySection(**settings)) == code
