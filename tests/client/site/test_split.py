import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.support.exports import to_fuse
from tests.support.federation import app_of_sites, leaks, model_folder, tiny_config, write_rows
from tests.support.tiny import tiny_cnn, write_case
from tsugiki.client.app import simulated_app
from tsugiki.client.site.site import read_site
from tsugiki.client.site.split import split
from tsugiki.common.adapters.fusion import FusionSettings
from tsugiki.common.config.files import with_absolute_paths
from tsugiki.common.errors import UsageError
from tsugiki.common.tasks import TASKS
from tsugiki.server.run.simulate import simulate


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


def test_sites_know_where_the_reward_lies(tmp_path):
    """Catches: sites that refuse every run with a reward because their [models] has none."""
    (tmp_path / "train.csv").write_text("prompt\n" + "".join(f"name {number}\n" for number in range(8)))
    config = tiny_config(tmp_path, task={"name": "rlhf", "reward_adapter": "judge"}, evaluation={"data": ""})
    (first, _) = split(config, tmp_path / "sites")
    assert read_site(first).model_source("judge") == "judge"


def test_the_sites_know_the_adapters_that_a_run_fuses(tmp_path):
    """Catches: split sites that refuse their own run."""
    adapters = to_fuse(tmp_path / "adapters", Path(model_folder()))
    config = tiny_config(tmp_path).model_copy(update={"adapter": FusionSettings(adapters=adapters)})
    (first, _) = split(config, tmp_path / "sites")
    assert [read_site(first).model_source(name) for name in adapters] == list(adapters)


def image_config(folder, **simulation):
    """Return a run on the tiny case of images, which is written into `folder`."""
    case = TASKS.get("image-classification").test_case()
    folder.mkdir(exist_ok=True)
    data = str(write_case(folder, case.rows))
    return tiny_config(
        folder,
        task={"name": "image-classification", **case.settings},
        model={"name": str(tiny_cnn(folder / "model"))},
        evaluation={"data": data, "at_sites": True},
        simulation={"clients": 3, "data": data, "evaluation_fraction": 0.25, **simulation},
    )


def test_sites_with_images_train_as_the_simulation_does(tmp_path):
    """Catches: images written as text, in the order of their classes, or without the evaluation rows."""
    config = image_config(tmp_path / "data")
    here = simulate(config, simulated_app)
    files = split(config, tmp_path / "sites")
    there = simulate(
        config.model_copy(update={"run": config.run.model_copy(update={"name": "there"})}), app_of_sites(files)
    )
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert read_site(files[0]).data.evaluation == "evaluation-images-idx3-ubyte"


def test_labels_of_images_are_those_of_the_run(tmp_path):
    """Catches: the number of a class written where the class is called by another number."""
    config = image_config(tmp_path / "data")
    task = config.task.model_copy(update={"labels": ("1", "0")})
    (first, *_) = split(config.model_copy(update={"task": task}), tmp_path / "sites")
    chosen = TASKS.get("image-classification")(task)
    written = read_site(first).train_shard(chosen)
    bright = [bool(image[:, :6].mean() > image[:, 6:].mean()) for image in written.columns["image"]]
    assert [label == 0 for label in written.columns["label"]] == bright


def test_images_that_do_not_fit_into_a_file_are_refused(tmp_path):
    """Catches: an array of objects written as its addresses."""
    config = image_config(tmp_path / "data")
    for name, side in (("a", 8), ("b", 12)):
        for row in range(12):
            place = tmp_path / "data" / "pictures" / str(row % 2) / f"{name}{row}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (side, side)).save(place)
    mixed = config.simulation.model_copy(update={"data": str(tmp_path / "data" / "pictures")})
    with pytest.raises(UsageError, match="do not fit"):
        split(config.model_copy(update={"simulation": mixed}), tmp_path / "sites")


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    """Catches: a real site's files lost; half of the sites written before it is noticed."""
    (tmp_path / "sites" / "site-1").mkdir(parents=True)
    with pytest.raises(UsageError, match="site-1 is there already"):
        split(tiny_config(tmp_path), tmp_path / "sites")
    assert not leaks(tmp_path / "sites")
    assert [path.name for path in (tmp_path / "sites").iterdir()] == ["site-1"]
