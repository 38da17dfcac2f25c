"""What a client process keeps between messages."""

from dataclasses import replace

import pytest

from tests.support.federation import tiny_config
from tsugiki.client import cache
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.common.config.parse import parse
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
