"""Private runs that are cut off: what they showed stays charged, and they go on under the same plan or not at all."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from tests.support.federation import hurry
from tests.support.private import LEDGER, plan_of, private_app, private_config, unchanged
from tests.support.toy import federate
from tsugiki.common.audit import verify
from tsugiki.common.errors import BudgetError, StorageError
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.mechanisms import MECHANISMS, epsilon_after, mechanism_of, releases_of

SITES, ROUNDS, Z = ["a", "b", "c", "d"], 3, 4.0
each_mode = pytest.mark.parametrize("mode", MECHANISMS.names())


class Killed(BaseException):
    """What no part of the program catches, as a kill would be."""


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a toy federation in `tmp_path`; `kill` names a function that a crash replaces once, in one round."""

    def start(mode, kill="", in_round=2, resume=False, asked=None, **options):
        options = {"noise_multiplier": Z, **options}
        config = private_config(mode, folder=tmp_path, rounds=ROUNDS, **options)
        app = private_app(SITES, asked=asked)
        if not kill:
            return federate(monkeypatch, app, 4, config, resume=resume)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kill, killing(kill, in_round))
            with pytest.raises(Killed):
                federate(monkeypatch, app, 4, config, resume=resume)
        return None

    return start


def killing(name, number):
    """Return a function that raises Killed where it is called for this round, and else does what it did."""
    from importlib import import_module

    module, _, attribute = name.rpartition(".")
    real = getattr(import_module(module), attribute)

    def call(*arguments, **named):
        if number in arguments:
            raise Killed
        return real(*arguments, **named)

    return call


def charged(tmp_path):
    """Return how often each adversary was charged for each round."""
    return Counter((line["adversary"], line["round"]) for line in verify(tmp_path / LEDGER))


COLLECTING = "tsugiki.server.run.private_round.collect_uploads"
RECEIVING, AVERAGING = "tsugiki.server.run.collect.receive", "tsugiki.server.run.private_round.take_step"


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_crash_after_sending_is_charged_to_who_may_have_seen_the_uploads(run, tmp_path, mode):
    """Catches: an account in memory, or one written with the checkpoint: what was sent before the crash is lost."""
    run(mode, kill=RECEIVING)
    plan = plan_of(mode, rounds=ROUNDS, noise_multiplier=Z)
    models = releases_of(plan).keys() - {"uploads"}  # in mode distributed, outsiders have a line of their own
    assert charged(tmp_path) == {("uploads", 1): 1, ("uploads", 2): 1, **{(who, 1): 1 for who in models}}
    outcome = run(mode, resume=True)
    assert outcome.state.round == ROUNDS
    released = {(who, number): 1 for who in models for number in (1, 2, 3)}
    assert charged(tmp_path) == {("uploads", 1): 1, ("uploads", 2): 2, ("uploads", 3): 1, **released}
    assert outcome.summary["privacy"]["epsilon"] == {
        "uploads": epsilon_after(plan, ROUNDS + 1)["uploads"],
        **{who: epsilon_after(plan, ROUNDS)[who] for who in models},
    }


@each_mode
def test_a_crash_after_the_noise_is_charged_as_a_release_too(run, tmp_path, mode):
    """Catches: a release that is written down after it was made; the model may be in a log or a cache by then."""
    run(mode, kill=AVERAGING)
    assert charged(tmp_path)[("release", 2)] == 1
    run(mode, resume=True)
    assert charged(tmp_path)[("release", 2)] == 2


def test_a_crash_can_cost_the_last_round(run, tmp_path):
    """Catches: a budget that is exceeded after a crash, because only finished rounds count."""
    most = epsilon_after(plan_of("local", noise_multiplier=Z), ROUNDS)["uploads"] * (1 + 1e-9)
    asked = []
    run("local", kill=RECEIVING, target_epsilon=most)
    outcome = run("local", resume=True, target_epsilon=most, asked=asked)
    assert (outcome.state.round, outcome.summary["stopped"]) == (ROUNDS - 1, "budget-exhausted")
    assert {number for _, number, _ in asked} == {2}
    assert outcome.summary["privacy"]["epsilon"]["uploads"] <= most
    assert sum(count for (who, _), count in charged(tmp_path).items() if who == "uploads") == ROUNDS


def test_a_run_that_is_out_of_budget_can_be_resumed_to_nothing(run, tmp_path):
    """Catches: one more round with every resume."""
    most = epsilon_after(plan_of("local", noise_multiplier=Z), 1)["uploads"] * (1 + 1e-9)
    first = run("local", target_epsilon=most)
    with unchanged(tmp_path / LEDGER):
        again = run("local", target_epsilon=most, resume=True)
    assert (again.state.round, again.summary["stopped"]) == (1, "budget-exhausted")
    assert np.array_equal(again.state.vector, first.state.vector)


