"""The range test: what it smooths, what it suggests, when it gives up, and that it leaves nothing behind."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.federation import tiny_config
from tsugiki import cli
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training import lr_find
from tsugiki.client.training.lr_find import (
    FEWEST,
    TRIAL_ROUNDS,
    TRIALS,
    Sweep,
    Trial,
    draw,
    find_rate,
    in_one_place,
    smooth,
    suggest,
    try_rates,
)
from tsugiki.common.config import files as config_file
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.errors import StorageError, TrainingError, UsageError
from tsugiki.common.model.load import load_graft


@pytest.fixture
def config(tmp_path):
    """A tiny run of two sites that learns within a range test."""
    return tiny_config(tmp_path, train={"local_steps": 20, "per_device_train_batch_size": 12, "threads": 1})


def test_smoothing_begins_with_the_first_loss():
    """Catches: a mean that climbs from zero, which looks as if the loss rose."""
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0])[1] == pytest.approx((0.9 * 0.1 * 1.0 + 0.1 * 3.0) / (1 - 0.81))


def falling(noise=0.0):
    """Return rates and losses that fall around 1e-3, are least at about 1e-2, and explode after 0.1."""
    rates = np.geomspace(1e-5, 1.0, 100)
    at = np.log10(rates)
    losses = 1 - 0.6 / (1 + np.exp(-(at + 3) * 4)) + np.maximum(0, at + 1.5) ** 2 * 3
    return list(rates), list(losses + noise * np.random.default_rng(0).standard_normal(100))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_fifth_of_the_rate_of_the_least_loss_is_suggested(noise):
    """Catches: the steepest descent or the least loss suggested, where a longer training collapses."""
    suggestion, least = suggest(*falling(noise))
    assert 1e-2 < least < 0.2
    assert least / 10 <= suggestion <= least / 3


def test_a_least_loss_among_the_first_steps_does_not_count():
    """Catches: a lucky first batch whose rate is taken for the best."""
    rates, losses = falling()
    losses[0] = 0.1
    assert suggest(rates, losses)[1] > 1e-2


@pytest.mark.parametrize("shape", ["level", "rising", "noise", "falls by less than batches differ"])
def test_a_flat_curve_gives_no_suggestion(shape):
    """Catches: a rate suggested by chance."""
    rates = list(np.geomspace(1e-5, 1.0, 100))
    chance = 0.2 * np.random.default_rng(1).standard_normal(100)
    losses = {
        "level": np.ones(100),
        "rising": np.linspace(1, 2, 100),
        "noise": 1 + chance,
        "falls by less than batches differ": np.linspace(1.0, 0.95, 100) + chance,
    }
    assert math.isnan(suggest(rates, list(losses[shape]))[0])


def test_a_loss_below_or_above_its_start_has_fallen_or_not():
    """Catches: a collapse taken for success, since its first round was good; chance taken for a fall."""
    assert Trial(0.1, 1.0, [0.9, 0.8, 0.7]).fell
    assert Trial(0.1, 1.0, [0.9, 0.8, 0.7]).fall == pytest.approx(0.3)
    assert not Trial(0.1, 3.0, [2.1, 2.7, 2.9]).fell  # it came back up
    assert not Trial(0.1, 1.0, [1.0, 0.99, 0.99]).fell
    assert not Trial(0.1, 1.0, [0.9, 1.2, 1.5]).fell
    assert not Trial(0.1, 1.0, [0.5]).fell
    assert Trial(0.1, 1.0, [0.5]).fall == -math.inf


def test_lower_rates_are_tried_until_the_loss_falls(config):
    """Catches: a suggestion that stays although the federation does not confirm it; a trial of another federation."""
    runs = []

    def training_losses(run):
        runs.append(run)
        if run.train.learning_rate < 1e-9:
            return [1.0]
        return [0.9, 0.8, 0.7] if run.train.learning_rate < 0.02 else [1.0, 1.2]

    seen = []
    config = changed(config, {"train.head_learning_rate": 0.05, "task.warm_head": "auto"})
    trials = try_rates(config, 0.09, training_losses, seen.append)
    assert [trial.rate for trial in trials] == [0.09, 0.03, 0.01]
    assert [trial.fell for trial in trials] == [False, False, True]
    assert seen == [1, 2, 3, 4]
    assert [run.run.rounds for run in runs] == [1] + [TRIAL_ROUNDS] * 3
    for run in runs:
        assert run.simulation.clients == config.simulation.clients
        assert run.strategy == config.strategy
        assert run.train.warmup_ratio == config.train.warmup_ratio
        assert run.train.lr_schedule == "constant"
        assert run.train.head_rate == run.train.rate  # a head at another rate would train in the run without training
        assert run.task.warm_head == "off"  # as in the range test
        assert not run.evaluation.data  # rows to report on do not choose a rate


def test_the_trials_come_to_an_end(config):
    """Catches: rates that are divided for ever."""
    trials = try_rates(config, 0.1, lambda run: [1.0] * run.run.rounds, lambda done: None)
    assert len(trials) == TRIALS
    assert not any(trial.fell for trial in trials)
    with pytest.raises(TrainingError) as caught:
        try_rates(config, 0.1, lambda run: [], lambda done: None)
    assert caught.value.code == "diverged"


def test_one_place_is_one_site_without_privacy(tmp_path):
    """Catches: `--central` that verifies its suggestion in the federation."""
    private = tiny_config(tmp_path, privacy={"mode": "central", "target_epsilon": 8.0, "clip_norm": 0.5})
    place = in_one_place(private)
    assert len(simulated_sites(place)) == 1
    assert place.privacy.mode == "none"


def test_a_run_is_tried_and_left_as_it_was(config):
    """Catches: an adapter that goes into the next run half trained; rates that do not grow; other rows."""
    graft = load_graft(config, config.model.name, config.run.seed)
    seen = []
    sweep = find_rate(config, 1e-5, 1.0, 60, False, seen.append)
    assert np.array_equal(graft.read(), graft.initial)
    assert not graft.base.network.training
    assert sweep.rates == pytest.approx(list(np.geomspace(1e-5, 1.0, 60))[: len(sweep.rates)])
    assert len(sweep.rates) == len(sweep.losses) == len(sweep.smoothed)
    assert seen[:3] == [1, 2, 3]
    assert 1e-5 <= sweep.suggestion < sweep.least <= 1.0
    again = find_rate(config, 1e-5, 1.0, 60, False, seen.append)
    assert again.losses == sweep.losses


def test_central_takes_all_rows(config, monkeypatch):
    """Catches: --central that tries one site all the same."""
    sizes = []
    task = type(load_graft(config, config.model.name, config.run.seed).task)
    encode = task.encode
    monkeypatch.setattr(task, "encode", lambda self, shard, base: sizes.append(len(shard)) or encode(self, shard, base))
    for central in (False, True):
        find_rate(config, 1e-5, 1e-2, 20, central, lambda done: None)
    site, whole = sizes
    assert site == len(simulated_sites(config)[0].rows)
    assert whole == sum(len(one.rows) for one in simulated_sites(config))


def test_it_gives_up_when_the_loss_explodes(config):
    """Catches: hundreds of steps of a model that has diverged."""
    sweep = find_rate(config, 1e-3, 1e6, 200, False, lambda done: None)
    assert FEWEST < len(sweep.rates) < 200
    assert all(map(math.isfinite, sweep.losses))


def test_a_range_that_cannot_be_and_a_model_that_breaks_at_once_are_refused(config, monkeypatch):
    """Catches: an empty sweep, and NaN suggested."""
    with pytest.raises(UsageError):
        find_rate(config, 1e-2, 1e-3, 20, False, lambda done: None)
    monkeypatch.setattr("tsugiki.client.training.lr_find.math.isfinite", lambda value: False)
    with pytest.raises(TrainingError) as caught:
        find_rate(config, 1e-3, 1e-2, 20, False, lambda done: None)
    assert caught.value.code == "diverged"


def test_the_command_prints_and_draws(config, tmp_path):
    """Catches: no plot, or raw mathematics in it; JSON that no script can read; a result that is lost with the plot."""
    file = tmp_path / "run.toml"
    file.write_text(config_file.to_toml(config))
    words = ["lr-find", str(file), "--steps", "60"]
    done = CliRunner().invoke(cli.app, [*words, "--plot", str(tmp_path / "rates.SVG")])
    assert done.exit_code == 0, done.output
    assert "the federation at " in done.stdout
    assert "suggestion: train.learning_rate = " in done.stdout
    svg = (tmp_path / "rates.SVG").read_text()
    assert svg.count("<svg") == 1
    assert "0.001" in svg
    assert "mathdefault" not in svg
    assert not (tmp_path / "runs").exists()  # the trials leave no run
    found = json.loads(CliRunner().invoke(cli.app, [*words, "--json", "--no-verify"]).stdout)
    assert len(found["rates"]) == len(found["losses"]) > FEWEST
    assert found["trials"] == []
    done = CliRunner().invoke(cli.app, [*words, "--no-verify", "--plot", str(tmp_path / "gone" / "rates.png")])
    assert isinstance(done.exception, StorageError)
    assert done.exception.code == "not-writable"
    assert "suggestion: train.learning_rate = " in done.stdout  # not lost with the plot


@pytest.mark.parametrize(("optimizer", "last"), [("adamw", 1.0), ("sgd", 10.0)])
def test_the_command_looks_as_far_as_the_optimizer_needs(config, tmp_path, monkeypatch, optimizer, last):
    """Catches: SGD's rates cut off at 1; a flat curve with a suggestion, or verified; NaN in JSON."""
    asked = []
    sweep = Sweep([1e-5, 1.0], [1.0, 1.0], [1.0, 1.0], math.nan, 1.0, 0.1)
    monkeypatch.setattr(lr_find, "find_rate", lambda *words: asked.append(words) or sweep)
    file = tmp_path / "run.toml"
    file.write_text(config_file.to_toml(config))
    words = ["lr-find", str(file), "--set", f"train.optimizer={optimizer}"]
    done = CliRunner().invoke(cli.app, words)
    assert asked[0][1:3] == (1e-5, last)
    assert "flat" in done.stdout
    assert "suggestion: train.learning_rate" not in done.stdout
    found = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)
    assert (found["flat"], found["suggestion"], found["trials"]) == (True, None, [])


