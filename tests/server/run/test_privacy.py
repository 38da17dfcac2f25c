"""The operator's part of privacy, in whole toy runs: budget, account, noise, and what is written of them."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from tests.support.federation import hurry
from tests.support.private import LEDGER, plan_of, privacy_of, private_app, private_config, run_private, unchanged
from tests.support.toy import SPEC, federate, forging
from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.errors import BudgetError, QuorumNotMet, StorageError
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import MECHANISMS, epsilon_after, mechanism_of, releases_of
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.rng import seed_everything
from tsugiki.server.report.page import write_report
from tsugiki.server.run.privacy import open_privacy, rows_summary

SITES = ["a", "b", "c", "d"]
Z = 4.0
each_mode = pytest.mark.parametrize("mode", MECHANISMS.names())
POISSON = {"sampling": "poisson", "clients": 80, "strategy": {"fraction_train": 0.5, "min_clients": 2}}


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


def budget(mode, rounds, **options):
    """Return the epsilon of so many rounds against whom the mode is there, and a hair."""
    plan = plan_of(mode, noise_multiplier=Z, **options)
    return epsilon_after(plan, rounds)[mechanism_of(plan).budgeted[0]] * (1 + 1e-9)


def charged(path):
    """Return how often each adversary was charged, and for which round."""
    return Counter((line["adversary"], line["round"]) for line in verify(path))


# The parts


def test_a_run_without_privacy_has_none(tmp_path):
    """Catches: a ledger for a run that promises nothing."""
    config = private_config("none")
    audit = AuditLog(tmp_path / "audit.jsonl")
    assert open_privacy(make_plan(config, SPEC.size), config, tmp_path / LEDGER, audit) is None


@each_mode
def test_what_was_spent_before_is_told_at_the_start(mode, tmp_path):
    """Catches: a run that begins at zero on clients who have given something before."""
    config = private_config(mode, noise_multiplier=Z, target_epsilon=9.0)
    plan = make_plan(config, SPEC.size)
    audit = AuditLog(tmp_path / "audit.jsonl")
    first = open_privacy(plan, config, tmp_path / LEDGER, audit)
    for number in (1, 2):
        first.charge("uploads", number)
        first.charge("release", number)
        first.charge("outsiders", number)
    second = open_privacy(plan, config, tmp_path / LEDGER, audit)
    told = [event["spent_before"] for event in verify(tmp_path / "audit.jsonl")]
    seen = epsilon_after(second.plan, 2)
    assert told == [{}, {who: value if math.isfinite(value) else None for who, value in seen.items()}]
    assert second.ledger.budgets == dict.fromkeys(mechanism_of(second.plan).budgeted, 9.0)


def test_what_the_plan_does_not_show_is_not_charged(tmp_path):
    """Catches: uploads charged where the server only ever sees a sum."""
    privacy = privacy_of(plan_of("distributed", noise_multiplier=Z, secure_aggregation=True), tmp_path)
    with unchanged(privacy.ledger.path):
        privacy.charge("uploads", 1)
    privacy.charge("sums", 1)
    assert charged(privacy.ledger.path) == {("sums", 1): 1}


def test_sampled_clients_are_poisson(tmp_path):
    """Catches: a fixed number drawn (the count would not vary), and coins that hang together."""
    privacy = privacy_of(plan_of("central", noise_multiplier=Z, **POISSON), tmp_path)
    counts = np.array([len(privacy.sampled(400, "a", 1)) for _ in range(2000)])
    assert abs(counts.mean() - 200) < 5.4 * math.sqrt(100 / 2000)
    assert abs(counts.var() / 100 - 1) < 5.4 * math.sqrt(2 / 2000)
    drawn = np.zeros(400)
    for _ in range(500):
        drawn[privacy.sampled(400, "a", 1)] += 1
    assert np.abs(drawn - 250).max() < 6.8 * math.sqrt(125)  # of 400


def test_sampled_clients_do_not_follow_the_seed(tmp_path):
    """Catches: a cohort that every site can compute, and against which nothing is amplified."""
    privacy, found = privacy_of(plan_of("central", noise_multiplier=Z, **POISSON), tmp_path), []
    for _ in range(2):
        seed_everything(42)
        found.append(privacy.sampled(200, "a", 1))
    assert found[0] != found[1]


def test_seeded_coins_differ_by_site_and_round(tmp_path):
    """Catches: a test mode in which every round asks the same clients of every site."""
    privacy = privacy_of(plan_of("central", noise_multiplier=Z, insecure_noise_seed=7, **POISSON), tmp_path, seed=7)
    assert len({tuple(privacy.sampled(200, site, number)) for site in "ab" for number in (1, 2)}) > 1


@pytest.mark.parametrize(("options", "denominator"), [({}, 3), (POISSON, 40.0)])
def test_what_the_sum_is_divided_by(tmp_path, options, denominator):
    """Catches: sampled clients counted in every model; a fixed cohort's mean over those that were only asked."""
    privacy = privacy_of(plan_of("central", noise_multiplier=1e-6, clip_norm=2.0, **options), tmp_path)
    mean, told = privacy.mean(np.full(SPEC.size, 65536), 3, 1)
    assert mean.dtype == np.float32
    assert np.allclose(mean, 2.0 / denominator, rtol=1e-4)
    assert told["clients"] == (None if options else 3)


