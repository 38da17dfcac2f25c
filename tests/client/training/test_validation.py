"""Validation inside a round: what is measured on which rows, and which adapter is sent."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.federation import site_folder, tiny_config, write_rows
from tsugiki.client.cache import of_process
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.site.site import read_site
from tsugiki.client.training.cohort import train_openly
from tsugiki.client.training.validation import BestOfRound, held_out, training_shard, validation_shard
from tsugiki.common.errors import DataError, TrainingError
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import TrainRequest, to_record

STEPS = 6


class Scripted:
    """A task whose metric of each look is told beforehand."""

    name, lower_is_better = "scripted", frozenset({"loss"})

    def __init__(self, scores, metric="loss"):
        self.scores, self.metric, self.modes = iter(scores), metric, []

    def evaluate(self, base, encoded, batch_size):
        """Return the next score, and remember whether dropout was on."""
        self.modes.append(base.network.training)
        return {self.metric: next(self.scores)}


def watcher(scores, metric="loss", every=1, patience=0, watched=""):
    """Return what looks at an adapter of one number, which the test moves."""
    base = SimpleNamespace(network=torch.nn.Dropout())
    graft = SimpleNamespace(value=0.0, base=base, task=Scripted(scores, metric), device=torch.device("cpu"))
    graft.read = lambda: np.array([graft.value], np.float32)
    graft.write = lambda vector: setattr(graft, "value", float(vector[0]))
    settings = SimpleNamespace(validate_every_steps=every, local_patience=patience, threads=1, precision="auto")
    config = SimpleNamespace(train=settings, metric=watched or metric, evaluation=SimpleNamespace(batch_size=4))
    return BestOfRound(graft, [0], config), graft


def walk(best, graft, steps):
    """Move the adapter to 1, 2, ... until the round ends; return the steps done."""
    graft.base.network.train()
    for step in range(1, steps + 1):
        graft.value = float(step)
        if best.ends(step, steps):
            break
    best.restore()
    return step


@pytest.mark.parametrize(
    ("metric", "scores", "chosen"),
    [
        ("loss", [5.0, 4.0, 2.0, 3.0], 2.0),
        ("accuracy", [0.5, 0.9, 0.7, 0.8], 1.0),
        ("loss", [1.0, 2.0, 3.0, 4.0], 0.0),
        ("loss", [1.0, 1.0, 1.0, 1.0], 0.0),
        ("loss", [5.0, math.nan, 4.0, math.nan], 2.0),
        ("accuracy", [0.1, 0.2, 0.3, 0.4], 3.0),
    ],
)
def test_the_best_adapter_of_the_round_is_kept(metric, scores, chosen):
    """Catches: the last adapter kept, the direction turned round, a NaN that wins, a tie that counts as better."""
    best, graft = watcher(scores, metric)
    assert walk(best, graft, 3) == 3
    assert graft.value == chosen
    assert graft.task.modes == [False] * 4  # dropout is off while it measures
    assert graft.base.network.training


@pytest.mark.parametrize(
    ("patience", "scores", "steps"),
    [(2, [5.0, 4.0, 6.0, 6.0], 3), (2, [5.0, 6.0, 4.0, 6.0, 6.0], 4), (1, [5.0, 5.0], 1), (0, [5.0] + [9.0] * 5, 5)],
)
def test_patience_ends_the_round(patience, scores, steps):
    """Catches: misses that are never forgotten, or one too many or too few; a patience of 0 that ends everything."""
    best, graft = watcher(scores, patience=patience)
    assert walk(best, graft, 5) == steps


def test_it_measures_when_it_is_time_and_after_the_last_step():
    """Catches: a measurement in every step; a last adapter that is never a candidate."""
    best, graft = watcher([9.0, 8.0, 7.0, 6.0], every=2)
    assert walk(best, graft, 5) == 5
    assert len(graft.task.modes) == 4  # received, 2, 4, 5
    assert graft.value == 5.0


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 1.0), ("loss", math.nan), ("loss", math.inf)])
def test_a_metric_that_the_rows_do_not_give_is_told(metric, score):
    """Catches: a site whose updates are all zero because it compares with what is no number."""
    with pytest.raises(TrainingError, match="of 1 validation rows is no finite number") as caught:
        watcher([score], metric, watched="loss")
    assert caught.value.code == "validation-metric"


@pytest.fixture
def config(tmp_path):
    """A run of two sites with 12 rows each, which validates after every second step."""
    settings = {"validate_every_steps": 2, "validation_fraction": 0.25, "local_steps": STEPS}
    return tiny_config(tmp_path, train=settings, evaluation={"monitor": "eval_loss"})


@pytest.fixture
def graft(config):
    """The shared model at its initial values, and nobody's rows."""
    of_process().clear()
    graft = load_graft(config, config.model.name, config.run.seed)
    graft.write(graft.initial)
    return graft


