"""The two kinds of rounds: what each hands to the strategy, and what each records."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.private import LEDGER, private_app, private_config, private_context
from tests.support.toy import SPEC, toy_app, toy_config, toy_context, toy_state
from tsugiki.common.errors import StorageError
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.wire.arrays import PackedLevels
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.run import rounds
from tsugiki.server.run.kept import KeptUpdates
from tsugiki.server.run.open_round import OpenRound
from tsugiki.server.run.private_round import PrivateRound
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.replies import Accepted, AcceptedSum, CollectedMean, CollectedSum
from tsugiki.server.run.sums import RunningMean

LEVELS = np.full(SPEC.size, 1000)


@pytest.fixture
def handed_over(monkeypatch):
    """The updates that strategies were called with, a list for each step."""
    seen = []
    real = rounds.aggregated_step

    def watching(config, spec, state, updates, folder):
        seen.append(list(updates))
        return real(config, spec, state, updates, folder)

    monkeypatch.setattr(rounds, "aggregated_step", watching)
    return seen


def reply(site, value, rows, loss=0.5):
    """Return an accepted reply, whose update is one constant."""
    update = np.full(SPEC.size, value, np.float32)
    return Accepted(site, update, rows, loss, 3, 0.1 * rows, l2_norm(update), 100, clients=2, weight=rows)


def collected(replies, kept=None):
    """Return replies as a round collects them: their mean, and where they are kept, the updates."""
    mean = RunningMean(SPEC.size, len(replies))
    for one in replies:
        mean.add(one.update, one.norm, one.weight)
        if kept is not None:
            kept.add(WeightedUpdate(one.site, one.update, one.weight, one.clients))
    return CollectedMean([one.without_update() for one in replies], [], 0, 0, 0.0, mean, kept)


def test_an_open_round_hands_over_the_mean_alone_where_it_suffices(tmp_path, handed_over):
    """Catches: sites weighted alike; updates kept for a strategy that needs none of them."""
    kind = OpenRound(toy_context(tmp_path, toy_app(["a", "b"]), 2))
    step = kind.step(toy_state(), 1, collected([reply("a", 1.0, 30), reply("b", 5.0, 10)]))
    ((only,),) = handed_over
    assert only.weight == 40
    assert np.allclose(only.update, 2.0)
    assert np.allclose(step.vector, 2.0)
    assert set(step.record) == {"update_cosine"}


def test_an_open_round_hands_over_each_update_with_its_rows_where_they_are_needed(tmp_path, handed_over):
    """Catches: a gateway's clients lost, for which an aggregation error would be told; a mean for the median."""
    config = toy_config(tmp_path, strategy={"name": "fedmedian"})
    kind = OpenRound(toy_context(tmp_path, toy_app(["a", "b"]), 2, config))
    replies = [reply("b", 5.0, 10), reply("a", 1.0, 30)]
    step = kind.step(toy_state(), 1, collected(replies, KeptUpdates(tmp_path, SPEC.size)))
    ((first, second),) = handed_over
    assert [(one.site, one.weight, one.clients) for one in (first, second)] == [("a", 30, 2), ("b", 10, 2)]
    assert np.allclose(step.vector, 3.0)


@pytest.mark.parametrize(("other", "told"), [(1.0, False), (-1.0, True)])
def test_updates_that_disagree_are_told_once(other, told, tmp_path):
    """Catches: a note in every round, for updates that agree, or none."""
    notes = []
    progress = Progress()
    progress.note = notes.append
    kind = OpenRound(toy_context(tmp_path, toy_app(["a", "b"]), 2, progress=progress))
    replies = [reply("a", 1.0, 10), reply("b", other, 10)]
    first = kind.step(toy_state(), 1, collected(replies))
    assert first.record["update_cosine"] == pytest.approx(other)
    assert ["docs/skew.md" in note for note in notes] == [True] * told
    kind.step(toy_state(), 2, collected(replies))
    assert len(notes) == told


def test_a_private_round_hands_over_the_noisy_mean_alone(tmp_path, handed_over):
    """Catches: a mean weighted by its clients; figures of the sum, which nobody may see, in the record."""
    config = private_config("central", noise_multiplier=1.0, clients=4)
    ctx = private_context(tmp_path, private_app(["a", "b"], clients=2), 2, config)
    sums = [AcceptedSum(site, PackedLevels(np.zeros(0, np.uint8), 8), 2, 100) for site in ("a", "b")]
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
    record = kind.record(1, [], collected(replies))
    assert record["train_loss"] == pytest.approx(1.25)
    assert record["train_seconds"] == pytest.approx(6.0)
    nobody = [replace(one, loss=None) for one in replies]
    assert kind.record(1, [], collected(nobody))["train_loss"] is None
