import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import tsugiki
from client.site import read_site, simulated_sites, site_of_node
from common.config_file import to_toml
from common.errors import ConfigError, DataError, ModelError
from common.tasks import TASKS
from tests.support.federation import CANARY, tiny_config, write_rows


def site(folder, text=None, **values):
    """Write a site.toml and read it."""
    folder.mkdir(exist_ok=True)
    known = {"name": "acme", "train": "train.csv", "data": "", "models": '"base" = "/models/base"', **values}
    text = text or "[site]\nname = '{name}'\n[data]\ntrain = '{train}'\n{data}\n[models]\n{models}\n".format(**known)
    (folder / "site.toml").write_text(text)
    return read_site(folder / "site.toml")


def task_of(config):
    """Return a run's task."""
    return TASKS.get(config.task.name)(config.task)


@pytest.fixture
def task(tmp_path):
    """Classification in two classes."""
    return task_of(tiny_config(tmp_path))


def test_all_problems_are_told_at_once(tmp_path):
    """Catches: a site's operator who corrects one line after the other."""
    text = '[site]\nname = "../../etc/x"\n[data]\nmin_rows = 0\ntrian = "a"\n[models]\na = 3\n'
    text += "[polcy]\nx = 1\n[server]\nport = 1\n"
    with pytest.raises(ConfigError) as caught:
        site(tmp_path, text)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"site.name", "data.train", "data.min_rows", "data.trian", "models", "polcy", "server.port"}
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("text", ["site = 3\n", "data = []\n", 'models = "x"\n', "", "[site\n"])
def test_a_file_of_another_shape_is_refused(tmp_path, text):
    """Catches: a TypeError in the place of a problem."""
    with pytest.raises(ConfigError):
        site(tmp_path, text or "# nothing\n")


def test_only_listed_models_are_loaded(tmp_path):
    """Catches: a run that makes a site load what it likes: the name taken as a path or hub id."""
    here = site(tmp_path)
    assert here.model_source("base") == "/models/base"
    for name in ("other", "/models/base", "../base", "", "Base"):
        with pytest.raises(ModelError) as caught:
            here.model_source(name)
        assert caught.value.code == "model-unknown"


@pytest.mark.parametrize("absolute", [False, True])
def test_paths_are_relative_to_the_file_or_absolute(tmp_path, task, absolute):
    """Catches: paths relative to the current folder, and an absolute path outside the site's folder refused."""
    (tmp_path / "elsewhere").mkdir()
    write_rows(tmp_path / "elsewhere" / "rows.csv", 8)
    (tmp_path / "site").mkdir()
    write_rows(tmp_path / "site" / "train.csv", 8)
    train = str(tmp_path / "elsewhere" / "rows.csv") if absolute else "train.csv"
    assert len(site(tmp_path / "site", train=train).train_shard(task)) == 8


def test_a_relative_path_does_not_lead_out_of_the_folder(tmp_path, task):
    """Catches: `../` followed: a site.toml that was handed over could point at anything."""
    write_rows(tmp_path / "train.csv", 8)
    with pytest.raises(DataError) as caught:
        site(tmp_path / "site", train="../train.csv").train_shard(task)
    assert caught.value.code == "shard-outside"


def test_the_file_says_how_the_data_are_read(tmp_path, task):
    """Catches: columns, min_rows or the evaluation file of site.toml not passed on."""
    rows = "sentence\tlabel\n" + f"{CANARY}\t1\n{CANARY}\t0\n" * 2
    (tmp_path / "train.tsv").write_text(rows)
    (tmp_path / "held.tsv").write_text(rows)
    data = 'evaluation = "held.tsv"\ncolumns = { text = "sentence" }\n'
    here = site(tmp_path, train="train.tsv", data=data)
    assert (len(here.train_shard(task)), len(here.evaluation_shard(task))) == (4, 4)
    with pytest.raises(DataError) as caught:
        site(tmp_path, train="train.tsv", data=data + "min_rows = 5\n").train_shard(task)
    assert caught.value.code == "shard-too-small"
    assert site(tmp_path).evaluation_shard(task) is None


def test_the_identity_changes_with_the_data(tmp_path):
    """Catches: tokenised rows kept after the file was replaced."""
    here = site(tmp_path)
    missing = here.identity()
    write_rows(tmp_path / "train.csv", 8)
    there = here.identity()
    os.utime(tmp_path / "train.csv", ns=(1, 1))
    touched = here.identity()
    write_rows(tmp_path / "train.csv", 10)
    assert len({missing, there, touched, here.identity()}) == 4


def node(**config):
    """Return the context of a node."""
    return Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})


def test_a_deployed_nodes_site_is_named_by_its_node_config(tmp_path):
    """Catches: a node without site.toml that trains on something else, or fails with a KeyError."""
    assert site(tmp_path).name == "acme"
    assert site_of_node(node(site=str(tmp_path / "site.toml"))).name == "acme"
    for config in ({}, {"site": 3}, {"site": str(tmp_path / "missing.toml")}):
        with pytest.raises(ConfigError):
            site_of_node(node(**config))


# Simulated sites


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
    with pytest.raises(ConfigError, match="a task with a label column"):
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
        "from common.config_file import read; from client.site import simulated_sites\n"
        "sites = simulated_sites(read(Path(sys.argv[1])))\n"
        "print(json.dumps([[site.name, *map(list, (site.rows, *site._parts()))] for site in sites]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parent), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", script, str(tmp_path / "run.toml")]
    there = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    here = [[site.name, list(site.rows), *site._parts()] for site in simulated_sites(config)]
    assert there == here


def test_evaluation_rows_are_kept_out_of_training(tmp_path, task):
    """Catches: a site that evaluates on what it trained on, and rows in neither."""
    for one in simulated_sites(tiny_config(tmp_path, simulation={"evaluation_fraction": 0.25})):
        train, kept = one._parts()
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