def test_a_run_without_budget_for_its_first_round_is_an_error_and_asks_nobody(run, tmp_path):
    """Catches: an untrained adapter delivered as a finished run."""
    asked = []
    with pytest.raises(BudgetError) as caught:
        run("central", target_epsilon=1e-3, asked=asked)
    assert caught.value.exit_status == 15
    assert asked == []
    assert not (tmp_path / LEDGER).exists()


@each_mode
def test_resuming_goes_on_from_the_saved_ledger(run, mode):
    """Catches: epsilons of the rounds since the restart only."""
    run(mode, kill=COLLECTING, in_round=3)
    outcome = run(mode, resume=True)
    plan = plan_of(mode, rounds=ROUNDS, noise_multiplier=Z)
    who = mechanism_of(plan).budgeted[0]
    assert outcome.summary["privacy"]["epsilon"][who] == epsilon_after(plan, ROUNDS)[who]
    lines = read_lines(outcome.folder / "metrics.jsonl")
    assert [line["privacy"]["epsilon"][who] for line in lines[1:]] == [
        epsilon_after(plan, number)[who] for number in range(1, ROUNDS + 1)
    ]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"noise_multiplier": 2.0}, "noise_multiplier"),
        ({"clip_norm": 2.0}, "clip_norm"),
        ({"delta": 1e-6}, "delta"),
        ({"clients": 9, "strategy": {"min_clients": 4}}, "enrolled_clients"),
        ({"target_epsilon": 50.0}, "target_epsilon"),
        ({"insecure_noise_seed": 7}, "private"),
    ],
)
def test_another_plan_is_refused_with_what_differs(run, tmp_path, changed, name):
    """Catches: less noise from the middle of a run on, under an account that was made for more."""
    run("local", kill=COLLECTING)
    asked = []
    with unchanged(tmp_path / LEDGER), pytest.raises(StorageError) as caught:
        run("local", resume=True, asked=asked, **changed)
    assert caught.value.code == "plan-changed"
    assert f"{name} was" in str(caught.value)
    assert asked == []


def test_a_run_of_the_older_account_is_refused_with_what_to_do(run, tmp_path):
    """Catches: a run planned for outsiders alone that goes on as if its noise were enough against other sites."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsugiki.server.run.federation.asdict", lambda plan: _older(asdict(plan)))
        run("distributed", kill=COLLECTING)
    with unchanged(tmp_path / LEDGER), pytest.raises(StorageError, match="with the version of Tsugiki") as caught:
        run("distributed", resume=True)
    assert caught.value.code == "plan-changed"
    assert "follows version 1 of the account" in str(caught.value)


def _older(plan):
    """Return a plan's numbers as versions before this account wrote them."""
    return {name: value for name, value in plan.items() if name != "account"}


def test_other_versions_of_the_accountant_are_another_plan(run, monkeypatch):
    """Catches: an account that changes in the middle with the library that computes it."""
    run("local", kill=COLLECTING)
    monkeypatch.setattr("tsugiki.common.privacy.planning.__version__", "9.9.9")
    with pytest.raises(StorageError, match="versions was") as caught:
        run("local", resume=True)
    assert caught.value.code == "plan-changed"


@pytest.mark.parametrize("changed", ["central", "distributed"])
def test_another_mode_is_another_run(run, changed):
    """Catches: a mode that changes between two rounds."""
    run("local", kill=COLLECTING)
    with pytest.raises(StorageError) as caught:
        run(changed, resume=True)
    assert caught.value.code == "checkpoint-foreign"


def test_the_plan_is_in_every_checkpoint(run):
    """Catches: a plan in memory: the check above would compare the new plan with itself."""
    outcome = run("distributed")
    assert outcome.state.plan["noise_multiplier"] == Z
    assert outcome.state.plan["min_clients"] == 4
    assert outcome.summary["privacy"]["plan_sha256"] == plan_of("distributed", rounds=ROUNDS, noise_multiplier=Z).sha256


@pytest.mark.parametrize("how", ["deleted", "elsewhere", "cut"])
def test_a_run_whose_ledger_is_gone_does_not_go_on(run, tmp_path, how):
    """Catches: a budget that starts anew: the checkpoint says that rounds were made, the ledger that none was."""
    run("local", kill=COLLECTING, in_round=3)
    path = tmp_path / LEDGER
    options = {"ledger": str(tmp_path / "other.jsonl")} if how == "elsewhere" else {}
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(StorageError):
        run("local", resume=True, **options)
