import json
import shutil

import pytest

from client.app import simulated_app
from client.site import read_site
from client.split import split
from common.config_file import with_absolute_paths
from common.errors import UsageError
from server.simulate import simulate
from tests.support.federation import app_of_sites, leaks, model_folder, tiny_config, write_rows


def test_the_folders_train_as_the_simulation_does(tmp_path):
    """Catches: rows lost, in another order, or of another site; labels by number where the run names classes."""
    write_rows(tmp_path / "train.csv")
    write_rows(tmp_path / "dev.csv", 8)
    named = {"name": "sequence-classification", "max_length": 16, "labels": ["bad", "good"]}
    kept = {"clients": 3, "data": str(tmp_path / "train.csv"), "evaluation_fraction": 0.25}
    sections = {"task": named, "simulation": kept, "evaluation": {"at_sites": True, "data": str(tmp_path / "dev.csv")}}
    here = simulate(tiny_config(tmp_path, run={"name": "here"}, **sections), simulated_app)
    files = split(tiny_config(tmp_path, **sections), tmp_path / "sites")
    there = simulate(tiny_config(tmp_path, run={"name": "there"}, **sections), app_of_sites(files))
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    metrics = [(outcome.folder / "metrics.jsonl").read_text().splitlines() for outcome in (here, there)]
    mine, theirs = ([json.loads(line).get("sites_eval") for line in lines] for lines in metrics)
    assert len(mine[-1]) == 3
    assert mine == theirs
    row = json.loads((files[0].parent / "train.jsonl").read_text().splitlines()[0])
    assert row["label"] in ("bad", "good")
    assert (files[0].parent / "evaluation.jsonl").is_file()


def test_a_model_in_a_relative_folder_is_named_as_the_server_names_it(tmp_path, monkeypatch):
    """Catches: sites that refuse the run because they know its model by another path."""
    shutil.copytree(model_folder(), tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, model={"name": "models/tiny"})
    (first, _) = split(config, tmp_path / "sites")
    assert read_site(first).model_source(with_absolute_paths(config).model.name) == str(tmp_path / "models" / "tiny")


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    """Catches: a real site's files lost; half of the sites written before it is noticed."""
    (tmp_path / "sites" / "site-1").mkdir(parents=True)
    with pytest.raises(UsageError, match="site-1 is there already"):
        split(tiny_config(tmp_path), tmp_path / "sites")
    assert not leaks(tmp_path / "sites")
    assert [path.name for path in (tmp_path / "sites").iterdir()] == ["site-1"]
