"""What a site allows, one limit at a time."""

import pytest

from client.policy import SitePolicy
from common.config import parse
from common.errors import PolicyError

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
