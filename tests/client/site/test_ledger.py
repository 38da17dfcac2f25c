"""A site's own account: charged before anything leaves, over all runs, by the site's own numbers."""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Message

from tests.support.federation import app_of_sites, leaks, site_folder, tiny_config
from tests.support.private import LEDGER, plan_of, unchanged
from tsugiki.client.site.ledger import seen_of_site, site_ledger, spend
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.training.update import ProtectedSum
from tsugiki.common.audit import verify
from tsugiki.common.errors import PolicyError, StorageError
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.mechanisms import epsilon_after, releases_of
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import TrainRequest, to_record
from tsugiki.server.engines.in_process import InProcessGrid

NOISY = Release("gaussian", 4.0)
DELTA = 1e-5


def spent(path):
    """Return how often each adversary saw something, by the lines of a ledger."""
    counts = {}
    for line in verify(path):
        counts[line["adversary"]] = counts.get(line["adversary"], 0) + line["count"]
    return counts


# The ledger and its budgets


@pytest.mark.parametrize(
    ("mode", "options", "budgeted"),
    [
        ("central", {}, {"release"}),
        ("local", {}, {"release", "uploads"}),
        ("distributed", {}, {"release", "sums", "uploads"}),
        ("distributed", {"secure_aggregation": True}, {"release", "sums"}),
    ],
)
def test_a_budget_bounds_whom_the_mode_is_there_against(mode, options, budgeted):
    """Catches: a budget that bounds what the mode does not protect: it would refuse all, or nothing."""
    plan = plan_of(mode, noise_multiplier=4.0, **options)
    ledger = site_ledger("x", SitePolicy(max_epsilon=2.0, delta=1e-7), plan)
    assert ledger.budgets == dict.fromkeys(budgeted, 2.0)
    assert ledger.delta == 1e-7
    assert budgeted - {"sums"} <= set(releases_of(plan))


ALL_BOUNDED = {
    "masked": plan_of("distributed", noise_multiplier=4.0, secure_aggregation=True),
    "bare": plan_of("distributed", noise_multiplier=8.0),
    "local": plan_of("local", noise_multiplier=4.0),
}


@pytest.mark.parametrize("modes", list(permutations(ALL_BOUNDED, 2)), ids="-".join)
def test_a_budget_is_for_life_over_all_modes(tmp_path, modes):
    """Catches: a budget for each mode, so that models or the server see as much again after each change of it."""
    policy = SitePolicy(max_epsilon=8.0)
    by_server = Counter()
    for mode in modes:
        plan = ALL_BOUNDED[mode]
        seen = releases_of(plan)
        for number in range(100):
            ledger = site_ledger(tmp_path / LEDGER, policy, plan)
            try:
                spend(ledger, {who: (release, 1) for who, release in seen_of_site(plan).items()}, mode, number)
            except PolicyError:
                break
            by_server[seen.get("sums") or seen["uploads"]] += 1
        else:
            pytest.fail("nothing stopped the run")
    assert sum(by_server.values()) > 1
    assert epsilon(by_server, policy.delta) <= 8.0
    assert ledger.epsilons()["release"] <= 8.0


def test_rows_have_a_budget_of_their_own():
    """Catches: the budget of a client spent on its rows, or the other way round."""
    policy = SitePolicy(max_row_epsilon=3.0)
    assert site_ledger("x", policy, None).budgets == {"rows": 3.0}
    assert site_ledger("x", policy, plan_of("local", noise_multiplier=1.0)).budgets == {"rows": 3.0}
    assert site_ledger("x", SitePolicy(), plan_of("local", noise_multiplier=1.0)).budgets == {}
    both = SitePolicy(max_row_epsilon=3.0, max_epsilon=1.0)
    assert site_ledger("x", both, plan_of("local", noise_multiplier=1.0)).budgets == {
        "rows": 3.0,
        "uploads": 1.0,
        "release": 1.0,
    }


def test_what_is_spent_is_written_with_run_and_round(tmp_path):
    """Catches: a site that cannot tell which run has cost it what."""
    ledger = site_ledger(tmp_path / LEDGER, SitePolicy(), plan_of("local", noise_multiplier=4.0))
    spend(ledger, {"release": (NOISY, 1), "uploads": (NOISY, 1), "rows": (Release("gaussian", 1.0, 0.1), 5)}, "one", 3)
    lines = verify(tmp_path / LEDGER)
    assert [(line["adversary"], line["count"]) for line in lines] == [("release", 1), ("uploads", 1), ("rows", 5)]
    assert {(line["run"], line["round"], line["private"]) for line in lines} == {("one", 3, True)}


