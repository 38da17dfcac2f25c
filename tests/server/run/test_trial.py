"""A trial federation: its losses, and what it leaves behind."""

from tests.support.federation import tiny_config
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed
from tsugiki.server.run.trial import training_losses


def test_a_loss_for_each_round_and_no_folder(tmp_path):
    """Catches: the line before training counted as a round; a trial that takes the run's name."""
    config = tiny_config(tmp_path)
    losses = training_losses(config, simulated_app)
    assert len(losses) == config.run.rounds
    assert all(0 < loss < 10 for loss in losses)
    assert not (tmp_path / "runs").exists()


def test_training_that_diverges_ends_the_losses(tmp_path):
    """Catches: a federation that diverged and ends lr-find with an error, or with losses that are not finite."""
    steep = {"train.optimizer": "sgd", "train.learning_rate": 10.0, "train.max_grad_norm": 0.0, "run.rounds": 4}
    config = changed(tiny_config(tmp_path), {**steep, "train.local_steps": 40, "train.divergence_factor": 1.01})
    assert len(training_losses(config, simulated_app)) < 4
