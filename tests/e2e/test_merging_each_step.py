"""Merging after each step is training in one place with the batches of all sites put together.

What follows from it is measured in docs/studies/merge_frequency.md.
"""

import numpy as np
import pytest
from torch import nn

from tests.support.federation import tiny_config, write_rows
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed
from tsugiki.common.model.load import load_graft
from tsugiki.server.run.simulate import simulate

SITES = 4
ROWS_OF_A_SITE = 6


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """A run of four sites whose batch is the whole shard: plain SGD, a constant rate, no clipping, no dropout."""
    write_rows(tmp_path / "train.csv", SITES * ROWS_OF_A_SITE)
    write_rows(tmp_path / "dev.csv", 8)
    config = tiny_config(
        tmp_path,
        run={"name": "federation", "rounds": 8},
        train={
            "optimizer": "sgd",
            "learning_rate": 0.5,
            "lr_schedule": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": 0.0,
            "local_steps": 1,
            "per_device_train_batch_size": ROWS_OF_A_SITE,
        },
        strategy={"min_clients": SITES, "norm_tolerance": 0},  # a limit on the norm makes the mean another one
        simulation={"clients": SITES},
    )
    for module in load_graft(config, config.model.name, config.run.seed).base.network.modules():
        if isinstance(module, nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)  # each site draws its own
    return config


def end_of(config, changes):
    """Return the adapter at the end of the run with these changes."""
    return simulate(changed(config, changes), simulated_app).state.vector


def test_merging_each_step_equals_one_place_with_all_batches_together(federation):
    """Catches: a mean that counts sites wrong, a step that is taken twice, a rate that the number of sites changes."""
    merged = end_of(federation, {})
    together = {
        "run.name": "one-place",
        "simulation.clients": 1,
        "strategy.min_clients": 1,
        "train.per_device_train_batch_size": SITES * ROWS_OF_A_SITE,
    }
    one_place = end_of(federation, together)
    start = load_graft(federation, federation.model.name, federation.run.seed).initial
    assert np.abs(merged - start).max() > 1e-2
    assert np.abs(merged - one_place).max() < 1e-6


def test_merging_seldom_is_another_training(federation):
    """Catches: a test above that would pass whatever is trained."""
    merged = end_of(federation, {})
    seldom = end_of(federation, {"run.name": "seldom", "run.rounds": 2, "train.local_steps": 4})
    assert np.abs(merged - seldom).max() > 1e-5