def test_a_seeded_run_has_shown_everything_to_later_ones(tmp_path):
    """Catches: a site's budget that takes noise which anybody can draw for noise, because a run has the same name."""
    plan = plan_of("local", noise_multiplier=4.0)
    seeded = site_ledger(tmp_path / LEDGER, SitePolicy(), plan, seeded=True)
    spend(seeded, {"uploads": (NOISY, 1)}, "one", 1)
    assert verify(tmp_path / LEDGER)[0]["private"] is False
    later = site_ledger(tmp_path / LEDGER, SitePolicy(max_epsilon=8.0), plan)
    assert later.epsilons() == {"uploads": math.inf}
    with pytest.raises(PolicyError):
        spend(later, {"uploads": (NOISY, 1)}, "one", 1)


@pytest.mark.parametrize(
    ("policy", "who", "code"),
    [
        ({"max_epsilon": 1e-3}, "uploads", "policy-epsilon"),
        ({"max_row_epsilon": 1e-3}, "rows", "policy-row-epsilon"),
    ],
)
def test_a_refusal_says_which_budget_and_where_to_change_it(tmp_path, policy, who, code):
    """Catches: a BudgetError, which would look like the server's; a charge for what does not leave."""
    ledger = site_ledger(tmp_path / LEDGER, SitePolicy(**policy), plan_of("local", noise_multiplier=4.0))
    with unchanged(tmp_path / LEDGER), pytest.raises(PolicyError, match=r"site\.toml") as caught:
        spend(ledger, {who: (NOISY, 1)}, "one", 1)
    assert caught.value.code == code


def test_a_refused_upload_costs_nothing_to_anybody(tmp_path):
    """Catches: the release ledger of a refused local upload charged: asked often enough, a later run is refused."""
    plan = plan_of("local", noise_multiplier=4.0)
    ledger = site_ledger(tmp_path / LEDGER, SitePolicy(max_epsilon=1e-3), plan)
    with unchanged(tmp_path / LEDGER), pytest.raises(PolicyError):
        spend(ledger, {who: (release, 1) for who, release in releases_of(plan).items()}, "one", 1)


def test_without_a_ledger_nothing_leaves(tmp_path):
    """Catches: a disk error that is logged, and the upload sent all the same."""
    ledger = site_ledger(tmp_path / "gone" / LEDGER, SitePolicy(), plan_of("local", noise_multiplier=4.0))
    with pytest.raises(StorageError):
        spend(ledger, {"uploads": (NOISY, 1)}, "one", 1)


# In the ClientApp, with a real site


@pytest.fixture
def acme(tmp_path):
    """Makes a real site with a policy; returns its folder and a function that asks it to train."""

    def make(policy=""):
        file = site_folder(tmp_path / "acme", "acme")
        file.write_text(f"[policy]\n{policy}\n{file.read_text()}")

        def ask(mode, round_=1, run="one", **privacy):
            settings = {"mode": mode, "enrolled_clients": 4, **privacy}
            config = tiny_config(tmp_path, privacy=settings, run={"name": run}, simulation={"clients": 4})
            graft = load(config)
            text = config.for_sites(make_plan(config, graft.spec.size))
            request = TrainRequest(text, round_, graft.spec.sha256, 0.0, 0.5, 600.0, "0" * 16, "")
            content = to_record(request, encode(graft.initial, graft.spec))
            grid = InProcessGrid(*app_of_sites([file])(config))
            return grid.pull_messages(grid.push_messages([Message(content, 1, "train")]))[0]

        return tmp_path / "acme", ask

    return make


def load(config):
    """Return the graft of a run."""
    return load_graft(config, config.model.name, config.run.seed)


def refused(reply):
    """Return the code of a refusal, after checking that nothing came with it; "" for an update."""
    if reply.has_error():
        assert not reply.has_content()
        return reply.error.reason
    return ""


def test_every_upload_is_in_the_ledger_before_it_leaves(acme, monkeypatch):
    """Catches: an upload charged after it was sent, or not at all."""
    folder, ask = acme()
    assert refused(ask("local", noise_multiplier=4.0)) == ""
    assert spent(folder / LEDGER) == {"release": 1, "uploads": 1}

    def fail(*arguments):
        raise StorageError("no disk", code="disk-full")

    monkeypatch.setattr("tsugiki.common.audit.append_lines", fail)
    assert refused(ask("local", noise_multiplier=4.0)) == "disk-full"