# Whole runs


@each_mode
def test_the_budget_ends_a_run_before_the_clients_are_asked(mode, tmp_path, monkeypatch):
    """Catches: a round too many; one too few; a run that fails where it should end; a model that is lost."""
    asked = []
    config = private_config(
        mode, folder=tmp_path, rounds=5, noise_multiplier=Z, target_epsilon=budget(mode, 2), secure_aggregation=False
    )
    outcome = federate(monkeypatch, private_app(SITES, asked=asked), 4, config)
    assert sorted({number for _, number, _ in asked}) == [1, 2]
    assert (outcome.state.round, outcome.summary["stopped"]) == (2, "budget-exhausted")
    assert outcome.state.vector.any()
    assert (outcome.folder / "best" / "adapter.safetensors").is_file()
    events = [event["event"] for event in verify(outcome.folder / "audit.jsonl")]
    assert events[-2:] == ["budget-exhausted", "finished"]
    who = MECHANISMS.get(mode).budgeted[0]
    told = json.loads((outcome.folder / "summary.json").read_text())["privacy"]
    assert told["epsilon"][who] <= config.privacy.target_epsilon
    assert charged(tmp_path / LEDGER)[(who, 2)] == 1


@each_mode
def test_a_planned_budget_is_enough_for_all_rounds(mode, tmp_path, monkeypatch):
    """Catches: noise that is calibrated in another way than it is charged."""
    outcome = federate(
        monkeypatch, private_app(SITES), 4, private_config(mode, folder=tmp_path, rounds=6, target_epsilon=3.0)
    )
    assert (outcome.state.round, outcome.summary["stopped"]) == (6, "finished")
    who = MECHANISMS.get(mode).budgeted[0]
    assert 2.99 < outcome.summary["privacy"]["epsilon"][who] <= 3.0


@each_mode
def test_another_run_on_the_same_clients_goes_on_with_the_ledger(mode, tmp_path, monkeypatch):
    """Catches: a budget that every run has anew: the second of two runs asks nobody, and is no finished run."""
    first = private_config(mode, folder=tmp_path, rounds=2, noise_multiplier=Z, target_epsilon=budget(mode, 3))
    federate(monkeypatch, private_app(SITES), 4, first)
    other, asked = {"run": first.run.model_copy(update={"name": "other"})}, []
    outcome = federate(monkeypatch, private_app(SITES, asked=asked), 4, first.model_copy(update=other))
    assert (outcome.state.round, len(asked)) == (1, 4)
    third = {"run": first.run.model_copy(update={"name": "third"})}
    with unchanged(tmp_path / LEDGER), pytest.raises(BudgetError):
        federate(monkeypatch, private_app(SITES, asked=asked), 4, first.model_copy(update=third))
    assert len(asked) == 4
    apart = {"run": first.run.model_copy(update={"name": "apart"})}
    simulated = federate(monkeypatch, private_app(SITES), 4, first.model_copy(update=apart), simulated=True)
    assert simulated.state.round == 2  # clients that exist in that run only
    assert (simulated.folder / LEDGER).is_file()


