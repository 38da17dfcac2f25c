"""The two kinds of rounds: what each hands to the strategy, and what each records."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.private import LEDGER, private_app, private_config, private_context
from tests.support.toy import SPEC, toy_app, toy_context, toy_state
from tsugiki.common.errors import StorageError
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.server.run import rounds
from tsugiki.server.run.open_round import OpenRound
from tsugiki.server.run.private_round import PrivateRound
from tsugiki.server.run.replies import Accepted, AcceptedSum, Collected, CollectedSum

LEVELS = np.full(SPEC.size, 1000)


@pytest.fixture
def handed_over(monkeypatch):
    """The updates that strategies were called with, a list for each step."""
    seen = []
    real = rounds.aggregated_step

    def watching(config, spec, state, updates):
        seen.append(list(updates))
        return real(config, spec, state, updates)

    monkeypatch.setattr(rounds, "aggregated_step", watching)
    return seen


def reply(site, value, rows, loss=0.5):
    """Return an accepted reply, whose update is one constant."""
    return Accepted(site, np.full(SPEC.size, value, np.float32), rows, loss, 3, 0.1 * rows, 1.0, 100, clients=2)


def test_an_open_round_hands_over_each_update_with_its_rows(tmp_path, handed_over):
    """Catches: sites weighted alike; a gateway's clients lost, for which an aggregation error would be told."""
    kind = OpenRound(toy_context(tmp_path, toy_app(["a", "b"]), 2))
    step = kind.step(toy_state(), 1, Collected([reply("a", 1.0, 30), reply("b", 5.0, 10)], [], 0, 0, 0.0))
    ((first, second),) = handed_over
    assert [(one.site, one.weight, one.clients) for one in (first, second)] == [("a", 30, 2), ("b", 10, 2)]
    assert np.allclose(step.vector, 2.0)
    assert step.record == {}


def test_a_private_round_hands_over_the_noisy_mean_alone(tmp_path, handed_over):
    """Catches: a mean weighted by its clients; figures of the sum, which nobody may see, in the record."""
    config = private_config("central", noise_multiplier=1.0, clients=4)
    ctx = private_context(tmp_path, private_app(["a", "b"], clients=2), 2, config)
    sums = [AcceptedSum(site, LEVELS, 2, 100) for site in ("a", "b")]
    step = PrivateRound(ctx, ctx.privacy).step(toy_state(), 1, CollectedSum(sums, [], 0, 0, 0.0, 2 * LEVELS))
    ((only,),) = handed_over
    assert isinstance(only, WeightedUpdate)
    assert (only.weight, only.clients) == (1, 1)
    assert np.array_equal(step.vector, only.update)
    assert set(step.record) == {"privacy"}
    assert step.record["privacy"]["clients"] == 4


def test_a_release_that_cannot_be_charged_is_not_made(tmp_path, handed_over, monkeypatch):
    """Catches: a mean that is made, and handed to the strategy, before it is in the ledger."""
    ctx = private_context(tmp_path, private_app(["a"]), 1, private_config("local", noise_multiplier=1.0))

    def fail(*arguments):
        raise StorageError("no disk", code="disk-full")

    monkeypatch.setattr("tsugiki.common.audit.append_lines", fail)
    with pytest.raises(StorageError):
        PrivateRound(ctx, ctx.privacy).step(toy_state(), 1, CollectedSum([], [], 0, 0, 0.0, LEVELS))
    assert handed_over == []
    assert not (tmp_path / LEDGER).exists()


def test_the_training_loss_is_a_mean_over_the_rows_of_those_who_share_it(tmp_path):
    """Catches: a mean over sites; a site that withholds its loss counted as a loss of zero."""
    kind = OpenRound(toy_context(tmp_path, toy_app(["a"]), 1))
    replies = [reply("a", 1.0, 30, loss=1.0), reply("b", 1.0, 10, loss=2.0), reply("c", 1.0, 60, loss=None)]
    record = kind.record(1, [], Collected(replies, [], 0, 0, 0.0))
    assert record["train_loss"] == pytest.approx(1.25)
    assert record["train_seconds"] == pytest.approx(6.0)
    nobody = [replace(one, loss=None) for one in replies]
    assert kind.record(1, [], Collected(nobody, [], 0, 0, 0.0))["train_loss"] is None