def test_the_budget_is_for_life_by_the_sites_own_delta(acme):
    """Catches: a budget for each run, and a run that has its epsilon computed with a delta that suits it."""
    most = epsilon({NOISY: 3}, DELTA) * 1.001
    folder, ask = acme(f"max_epsilon = {most}")
    for number in range(3):
        assert refused(ask("local", run=f"run-{number}", noise_multiplier=4.0, delta=0.1)) == ""
    assert refused(ask("local", run="run-3", noise_multiplier=4.0, delta=0.1)) == "policy-epsilon"
    assert refused(ask("local", run="run-3", round_=2, noise_multiplier=4.0)) == "policy-epsilon"
    assert spent(folder / LEDGER)["uploads"] == 3
    assert refused(ask("local", run="quiet", noise_multiplier=500.0)) == ""
    lines = [line for line in verify(folder / LEDGER) if line["adversary"] == "uploads"]
    assert [line["run"] for line in lines] == ["run-0", "run-1", "run-2", "quiet"]
    assert {line["delta"] for line in lines} == {DELTA}


def test_a_larger_delta_of_the_site_is_not_the_runs_either(acme):
    """Catches: the smaller of both deltas, or the last one, where the site's own counts."""
    most = epsilon({NOISY: 1}, 1e-2)
    _, ask = acme(f"max_epsilon = {most * 1.001}\ndelta = 1e-2")
    assert epsilon({NOISY: 1}, 1e-6) > most * 1.001
    assert refused(ask("local", noise_multiplier=4.0, delta=1e-6)) == ""


@pytest.mark.parametrize(
    ("policy", "mode", "privacy", "code"),
    [
        ('privacy_modes = ["local"]', "central", {"noise_multiplier": 1.0}, "policy-privacy-mode"),
        ("secure_aggregation = true", "local", {"noise_multiplier": 1.0}, "policy-secure-aggregation"),
        ("min_noise_multiplier = 1.0", "distributed", {"noise_multiplier": 1.0}, "policy-noise"),
        ("", "local", {"noise_multiplier": 1.0, "insecure_noise_seed": 7}, "policy-seeded-noise"),
        ("max_row_epsilon = 1.0", "local", {"noise_multiplier": 1.0}, "policy-row-epsilon"),
        ("max_epsilon = 1.0", "none", {}, "policy-epsilon"),
    ],
)
def test_a_policy_refuses_before_anything_is_trained_or_charged(acme, monkeypatch, policy, mode, privacy, code):
    """Catches: a policy that is asked after training, and a refusal that shows up as a cost."""
    folder, ask = acme(policy)
    monkeypatch.setattr("tsugiki.client.training.cohort.train", lambda *arguments: pytest.fail("it has trained"))
    assert refused(ask(mode, **privacy)) == code
    assert not (folder / LEDGER).exists()


@pytest.mark.parametrize(
    ("policy", "privacy", "code"),
    [
        ("max_epsilon = 1.0", {"noise_multiplier": 1e-6}, "policy-epsilon"),
        (
            "max_row_epsilon = 1.0",
            {"noise_multiplier": 4.0, "examples": {"noise_multiplier": 0.1}},
            "policy-row-epsilon",
        ),
    ],
)
def test_a_round_that_the_budget_cannot_pay_is_refused_before_training(acme, monkeypatch, policy, privacy, code):
    """Catches: hours of training for an upload that must not leave, and a round used up by it."""
    folder, ask = acme(policy)
    monkeypatch.setattr("tsugiki.client.training.cohort.train", lambda *arguments: pytest.fail("it has trained"))
    assert refused(ask("local", **privacy)) == code
    assert not (folder / LEDGER).exists()
    assert "training" not in [line["event"] for line in verify(folder / "audit.jsonl")]


def test_uploads_without_noise_of_their_own_are_infinite_in_the_ledger(acme):
    """Catches: a site that believes that noise at the server hides its upload from the server."""
    folder, ask = acme()
    assert refused(ask("central", noise_multiplier=4.0)) == ""
    plan, path = plan_of("central", noise_multiplier=4.0), folder / LEDGER
    epsilons = site_ledger(path, SitePolicy(), plan).epsilons()
    assert epsilons["uploads"] == math.inf
    assert epsilons["release"] == epsilon([NOISY], DELTA)