def job_of(site, config, graft, round_number=1, values=None):
    """Return the job of one round."""
    request = TrainRequest(config.for_sites(), round_number, graft.spec.sha256, 0.0, 0.5, 600.0, "0" * 16, "")
    arrays = encode(graft.initial if values is None else values, graft.spec)
    return SiteRun.open(site, config, round_number).job(request, to_record(request, arrays))


def of_train(config, **values):
    """Return a run with other settings of the loop."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def tokens(encoded):
    """Return the rows as a set."""
    return {tuple(row) for row in encoded.texts["input_ids"]}


def test_rows_held_out_are_never_trained_on(config, graft, monkeypatch):
    """Catches: a slice drawn anew in each round, one that is trained on all the same, one that all sites share."""
    site = simulated_sites(config)[0]
    seen = []
    batch = type(graft.task).batch
    monkeypatch.setattr(type(graft.task), "batch", lambda self, encoded, rows, base: record(encoded, rows, base))

    def record(encoded, rows, base):
        if graft.base.network.training:
            seen.extend(tuple(encoded.texts["input_ids"][row]) for row in rows)
        return batch(graft.task, encoded, rows, base)

    slices = []
    for round_ in (1, 2, 3):
        job = job_of(site, config, graft, round_)
        slices.append(tokens(job.validation))
        assert train_openly(job)[2] == 9
    assert len(slices[0]) == 3
    assert slices[0] == slices[1] == slices[2]
    assert not slices[0] & set(seen)
    assert len(set(seen)) == 9  # every other row was
    whole = graft.task.encode(site.train_shard(graft.task), graft.base)
    assert tokens(whole) == set(seen) | slices[0]
    assert held_out(100, "site-0", config) != held_out(100, "site-1", config)
    assert held_out(100, "site-0", config) == held_out(100, "site-0", config)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})
    assert held_out(100, "site-0", config) != held_out(100, "site-0", other)


def test_rows_are_cut_anew_for_other_settings(config, graft):
    """Catches: a process that serves two runs and trains one of them on what the other held out."""
    site = simulated_sites(config)[0]
    found = [of_train(config, validate_every_steps=0), config, of_train(config, validation_fraction=0.5)]
    assert [len(SiteRun.open(site, one).rows("train")) for one in found] == [12, 9, 6]
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})
    slices = [tokens(SiteRun.open(site, one).rows("validation")) for one in (config, other)]
    assert slices[0] != slices[1]


def test_a_site_with_evaluation_rows_validates_on_them(tmp_path, config, graft):
    """Catches: rows taken away from training where the site has others."""
    path = site_folder(tmp_path / "acme", "acme")
    write_rows(path.parent / "own.csv", 6)
    path.write_text(path.read_text().replace("[models]", 'evaluation = "own.csv"\n[models]'))
    site = read_site(path)
    task = TASKS.get(config.task.name)(config.task)
    assert len(training_shard(site, task, config)) == 8
    assert len(validation_shard(site, task, config)) == 6
    job = job_of(site, config, graft)
    assert (len(job.encoded), len(job.validation)) == (8, 6)


def test_the_update_is_the_best_adapters_not_the_last_ones(config, graft, monkeypatch):
    """Catches: an adapter that is restored after the update was made, or never."""
    site = simulated_sites(config)[0]
    fast = of_train(config, learning_rate=0.5, warmup_ratio=0.0, validate_every_steps=1)
    looks = []
    ends = BestOfRound.ends

    def look(self, done, steps):
        result = ends(self, done, steps)
        looks.append((self.best_step == done, graft.read().copy()))
        return result

    monkeypatch.setattr(BestOfRound, "ends", look)
    update, trained, _ = train_openly(job_of(site, fast, graft))
    chosen = [vector for better, vector in looks if better][-1:] or [graft.initial]
    assert trained.steps == STEPS == len(looks)
    assert np.array_equal(update, (chosen[0].astype(np.float64) - graft.initial).astype(np.float32))
    assert not np.array_equal(chosen[0], looks[-1][1])  # at this rate the last one is not the best


def test_training_that_makes_it_worse_sends_nothing(config, graft, monkeypatch):
    """Catches: the first adapter after a step taken for the best, because the received one was no candidate."""
    scores = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(type(graft.task), "evaluate", lambda *_: {"loss": next(scores)})
    update, trained, _ = train_openly(job_of(simulated_sites(config)[0], config, graft))
    assert not update.any()
    assert trained.steps == STEPS


def test_an_early_end_is_told_and_its_loss_is_of_the_steps_done(config, graft, monkeypatch):
    """Catches: steps reported that were never taken; a mean over the zeros of the others."""
    scores = iter([1.0, 0.5, 2.0, 3.0])
    monkeypatch.setattr(type(graft.task), "evaluate", lambda *_: {"loss": next(scores)})
    long = of_train(config, local_patience=1, local_steps=40)
    update, trained, _ = train_openly(job_of(simulated_sites(config)[0], long, graft))
    assert trained.steps == 4
    assert 0.3 < trained.loss < 2.0
    assert update.any()


def test_looking_changes_nothing_about_training(config, graft):
    """Catches: a measurement that draws random numbers, leaves dropout off, or moves the schedule."""
    site, results = simulated_sites(config)[0], []
    for every in (1, 2, STEPS):
        seen = []
        chosen = of_train(config, validate_every_steps=every)
        job = replace(
            job_of(site, chosen, graft), watch=lambda step, steps, losses, seen=seen: seen.append(graft.read())
        )
        train_openly(job)
        results.append(np.array(seen))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_two_runs_send_the_same_bytes(config, graft):
    """Catches: a choice that depends on what the process did before."""
    site = simulated_sites(config)[1]
    first = train_openly(job_of(site, config, graft))[0]
    of_process().clear()
    torch.manual_seed(99)
    assert train_openly(job_of(site, config, graft))[0].tobytes() == first.tobytes()


@pytest.mark.parametrize(("rows", "fraction"), [(9, 0.1), (1, 0.5), (1, 0.9)])
def test_too_few_rows_are_refused(config, rows, fraction):
    """Catches: an empty slice, on which every metric is a NaN; a site with nothing left to train on."""
    with pytest.raises(DataError, match=f"{rows} rows") as caught:
        held_out(rows, "site-0", of_train(config, validation_fraction=fraction))
    assert caught.value.code == "shard-too-small"
    assert len(held_out(10, "site-0", of_train(config, validation_fraction=0.1))) == 1


def test_a_gateway_is_refused(tmp_path, config):
    """Catches: one client's rows held out for all, or a slice that crosses clients."""
    path = site_folder(tmp_path / "gate", "gate")
    write_rows(path.parent / "train.csv", 8, phone=lambda row: str(row % 2))
    path.write_text(path.read_text().replace("[models]", 'client_column = "phone"\n[models]'))
    task = TASKS.get(config.task.name)(config.task)
    with pytest.raises(DataError) as caught:
        training_shard(read_site(path), task, config)
    assert caught.value.code == "clients"
    assert len(training_shard(read_site(path), task, of_train(config, validate_every_steps=0))) == 8