@each_mode
def test_what_is_recorded_of_a_private_run(mode, tmp_path):
    """Catches: losses, rows, norms or seconds of single sites in the records; an epsilon that is not the ledger's."""
    ran = run_private(tmp_path, private_app(SITES), 4, private_config(mode, noise_multiplier=Z))
    assert [line["round"] for line in ran.rounds] == [1, 2, 3]
    plan = plan_of(mode, noise_multiplier=Z)
    for line in ran.rounds:
        assert {key for one in line["accepted"].values() for key in one} == {"clients", "bytes_up"}
        assert (line["train_loss"], line["train_seconds"]) == (None, 0.0)
        told, seen = line["privacy"], epsilon_after(plan, line["round"])
        assert told["epsilon"] == {who: value if math.isfinite(value) else None for who, value in seen.items()}
        assert (told["private"], told["clients"], told["delta"]) == (True, 4, 1e-5)
        assert told["effective_noise_multiplier"] == pytest.approx(Z * (2 if mode == "local" else 1))
    assert not {"loss", "rows", "steps"} & set(json.dumps(ran.rounds).replace('"', " ").replace(":", " ").split())


def test_seeded_noise_is_marked_everywhere(tmp_path, monkeypatch):
    """Catches: a run that anybody can take the noise out of, shown as private."""
    config = private_config("local", folder=tmp_path, noise_multiplier=Z, insecure_noise_seed=7)
    outcome = federate(monkeypatch, private_app(SITES), 4, config)
    assert outcome.summary["privacy"]["private"] is False
    assert [line["privacy"]["private"] for line in read_lines(outcome.folder / "metrics.jsonl")[1:]] == [False] * 3
    assert {line["private"] for line in verify(tmp_path / LEDGER)} == {False}
    (event,) = [one for one in verify(outcome.folder / "audit.jsonl") if one["event"] == "privacy"]
    assert event["private"] is False
    (tmp_path / "again").mkdir()
    again = config.model_copy(update={"run": config.run.model_copy(update={"output_dir": str(tmp_path / "again")})})
    same = federate(monkeypatch, private_app(SITES), 4, again)
    assert same.summary["adapter_sha256"] == outcome.summary["adapter_sha256"]


def test_real_noise_never_repeats(tmp_path, monkeypatch):
    """Catches: a run whose noise follows from its seed: whoever knows that takes the noise out."""
    found = set()
    for name in ("one", "two"):
        config = private_config("central", folder=tmp_path / name, noise_multiplier=Z)
        found.add(federate(monkeypatch, private_app(SITES), 4, config).summary["adapter_sha256"])
    assert len(found) == 2


def test_under_poisson_sampling_nobody_is_named(tmp_path):
    """Catches: the cohort, its size or its bytes in a record: amplification counts on nobody knowing it."""
    asked = []
    config = private_config("central", noise_multiplier=Z, **POISSON)
    ran = run_private(tmp_path, private_app(["a", "b"], clients=40, asked=asked), 2, config)
    for line in ran.rounds:
        assert (line["cohort"], line["accepted"], line["rejected"]) == ([], {}, {})
        assert (line["bytes_up"], line["bytes_down"], line["dropouts"]) == (0, 0, 0)
        # the wait tells how long the slowest of them took, the aggregation perhaps how many they were
        assert set(line["seconds"]) == {"evaluate"}
        assert line["privacy"]["clients"] is None
        assert line["privacy"]["effective_noise_multiplier"] is None
        assert line["privacy"]["noise_norm"] is None
    assert all(event["accepted"] == [] for event in ran.events if event["event"] == "round")
    drawn = [set(clients.split(",")) for _, _, clients in asked]
    assert all(0 < len(one) < 40 for one in drawn)
    assert len({tuple(sorted(one)) for one in drawn}) == len(drawn) == 6
    release = {Release(**line["release"]) for line in verify(tmp_path / LEDGER) if line["adversary"] == "release"}
    assert release == {Release("gaussian", Z, 0.5)}


