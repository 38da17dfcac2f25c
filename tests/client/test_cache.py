"""What a client process keeps between messages."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.federation import tiny_config
from tsugiki.client import cache
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.trainer import LocalRound, batches, grouping_lengths
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.tasks import TASKS


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """Every test starts with an empty cache."""
    cache.of_process().clear()


def test_rows_are_encoded_once(tmp_path, monkeypatch):
    """Catches: a shard that is tokenised anew in every round."""
    config = tiny_config(tmp_path)
    task, calls = TASKS.get(config.task.name), []
    encode = task.encode
    monkeypatch.setattr(task, "encode", lambda *arguments: calls.append(1) or encode(*arguments))
    site = simulated_sites(config)[0]
    first = SiteRun.open(site, config).rows("train")
    assert SiteRun.open(site, config).rows("train") is first
    assert len(calls) == 1


def test_what_is_cleared_is_made_anew(tmp_path):
    """Catches: a test that starts with what another one left; a node whose steps nobody sees any more."""

    def watch(step, steps, losses):
        pass

    config = tiny_config(tmp_path)
    kept = cache.SiteCache(watch=watch)
    run = replace(SiteRun.open(simulated_sites(config)[0], config), cache=kept)
    first = run.rows("train")
    kept.tail(("a", "train", "x"), Tails(), first)
    state = kept.moments_of("a site", "a run", ["a client"], 1)["a client"]
    kept.clear()
    assert run.rows("train") is not first
    assert kept.tails == {}
    assert kept.moments_of("a site", "a run", ["a client"], 2)["a client"] is not state
    assert kept.watch is watch


def test_other_rows_or_another_cut_are_other_entries(tmp_path):
    """Catches: one site trained on another's rows; texts cut as in an earlier run."""
    config = tiny_config(tmp_path)
    one, other = simulated_sites(config)
    shorter = parse({**config.model_dump(mode="json"), "task": {**config.task.model_dump(), "max_length": 8}})
    found = [SiteRun.open(site, run).rows("train") for site, run in ((one, config), (other, config), (one, shorter))]
    assert len({id(rows) for rows in found}) == 3
    assert (
        max(len(row) for row in found[2].texts["input_ids"]) <= 8 < max(len(row) for row in found[0].texts["input_ids"])
    )


def test_a_site_without_evaluation_rows(tmp_path):
    """Catches: a missing file read again at every evaluation, or as an error."""
    config = tiny_config(tmp_path)
    assert SiteRun.open(simulated_sites(config)[0], config).rows("evaluation") is None


def test_clients_of_a_gateway(tmp_path):
    """Catches: clients' rows looked up in the file instead of in what was encoded."""
    config = tiny_config(tmp_path, simulation={"clients": 6, "clients_per_site": 3})
    run = SiteRun.open(simulated_sites(config)[0], config)
    clients = run.rows_of_clients()
    assert [len(rows) for rows in clients] == [4, 4, 4]
    assert sorted(row for rows in clients for row in rows) == list(range(len(run.train_rows())))


def test_a_task_without_a_tail_has_none(tmp_path):
    """Catches: text classifiers trained together, whose adapters are inside the network."""
    config = tiny_config(tmp_path)
    run = SiteRun.open(simulated_sites(config)[0], config)
    assert cache.of_process().tail(("a site", "train", ""), run.graft, run.train_rows()) is None


class Tails:
    """A graft whose task counts the tails that it makes."""

    def __init__(self):
        self.made = 0
        self.base = None
        self.task = self

    def tail(self, base, encoded):
        """Return a new one."""
        self.made += 1
        return object()


def test_features_are_computed_once_for_a_graft():
    """Catches: a pass over all rows in every round; features of another model; memory that is never given back."""
    kept = cache.SiteCache()
    first, other = Tails(), Tails()
    rows = [("a", "train", "x"), ("b", "train", "x")]
    tails = [kept.tail(key, first, None) for key in rows * 2]
    assert tails[:2] == tails[2:]
    assert first.made == 2
    assert kept.tail(rows[0], other, None) not in tails
    assert list(kept.tails) == rows[:1]


def texts_of(run):
    """Return the tokens of the run's training rows."""
    return run.train_rows().texts["input_ids"]


def test_only_rows_that_the_run_touches_are_tokenised(tmp_path):
    """Catches: a whole file tokenised for a short run; other row numbers or counts; a batch of an empty row."""
    sections = {"train": {"local_steps": 1, "per_device_train_batch_size": 2}, "run": {"rounds": 2}}
    config = tiny_config(tmp_path, **sections)
    site = simulated_sites(config)[0]
    run = SiteRun.open(site, config)
    rows = run.train_rows()
    whole = run.graft.task.encode(site.train_shard(run.graft.task), run.graft.base)
    lengths = texts_of(run).lengths()
    assert len(rows) == len(whole)
    assert 4 <= (lengths > 0).sum() < len(whole)
    touched = np.flatnonzero(lengths)
    assert rows.take(touched).texts["input_ids"].lists() == whole.take(touched).texts["input_ids"].lists()
    assert rows.targets[touched].tolist() == whole.targets[touched].tolist()
    lengths = grouping_lengths(run.graft.task, rows, config.train)
    for number in (1, 2):
        at = LocalRound(config.run.seed, site.name, number, 0.0, 1.0)
        assert set(next(batches(len(rows), config.train, at, 1, lengths))) <= set(touched.tolist())


@pytest.mark.parametrize(
    "changes",
    [{"run.rounds": 50}, {"train.local_epochs": 1}, {"privacy.examples.noise_multiplier": 1.0}],
    ids=["enough rounds", "passes", "DP-SGD"],
)
def test_all_rows_are_tokenised_where_all_may_be_drawn(tmp_path, changes):
    """Catches: rows that are trained on and empty; DP-SGD's secret coins taken for the schedule."""
    small = {"local_steps": 1, "per_device_train_batch_size": 2}
    config = changed(tiny_config(tmp_path, run={"rounds": 1}, train=small), changes)
    assert texts_of(SiteRun.open(simulated_sites(config)[0], config)).lengths().all()


def test_each_client_of_a_gateway_has_its_own_rows(tmp_path):
    """Catches: one schedule for a site's whole file, though each client walks through its own rows."""
    sections = {"simulation": {"clients": 4, "clients_per_site": 2}, "run": {"rounds": 1}}
    config = tiny_config(tmp_path, **sections, train={"local_steps": 1, "per_device_train_batch_size": 2})
    run = SiteRun.open(simulated_sites(config)[0], config)
    lengths = texts_of(run).lengths()
    assert [int((lengths[rows] > 0).sum()) for rows in run.rows_of_clients()] == [2, 2]


def test_another_schedule_is_another_entry(tmp_path):
    """Catches: rows left empty by a short run and trained on by a longer one; a round beyond those announced."""
    short = tiny_config(tmp_path, train={"local_steps": 1, "per_device_train_batch_size": 2}, run={"rounds": 1})
    site = simulated_sites(short)[0]
    few = texts_of(SiteRun.open(site, short)).lengths()
    longer = changed(short, {"run.rounds": 30})
    assert texts_of(SiteRun.open(site, longer)).lengths().all()
    assert texts_of(SiteRun.open(site, short, round_number=30)).lengths().all()
    assert not few.all()
    faster = changed(short, {"train.learning_rate": 0.5})
    assert SiteRun.open(site, faster).train_rows() is SiteRun.open(site, short).train_rows()
