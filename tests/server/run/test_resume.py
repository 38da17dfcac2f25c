"""Runs that go on under other settings: what may change, what may not, and what is said of it."""

import json

import numpy as np
import pytest

from tests.support.federation import run_tiny, tiny_config, write_rows
from tests.support.toy import SPEC, federate, toy_app, toy_config
from tsugiki.common.audit import verify
from tsugiki.common.config.files import read
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import NotEnoughSites, StorageError, TsugikiError
from tsugiki.common.files import read_lines
from tsugiki.server.run.progress import Progress

CONSTANT = {"lr_schedule": "constant", "warmup_ratio": 0.0}


class Noted(Progress):
    """Keeps what the operator is shown."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        """Keep it."""
        self.lines.append(text)


def by_round(site, round_, received):
    """The update of a site, different in every round."""
    return np.full(SPEC.size, 0.25 * round_, np.float32)


def run(monkeypatch, config, **options):
    """Run, or resume, the toy federation."""
    return federate(monkeypatch, toy_app(["a", "b"], by_round), 2, config, **options)


@pytest.mark.parametrize("train", [CONSTANT, {}], ids=["constant", "linear"])
def test_a_finished_run_is_extended(tmp_path, train):
    """Catches: `checkpoint-foreign`; moments or best round lost at the seam; a changed schedule that is not said."""
    longer = {"name": "longer", "rounds": 9}
    whole = run_tiny(tiny_config(tmp_path, run=longer, train=train))
    short = tiny_config(tmp_path, run={"name": "short", "rounds": 6}, train=train)
    first = run_tiny(short)
    shown = Noted()
    extended = run_tiny(changed(short, {"run.rounds": 9}), resume=True, progress=shown)
    assert (first.summary["rounds"], extended.summary["rounds"]) == (6, 9)
    same = extended.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert same == (train == CONSTANT)
    assert any("depends on run.rounds: rounds 1 to 6" in line for line in shown.lines) == (not same)
    if same:
        assert extended.summary["best_sha256"] == whole.summary["best_sha256"]
        assert extended.summary["after"] == whole.summary["after"]
    assert "run.rounds: 9 from here on, 6 before" in shown.lines
    assert [line["round"] for line in read_lines(extended.folder / "metrics.jsonl")] == list(range(10))
    (resumed,) = [event for event in verify(extended.folder / "audit.jsonl") if event["event"] == "resumed"]
    assert resumed["changed"] == [{"key": "run.rounds", "before": 6, "now": 9}]
    assert read(extended.folder / "config.toml").run.rounds == 9


MAY_CHANGE = {
    "run.rounds": 4,
    "strategy.min_clients": 1,
    "strategy.start_with": 2,
    "strategy.wait_for_quorum_s": 1.0,
    "strategy.grace_s": 1.0,
    "strategy.round_timeout_s": 9.0,
    "strategy.connect_timeout_s": 9.0,
    "evaluation.every_rounds": 2,
    "evaluation.at_sites": False,
    "train.threads": 1,
    "model.public_name": "org/model",
}
MAY_NOT = {
    "run.seed": 1,
    "train.learning_rate": 0.5,
    "train.local_steps": 3,
    "adapter.rank": 4,
    "task.max_length": 64,
    "strategy.max_update_norm": 5.0,
    "strategy.fraction_train": 0.5,
    "model.name": "org/other",
}


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_does_not_shape_the_result_may_change(tmp_path, monkeypatch, key):
    """Catches: `checkpoint-foreign` for a quorum, a time-out or a number of rounds."""
    config = toy_config(tmp_path)
    run(monkeypatch, config)
    shown = Noted()
    run(monkeypatch, changed(config, {key: MAY_CHANGE[key]}), resume=True, progress=shown)
    assert [line for line in shown.lines if line.startswith(f"{key}: {MAY_CHANGE[key]} from here on")]
    # it is the run's own from now on
    shown = Noted()
    run(monkeypatch, read(tmp_path / "toy" / "config.toml"), resume=True, progress=shown)
    assert not [line for line in shown.lines if "from here on" in line]


@pytest.mark.parametrize("key", MAY_NOT)
def test_what_shapes_the_result_may_not_change(tmp_path, monkeypatch, key):
    """Catches: a run of two learning rates; and a refusal that names hashes instead of the setting and its values."""
    config = toy_config(tmp_path)
    run(monkeypatch, config)
    section, name = key.split(".")
    before = json.dumps(getattr(getattr(config, section), name))
    with pytest.raises(StorageError) as caught:
        run(monkeypatch, changed(config, {key: MAY_NOT[key], "run.rounds": 9}), resume=True)
    assert caught.value.code == "checkpoint-foreign"
    assert f"{key} was {before}, is {json.dumps(MAY_NOT[key])}." in str(caught.value)
    assert read(tmp_path / "toy" / "config.toml") == read_back(config)


def read_back(config):
    """Return a configuration as it is read from its file."""
    return changed(config, {})


def test_a_setting_that_was_edited_in_the_runs_own_file_is_named(tmp_path, monkeypatch):
    """Catches: a comparison with config.toml alone, which an operator may have edited."""
    config = toy_config(tmp_path)
    run(monkeypatch, config)
    file = tmp_path / "toy" / "config.toml"
    file.write_text(file.read_text().replace("local_steps = 50", "local_steps = 51"))
    with pytest.raises(StorageError, match=r"train\.local_steps was 50, is 51") as caught:
        run(monkeypatch, read(file), resume=True)
    assert caught.value.code == "checkpoint-foreign"


def test_the_monitor_of_sites_that_validate_shapes_the_result(tmp_path, monkeypatch):
    """Catches: sites that choose their adapters by one metric in some rounds and by another in the rest."""
    config = toy_config(tmp_path, train={"validate_every_steps": 2, "learning_rate": 1e-3, "head_learning_rate": 1e-3})
    run(monkeypatch, config)
    with pytest.raises(StorageError, match=r'evaluation\.monitor was "", is "eval_loss"'):
        run(monkeypatch, changed(config, {"evaluation.monitor": "eval_loss"}), resume=True)


def test_a_run_on_other_evaluation_rows_chooses_its_best_anew(tmp_path):
    """Catches: a best adapter by figures of other rows, and a gain from one file's figure to another's."""
    config = tiny_config(tmp_path)
    run_tiny(config)
    rows = write_rows(tmp_path / "other.csv", 6)
    shown = Noted()
    more = changed(config, {"evaluation.data": str(rows), "run.rounds": 3})
    outcome = run_tiny(more, resume=True, progress=shown)
    lines = read_lines(outcome.folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert [line["round"] for line in lines if line.get("on_other_rows")] == [2]
    assert outcome.summary["best_round"] in (2, 3)
    assert (outcome.summary["before_round"], outcome.summary["before"]) == (2, lines[2]["eval"])
    assert "the best adapter is looked for from round 2 on: earlier figures do not compare" in shown.lines


def test_a_run_that_stopped_early_says_why_it_does_not_go_on(tmp_path):
    """Catches: a longer run asked for, and nothing done, without a word."""
    evaluation = {"early_stopping_patience": 1}
    config = tiny_config(tmp_path, run={"rounds": 9}, train={"learning_rate": 1e-9}, evaluation=evaluation)
    assert run_tiny(config).summary["stopped"] == "early"
    shown = Noted()
    run_tiny(changed(config, {"run.rounds": 12}), resume=True, progress=shown)
    assert any("--set evaluation.early_stopping_patience=0 lets it go on" in line for line in shown.lines)


def test_the_export_of_the_shorter_run_is_kept_apart(tmp_path, monkeypatch):
    """Catches: an adapter of round 3 that is taken for that of the extended run."""
    config = toy_config(tmp_path)
    first = run(monkeypatch, config)
    (first.folder / "adapter").mkdir()
    run(monkeypatch, changed(config, {"run.rounds": 4}), resume=True)
    assert (first.folder / "adapter-after-3").is_dir()
    assert not (first.folder / "adapter").exists()


def nobody(monkeypatch, config):
    """Start a run without any site, which ends before its first round."""
    with pytest.raises(NotEnoughSites):
        federate(monkeypatch, toy_app([]), 0, config)


def test_the_same_start_works_after_one_that_did_no_round(tmp_path, monkeypatch):
    """Catches: `run-exists` after `not-enough-sites`, and the second start under the settings of the first."""
    config = toy_config(tmp_path, strategy={"connect_timeout_s": 0.1})
    nobody(monkeypatch, config)
    nobody(monkeypatch, config)
    outcome = run(monkeypatch, changed(config, {"train.local_steps": 7}))
    assert outcome.summary["rounds"] == 3
    assert read(outcome.folder / "config.toml").train.local_steps == 7
    events = [event["event"] for event in verify(outcome.folder / "audit.jsonl")]
    assert events.count("started") == 3
    with pytest.raises(StorageError) as caught:
        run(monkeypatch, config)
    assert caught.value.code == "run-exists"
    assert verify(outcome.folder / "audit.jsonl")[-1]["event"] == "finished"


def privately(folder, rounds, **privacy):
    """Return a private run of the tiny federation."""
    settings = {"mode": "local", "target_epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, **privacy}
    return tiny_config(folder, run={"rounds": rounds}, train=CONSTANT, privacy=settings)


def test_a_longer_private_run_is_refused_if_its_budget_does_not_hold(tmp_path):
    """Catches: rounds without a budget for them, and a refusal that does not say which setting is to blame."""
    run_tiny(privately(tmp_path, 2))
    stored = read(tmp_path / "runs" / "tiny" / "config.toml")
    with pytest.raises(TsugikiError) as caught:
        run_tiny(changed(stored, {"run.rounds": 4}), resume=True)
    assert caught.value.code == "budget-exhausted"
    assert "with run.rounds = 4 and strategy.min_clients = 2, 2 rounds are left" in caught.value.problem
    assert "--set run.rounds=2" in caught.value.hint
    # a refusal changes nothing
    assert read(tmp_path / "runs" / "tiny" / "config.toml") == stored
    assert run_tiny(stored, resume=True).summary["rounds"] == 2


def test_a_longer_private_run_is_accounted_anew(tmp_path):
    """Catches: `plan-changed` for more rounds that the budget allows, or rounds that are not charged."""
    config = privately(tmp_path, 2, noise_multiplier=40.0)
    first = run_tiny(config)
    more = run_tiny(changed(config, {"run.rounds": 3}), resume=True)
    assert more.summary["rounds"] == 3
    assert more.summary["privacy"]["epsilon"]["uploads"] > first.summary["privacy"]["epsilon"]["uploads"]
    assert more.state.plan["rounds"] == 3
