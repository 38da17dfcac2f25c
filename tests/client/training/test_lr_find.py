"""The range test: what it smooths, what it suggests, when it gives up, and that it leaves nothing behind."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.federation import tiny_config
from tsugiki import cli
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.lr_find import FEWEST, find_rate, smooth, suggest
from tsugiki.common.config import files as config_file
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import StorageError, TrainingError, UsageError
from tsugiki.common.model.load import load_graft


@pytest.fixture
def config(tmp_path):
    """A tiny run of two sites."""
    return tiny_config(tmp_path)


def test_smoothing_begins_with_the_first_loss():
    """Catches: a mean that climbs from zero, which looks as if the loss rose."""
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0])[1] == pytest.approx((0.9 * 0.1 * 1.0 + 0.1 * 3.0) / (1 - 0.81))


def test_the_steepest_descent_is_suggested():
    """Catches: the least loss suggested, where training is about to break; the slope over the rate itself."""
    rates = np.geomspace(1e-6, 1.0, 100)
    at = np.log10(rates)
    smoothed = 1 - 0.8 / (1 + np.exp(-(at + 3) * 4)) + np.maximum(0, at + 1) ** 2 * 3
    suggestion, least = suggest(list(rates), list(smoothed))
    assert math.log10(suggestion) == pytest.approx(-3, abs=0.1)
    assert -2.2 < math.log10(least) < -0.8


def test_a_loss_that_never_falls_gives_no_suggestion():
    """Catches: a rate suggested by chance."""
    rates = list(np.geomspace(1e-6, 1.0, 40))
    assert math.isnan(suggest(rates, list(np.linspace(1, 2, 40)))[0])


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
    assert 1e-5 < sweep.suggestion <= sweep.least <= 1.0
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
    words = ["lr-find", str(file), "--lowest", "1e-5", "--steps", "30"]
    done = CliRunner().invoke(cli.app, [*words, "--plot", str(tmp_path / "rates.SVG")])
    assert done.exit_code == 0, done.output
    assert "suggestion: train.learning_rate = " in done.stdout
    svg = (tmp_path / "rates.SVG").read_text()
    assert svg.count("<svg") == 1
    assert "0.001" in svg
    assert "mathdefault" not in svg
    found = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)
    assert len(found["rates"]) == len(found["losses"]) == 30
    done = CliRunner().invoke(cli.app, [*words, "--plot", str(tmp_path / "gone" / "rates.png")])
    assert isinstance(done.exception, StorageError)
    assert done.exception.code == "not-writable"
    assert "suggestion: train.learning_rate = " in done.stdout  # not lost with the plot


def test_a_plot_with_another_ending_is_refused_before_anything_is_tried(tmp_path):
    """Catches: minutes of training whose result nobody sees; an ending that matplotlib fails on."""
    words = ["lr-find", str(tmp_path / "gone.toml"), "--plot", str(tmp_path / "rates.gif")]
    with pytest.raises(UsageError, match=r"rates\.gif"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_a_loss_that_may_be_below_zero_is_refused():
    """Catches: a range test that ends after eleven steps, since four times a loss below zero is less than it."""
    with pytest.raises(UsageError, match="below 0"):
        find_rate(parse({"task": {"name": "rlhf"}}), 1e-6, 1.0, 20, False, lambda step: None)