def test_a_simulated_site_keeps_no_ledger(tmp_path):
    """Catches: ledgers of clients that exist in one run only, in the current folder."""
    from tsugiki.client.site.simulated import simulated_sites

    assert all(site.ledger_path() is None for site in simulated_sites(tiny_config(tmp_path)))


def test_where_the_ledger_is(tmp_path):
    """Catches: a ledger in the current folder, so that a site started elsewhere begins at zero."""
    from tsugiki.client.site.site import read_site

    file = site_folder(tmp_path / "acme", "acme")
    assert read_site(file).ledger_path() == tmp_path / "acme" / LEDGER
    for name, path in (("mine.jsonl", tmp_path / "acme" / "mine.jsonl"), ("", None)):
        file.write_text(file.read_text().replace("[data]", f'ledger = "{name}"\n[data]', 1))
        assert read_site(file).ledger_path() == path
        site_folder(tmp_path / "acme", "acme")


def test_no_row_gets_into_the_ledger(acme):
    """Catches: data in a file that is made to be shown."""
    folder, ask = acme("max_epsilon = 0.001")
    ask("local", noise_multiplier=4.0)
    ask("central", noise_multiplier=1e4)
    assert leaks(folder) == ["train.csv"]


def test_a_site_that_was_asked_knows_it(tmp_path):
    """Catches: amplification by sampling counted for rounds in which the site was, and no account of the others."""
    plan = plan_of(
        "central",
        clients=20,
        noise_multiplier=1.0,
        sampling="poisson",
        strategy={"fraction_train": 0.1, "min_clients": 2},
    )
    rounds, asked = 100, 10  # of them, on average
    config = tiny_config(tmp_path)
    ledger = site_ledger(tmp_path / LEDGER, SitePolicy(), plan)
    from tsugiki.client import app
    from tsugiki.client.cache import SiteCache
    from tsugiki.client.prepare import SiteRun

    class Site:
        name, policy = "acme", SitePolicy()
        ledger_path = staticmethod(lambda: tmp_path / LEDGER)
        record = staticmethod(lambda *arguments, **details: None)
        charging = staticmethod(lambda: nullcontext({}))

    run = SiteRun(Site, config, None, plan, 0, SiteCache())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "train_protecting_clients", lambda job, plan: ProtectedSum.empty(plan))
        for number in range(asked):
            request = TrainRequest("", number + 1, "", 0.0, 0.5, 600.0, "", "0")
            app.protected_sum(run, _job(config, request), plan)
    assert ledger.epsilons()["release"] >= epsilon_after(plan, rounds)["release"]


def _job(config, request):
    from tsugiki.client.training.job import Job

    return Job(None, None, {"acme": [0]}, config, request, np.zeros(1, np.float32), lambda *arguments: None)


def test_the_plan_of_a_site_is_its_own(acme):
    """Catches: an account of what the server says that it adds, instead of what the settings give; an outsider's."""
    folder, ask = acme()
    assert refused(ask("distributed", target_epsilon=3.0)) == ""
    release = {line["adversary"]: Release(**line["release"]) for line in verify(folder / LEDGER)}
    # The other site of a sum of two knows its own share; and without masks, a site counts on its own share only.
    assert release["release"] == release["outsiders"] == release["uploads"]
    assert epsilon({release["release"]: 2}, DELTA) == pytest.approx(3.0, rel=2e-3)
    assert release["release"].noise == "skellam"
    assert replace(release["release"], dimension=1) == Release("skellam", release["release"].noise_multiplier)


def test_without_secure_aggregation_the_bare_share_counts(tmp_path):
    """Catches: a server that announces a thousand clients, so that a site adds next to no noise, within its budget."""
    plan = plan_of("distributed", clients=1000, noise_multiplier=10.0, strategy={"min_clients": 1000}, delta=1e-4)
    seen = {who: (release, 1) for who, release in releases_of(plan).items()}
    policy = SitePolicy(max_epsilon=5.0)
    assert epsilon([releases_of(plan)["release"]], policy.delta) < 5.0
    with unchanged(tmp_path / LEDGER), pytest.raises(PolicyError) as caught:
        spend(site_ledger(tmp_path / LEDGER, policy, plan), seen, "one", 1)
    assert caught.value.code == "policy-epsilon"
