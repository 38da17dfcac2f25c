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
    policy.check_work(10**9, 10**12)
    policy.check_rounds(10**6, 10**6)
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
    policy = SitePolicy(max_local_steps=50, max_rows_per_round=1000)
    assert refusal(policy.check_work, 50, 1000) == ""
    assert refusal(policy.check_work, 51, 1000) == "policy-steps"
    assert refusal(policy.check_work, 50, 1001) == "policy-rows"


def test_how_many_rounds_may_be_trained():
    """Catches: a limit that is off by one; a day's limit that a life's hides."""
    policy = SitePolicy(max_rounds=10, max_rounds_per_day=3)
    assert refusal(policy.check_rounds, 9, 2) == ""
    assert refusal(policy.check_rounds, 10, 0) == "policy-rounds"
    assert refusal(policy.check_rounds, 9, 3) == "policy-rounds"


def test_how_many_settings_may_be_tried():
    """Catches: no limit by default: each further label that a server leaves out is an answer about the rows."""
    assert refusal(SitePolicy().check_settings, 49) == ""
    assert refusal(SitePolicy().check_settings, 50) == "policy-settings"


def test_which_metrics_may_leave():
    """Catches: a list that names what must not leave."""
    policy = SitePolicy(metrics=["accuracy"])
    assert policy.may_leave({"accuracy": 0.5, "loss": 1.0}) == {"accuracy": 0.5}
    assert SitePolicy(metrics=[]).may_leave({"accuracy": 0.5}) == {}


def test_which_kinds_may_be_told():
    """Catches: notes that leave by default; a kind that is kept, and leaves in another number; a misspelt kind."""
    assert SitePolicy().tell == ("rows", "metrics")
    silent = SitePolicy(tell=[])
    assert silent.may_leave({"loss": 1.0}) == {}
    assert (silent.told_rows(500), SitePolicy().told_rows(500)) == (1, 500)
    assert (silent.sends_head_sums, SitePolicy().sends_head_sums) == (False, True)
    with pytest.raises(ValueError, match="rows, notes, metrics"):
        SitePolicy(tell=["rows", "labels"])


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
        ({"max_epsilon": 1.0}, private("central"), "policy-epsilon"),
        ({"max_epsilon": 1.0, "privacy_modes": ["central", "local"]}, private("central"), ""),
        ({"max_epsilon": 1.0, "privacy_modes": ["local"]}, private("central"), "policy-privacy-mode"),
        ({"max_epsilon": 1.0}, private("distributed"), ""),
        ({"max_epsilon": 1.0}, private("distributed", **HIDDEN), ""),
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


ACME, BOLT = f"acme SHA256:{'a' * 43}", f"bolt SHA256:{'b' * 43}"


@pytest.mark.parametrize(
    "members",
    [
        ["acme"],
        ["SHA256:" + "a" * 43],
        [ACME + "="],
        [ACME[:-1]],
        [ACME + " bolt"],
        [ACME.upper()],
        [ACME, ACME],
        [ACME, f"acme SHA256:{'b' * 43}"],
        [ACME, f"bolt SHA256:{'a' * 43}"],
    ],
    ids=["a name", "a key", "padded", "cut", "three words", "no name", "twice", "two keys", "two names"],
)
def test_members_are_names_with_fingerprints(members):
    """Catches: a name without a key taken for a pin; one key for two sites, which are then one."""
    with pytest.raises(ValueError, match="each name and each fingerprint once"):
        SitePolicy(members=members)


@pytest.mark.parametrize(
    ("members", "site", "key", "code"),
    [
        ([], "crow", "SHA256:" + "c" * 43, ""),
        ([ACME, BOLT], "bolt", "SHA256:" + "b" * 43, ""),
        ([ACME, BOLT], "bolt", "SHA256:" + "a" * 43, "policy-members:bolt"),
        ([ACME, BOLT], "crow", "SHA256:" + "b" * 43, "policy-members:crow"),
        ([ACME, BOLT], "bolt", "", "policy-members:bolt"),
    ],
)
def test_who_may_be_in_a_sum(members, site, key, code):
    """Catches: any pinned key under any name; pins that forbid everything while there are none."""
    assert refusal(SitePolicy(members=members).check_members, {site: key}) == code


def test_all_sites_that_are_not_pinned_are_named():
    """Catches: an operator who learns of one stranger after the other, or of none."""
    listed = {"acme": "SHA256:" + "a" * 43, "dora": "", "crow": "SHA256:" + "c" * 43}
    with pytest.raises(PolicyError, match=r"'crow' \(key SHA256:c+\), 'dora' \(key none\)") as caught:
        SitePolicy(members=[ACME, BOLT]).check_members(listed)
    assert caught.value.code == "policy-members:crow"


@pytest.mark.parametrize(
    ("asked", "most", "code"),
    [
        (private("distributed"), 1.0, ""),
        (private("distributed"), 0.99, "policy-honest-fraction"),
        (private("distributed", honest_fraction=0.5), 0.5, ""),
        (private("distributed", honest_fraction=0.5), 0.49, "policy-honest-fraction"),
        (private("local"), 0.5, ""),
        (OPEN, 0.5, ""),
    ],
)
def test_how_many_honest_clients_a_site_believes_in(asked, most, code):
    """Catches: a server that states any share of honest clients, by which each site divides its noise."""
    assert refusal(SitePolicy(max_honest_fraction=most).check_privacy, *asked) == code


@pytest.mark.parametrize(
    ("most", "counts", "found"),
    [
        (1, {"acme": 5, "bolt": 1, "crow": 1}, 7),
        (1, {"acme": 1, "bolt": 30_000, "crow": 30_000}, 3),
        (2, {"acme": 1, "bolt": 30_000, "crow": 1}, 4),
        (300, {"acme": 1, "bolt": 300, "crow": 300}, 601),
    ],
)
def test_the_clients_that_a_site_counts_on(most, counts, found):
    """Catches: another site's clients believed; this site's own, which it has counted itself, cut too."""
    plan = plan_of("distributed", clients=found, secure_aggregation=True)
    policy = SitePolicy(clients_counted_per_site=most)
    assert sum(policy.count_on("acme", counts, plan).values()) == found
    more = {**counts, "bolt": 10**5, "crow": 10**5}
    larger = plan_of("distributed", clients=counts["acme"] + 2 * most + 1, secure_aggregation=True)
    assert refusal(policy.count_on, "acme", more, larger) == "policy-clients"


def test_a_site_says_what_it_takes_on_trust():
    """Catches: a site that counts on the server's word and does not know it; warnings where there is nothing to say."""
    assert SitePolicy().taken_on_trust() == []
    assert SitePolicy(secure_aggregation=True, members=[ACME]).taken_on_trust() == []
    gateways = SitePolicy(secure_aggregation=True, clients_counted_per_site=30).taken_on_trust()
    assert len(gateways) == 2
    assert "up to 30 clients at each other site, on the server's word" in gateways[0]
    assert "policy.members is empty" in gateways[1]
