import pytest

from tests.support.federation import run_tiny, tiny_config
from tsugiki.client.app import simulated_app
from tsugiki.common.errors import DataError
from tsugiki.common.files import read_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of this file are."""
    return tmp_path_factory.mktemp("runs")


def result(folder, name, **sections):
    """Return the hash of the adapter that a run ends with."""
    run = {"name": name, "rounds": 1, **sections.pop("run", {})}
    return run_tiny(tiny_config(folder, run=run, **sections)).summary["adapter_sha256"]


def test_the_same_file_gives_the_same_bytes_and_another_seed_does_not(folder):
    """Catches: anything random that does not follow from the seed, and a seed that is not used."""
    first = result(folder, "a")
    assert result(folder, "b") == first
    assert result(folder, "c", run={"seed": 7}) != first
    assert result(folder, "d") == first


def test_dropout_follows_from_the_seed_too(folder):
    """Catches: global generators that are not seeded for each site and round."""
    settings = {"adapter": {"dropout": 0.5}}
    first = result(folder, "e", **settings)
    assert result(folder, "f", **settings) == first
    assert result(folder, "g") != first


def test_a_file_that_cannot_be_split_is_refused_before_a_folder_is_made(folder):
    """Catches: a run's name taken by a run that never was."""
    with pytest.raises(DataError):
        run_tiny(tiny_config(folder, run={"name": "h"}, simulation={"clients": 50}))
    assert not (folder / "runs" / "h").exists()


def test_faults_are_lent_to_the_in_process_engine(folder):
    """Catches: a fault hook that nobody calls, so that every fault test passes."""
    seen = []

    def fault(node, reply):
        seen.append((node, reply.metadata.message_type))
        return [reply]

    run_tiny(tiny_config(folder, run={"name": "i", "rounds": 1}), simulated_app, fault=fault)
    assert seen == [(1, "query"), (2, "query"), (1, "train"), (2, "train")]


def test_fedprox_keeps_sites_closer_to_the_shared_model(folder):
    """Catches: mu that does not reach the local loop."""

    def norms(name, strategy):
        outcome = run_tiny(tiny_config(folder, run={"name": name, "rounds": 1}, strategy=strategy, train=train))
        line = read_lines(outcome.folder / "metrics.jsonl")[-1]
        return [site["update_norm"] for site in line["accepted"].values()]

    train = {"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 8, "lr_schedule": "constant"}
    free = norms("j", {"name": "fedavg"})
    held = norms("k", {"name": "fedprox", "proximal_mu": 1.0})
    none = norms("l", {"name": "fedprox", "proximal_mu": 0.0})
    assert none == free
    assert all(one < other for one, other in zip(held, free, strict=True))