def test_the_figure_shows_the_fall(tmp_path, monkeypatch):
    """Catches: axes that the explosion at high rates stretches, so that the fall is a line at the bottom."""
    rates, losses = falling()
    losses[-5:] = [1e3] * 5
    sweep = Sweep(rates, losses, smooth(losses), *suggest(rates, losses), 1.0)
    drawn = []
    monkeypatch.setattr(lr_find, "render", lambda figure, kind: drawn.append(figure) or b"")
    draw(sweep, tmp_path / "rates.svg")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < min(sweep.smoothed) < losses[0] < high < 2 * losses[0]
    assert sweep.least < axes.get_xlim()[1] < 1.0


def test_a_plot_with_another_ending_is_refused_before_anything_is_tried(tmp_path):
    """Catches: minutes of training whose result nobody sees; an ending that matplotlib fails on."""
    words = ["lr-find", str(tmp_path / "gone.toml"), "--plot", str(tmp_path / "rates.gif")]
    with pytest.raises(UsageError, match=r"rates\.gif"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_a_loss_that_may_be_below_zero_is_refused():
    """Catches: a range test that ends after eleven steps, since four times a loss below zero is less than it."""
    with pytest.raises(UsageError, match="below 0"):
        find_rate(parse({"task": {"name": "rlhf"}}), 1e-6, 1.0, 20, False, lambda step: None)
