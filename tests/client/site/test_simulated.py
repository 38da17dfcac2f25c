import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tsugiki
from tests.support.federation import tiny_config, write_rows
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.common.config.files import to_toml
from tsugiki.common.errors import ConfigError, DataError
from tsugiki.common.tasks import TASKS


@pytest.fixture
def task(tmp_path):
    """Classification in two classes."""
    config = tiny_config(tmp_path)
    return TASKS.get(config.task.name)(config.task)


def parts(config):
    """Return the rows of each site of a simulation, by name."""
    return {site.name: site.rows for site in simulated_sites(config)}


def check_partition(rows, count):
    """Check that every row is at exactly one site."""
    assert sorted(row for part in rows.values() for row in part) == list(range(count))


def test_an_even_split(tmp_path):
    """Catches: rows at no site or at two, uneven parts, names that do not sort."""
    rows = parts(tiny_config(tmp_path, simulation={"clients": 5}))
    check_partition(rows, 24)
    assert sorted(len(part) for part in rows.values()) == [4, 5, 5, 5, 5]
    assert list(rows) == [f"site-{n}" for n in range(5)]


def test_a_skewed_split(tmp_path):
    """Catches: labels not looked at, and the least number of rows not kept."""
    simulation = {"clients": 3, "partition": "dirichlet", "dirichlet_alpha": 0.1, "min_rows": 3}
    rows = parts(tiny_config(tmp_path, simulation=simulation))
    check_partition(rows, 24)
    assert min(len(part) for part in rows.values()) >= 3
    ones = [sum(row % 2 for row in part) / len(part) for part in rows.values()]
    assert max(ones) - min(ones) > 0.3


def test_a_split_by_column(tmp_path):
    """Catches: rows of one company at another's site."""
    write_rows(tmp_path / "train.csv", 9, company=lambda row: ("Bank AG", "clinic", "Retail")[row % 3])
    rows = parts(tiny_config(tmp_path, simulation={"partition": "by-column", "column": "company"}))
    assert rows == {"bank-ag": (0, 3, 6), "clinic": (1, 4, 7), "retail": (2, 5, 8)}


def test_a_skewed_split_needs_labels(tmp_path):
    """Catches: a KeyError for a task without a label column."""
    (tmp_path / "pairs.csv").write_text("anchor,positive\n" + "a,b\n" * 20)
    simulation = {"partition": "dirichlet", "data": str(tmp_path / "pairs.csv")}
    sections = {"task": {"name": "sentence-embedding", "loss": "multiple-negatives"}, "evaluation": {"data": ""}}
    with pytest.raises(ConfigError, match="where a task has no label column"):
        parts(tiny_config(tmp_path, simulation=simulation, **sections))


def test_a_simulation_needs_a_file(tmp_path):
    """Catches: the current folder opened as a file."""
    with pytest.raises(ConfigError, match=r"simulation\.data"):
        parts(tiny_config(tmp_path, simulation={"data": ""}))


def test_the_split_is_the_same_in_every_process(tmp_path):
    """Catches: a split that depends on hash randomisation or global generators: Ray's workers would mix rows up."""
    simulation = {"clients": 3, "partition": "dirichlet", "rows": 20, "min_rows": 2, "evaluation_fraction": 0.2}
    config = tiny_config(tmp_path, simulation=simulation)
    (tmp_path / "run.toml").write_text(to_toml(config))
    script = (
        "import sys, json; from pathlib import Path\n"
        "from tsugiki.common.config.files import read; from tsugiki.client.site.simulated import simulated_sites\n"
        "sites = simulated_sites(read(Path(sys.argv[1])))\n"
        "print(json.dumps([[site.name, *map(list, (site.rows, *site.split_rows()))] for site in sites]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1]), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", script, str(tmp_path / "run.toml")]
    there = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    here = [[site.name, list(site.rows), *site.split_rows()] for site in simulated_sites(config)]
    assert there == here


def test_evaluation_rows_are_kept_out_of_training(tmp_path, task):
    """Catches: a site that evaluates on what it trained on, and rows in neither."""
    for one in simulated_sites(tiny_config(tmp_path, simulation={"evaluation_fraction": 0.25})):
        train, kept = one.split_rows()
        assert sorted(train + kept) == list(one.rows)
        assert len(kept) == 3
        shards = one.train_shard(task), one.evaluation_shard(task)
        assert [len(shard) for shard in shards] == [9, 3]
        assert set(shards[0].columns["text"]).isdisjoint(shards[1].columns["text"])


def test_without_a_fraction_there_are_no_evaluation_rows(tmp_path, task):
    """Catches: an empty shard in the place of none."""
    one = simulated_sites(tiny_config(tmp_path))[0]
    assert one.evaluation_shard(task) is None
    assert len(one.train_shard(task)) == 12


def test_only_so_many_rows_are_used(tmp_path, task):
    """Catches: the first rows in the place of drawn ones, other rows at each look, and more than there are."""
    config = tiny_config(tmp_path, simulation={"rows": 10})
    check_partition(parts(config), 10)

    def texts(config):
        return {text for one in simulated_sites(config) for text in one.train_shard(task).columns["text"]}

    drawn = texts(config)
    assert len(drawn) == 10
    assert drawn != texts(tiny_config(tmp_path, simulation={"rows": 10}, run={"seed": 7}))
    with pytest.raises(DataError) as caught:
        parts(tiny_config(tmp_path, simulation={"rows": 25}))
    assert caught.value.code == "shard-too-small"


def test_the_identity_of_a_simulated_site_is_its_part_of_the_split(tmp_path):
    """Catches: tokenised rows of one run served in another with another split."""
    one = [site.identity() for site in simulated_sites(tiny_config(tmp_path))]
    assert len(set(one)) == 2
    assert one == [site.identity() for site in simulated_sites(tiny_config(tmp_path, train={"local_steps": 9}))]
    assert set(one).isdisjoint(site.identity() for site in simulated_sites(tiny_config(tmp_path, run={"seed": 7})))


def test_in_a_simulation_the_operators_model_is_the_sites(tmp_path):
    """Catches: a simulation that asks for a site.toml."""
    assert simulated_sites(tiny_config(tmp_path))[0].model_source("any/name") == "any/name"


def test_clients_behind_a_gateway_keep_their_rows(tmp_path, task):
    """Catches: a gateway that mixes its clients' rows, loses a client, or trains one on kept rows."""
    simulation = {"clients": 5, "clients_per_site": 2, "evaluation_fraction": 0.25}
    alone = simulated_sites(tiny_config(tmp_path, simulation={"clients": 5}))
    gateways = simulated_sites(tiny_config(tmp_path, simulation=simulation))
    assert [site.name for site in gateways] == ["site-0", "site-1", "site-2"]
    assert [part for site in gateways for part in site.parts] == [site.rows for site in alone]
    for site in gateways:
        shard, (trained, kept) = site.train_shard(task), site.split_rows()
        clients = site.clients(shard)
        assert len(clients) == len(site.parts)
        assert sorted(row for rows in clients for row in rows) == list(range(len(shard)))
        for rows, part in zip(clients, site.parts, strict=True):
            assert [trained[row] for row in rows] == [row for row in part if row not in kept]