@pytest.mark.parametrize("mode", [*MECHANISMS.names(), "poisson"])
def test_a_private_run_has_a_report(mode, tmp_path, monkeypatch):
    """Catches: a page that wants the rows, losses or cohorts which a private run does not have."""
    poisson = mode == "poisson"
    config = private_config(
        "central" if poisson else mode, folder=tmp_path, noise_multiplier=Z, **(POISSON if poisson else {})
    )
    app = private_app(["a", "b"], clients=40) if poisson else private_app(SITES)
    outcome = federate(monkeypatch, app, 2 if poisson else 4, config)
    text = write_report(outcome.folder).read_text("utf-8")
    assert "Mode central" in text or f"Mode {mode}" in text
    assert not re.search(r"\b(nan|None)\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_voided_attempt_is_charged_to_who_saw_it(mode, tmp_path):
    """Catches: an attempt that costs nothing although the server has seen it, or costs a release that never was."""
    lost = iter([True] * 3 + [False] * 9)
    fault = forging(2, lambda reply: None if next(lost) else reply)
    config = private_config(mode, rounds=2, clients=2, noise_multiplier=Z)
    with pytest.raises(QuorumNotMet):
        run_private(tmp_path, private_app(["a", "b"]), 2, config, fault)
    assert charged(tmp_path / LEDGER) == {("uploads", 1): 2}
    assert [line["attempt"] for line in verify(tmp_path / LEDGER)] == [0, 1]
    ran = run_private(tmp_path, private_app(["a", "b"]), 2, config, fault)
    seen = releases_of(plan_of(mode, clients=2, noise_multiplier=Z))
    models = seen.keys() - {"uploads"}  # in mode distributed, outsiders have a line of their own
    released = {(who, number): 1 for who in models for number in (1, 2)}
    assert charged(tmp_path / LEDGER) == {("uploads", 1): 4, ("uploads", 2): 1, **released}
    assert ran.rounds[-1]["privacy"]["epsilon"] == {
        **{who: epsilon({seen[who]: 2}, 1e-5) for who in models},
        "uploads": epsilon({seen["uploads"]: 5}, 1e-5),
    }


def test_a_ledger_that_was_tampered_with_stops_a_run_at_its_start(tmp_path, monkeypatch):
    """Catches: an account that can be made cheaper with an editor."""
    config = private_config("local", folder=tmp_path, noise_multiplier=Z)
    federate(monkeypatch, private_app(SITES), 4, config)
    text = (tmp_path / LEDGER).read_text()
    (tmp_path / LEDGER).write_text(text.replace('"noise_multiplier": 4.0', '"noise_multiplier": 9.0', 1))
    other = config.model_copy(update={"run": config.run.model_copy(update={"name": "other"})})
    with pytest.raises(StorageError) as caught:
        federate(monkeypatch, private_app(SITES), 4, other)
    assert caught.value.code == "audit-broken"


def test_a_sampled_round_may_be_empty(tmp_path):
    """Catches: a crash in the round in which nobody was drawn, after it was charged; a resume would draw again."""
    privacy = privacy_of(plan_of("central", noise_multiplier=Z, **POISSON), tmp_path)
    mean, told = privacy.mean(np.zeros(SPEC.size, np.int64), 0, 1)
    assert mean.any()
    assert (told["clients"], told["noise_norm"]) == (None, None)


def test_a_seeded_simulation_tells_what_it_has_spent_on_rows(tmp_path):
    """Catches: an infinite epsilon in summary.json, which is no JSON, because a seeded round is taken for another's."""
    folder = tmp_path / "site-ledgers"
    folder.mkdir(parents=True)
    for seeded in (True, False):
        ledger = Ledger(folder / "site-0.jsonl", 1e-5, {}, seeded=True)
        ledger.charge("rows", Release("gaussian", 2.0, 0.1), run="one", round=1, private=False)
        found = rows_summary(tmp_path, 1e-5, seeded)
        assert (found["largest"] is not None) == seeded
        assert json.loads(json.dumps(found, allow_nan=False)) == found
