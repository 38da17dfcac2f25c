import os

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from PIL import Image

from tests.support.federation import CANARY, site_folder, tiny_config, write_rows
from tsugiki.client.site.site import read_site, site_of_node, stamp
from tsugiki.common.data.images import write_idx
from tsugiki.common.errors import ConfigError, DataError, ModelError
from tsugiki.common.tasks import TASKS


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


def test_the_old_name_of_a_key_is_refused_with_the_new_one(tmp_path):
    """Catches: two settings of one name, of which a larger one is safer at the server and a smaller one at a site."""
    file = site_folder(tmp_path / "acme", "acme")
    file.write_text(f"[policy]\nmax_clients_per_site = 3\n{file.read_text()}")
    with pytest.raises(ConfigError, match="clients_counted_per_site, its new name"):
        read_site(file)


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


def test_the_identity_changes_with_every_image(tmp_path):
    """Catches: a folder taken for one thing: rows kept after a picture in it was replaced, added or removed."""
    here, folder = site(tmp_path, train="pictures"), tmp_path / "pictures" / "0"
    folder.mkdir(parents=True)
    seen = [here.identity()]
    for change in (
        lambda: (folder / "a.png").write_bytes(b"1"),
        lambda: (folder / "a.png").write_bytes(b"12"),
        lambda: os.utime(folder / "a.png", ns=(1, 1)),
        lambda: (folder / "b.png").write_bytes(b"1"),
        lambda: (folder / "b.png").rename(folder / "c.png"),
        lambda: (folder / "c.png").unlink(),
    ):
        change()
        seen.append(here.identity())
        assert here.identity() == seen[-1]
    assert len(set(seen)) == len(seen)
    assert len(seen[0]) < 500


def test_the_identity_changes_with_the_labels(tmp_path):
    """Catches: labels in a file of their own overlooked."""
    here = site(tmp_path, train=write_idx(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), [0, 1]))
    before = here.identity()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"other")
    assert here.identity() != before


def test_a_folder_of_images_is_read(tmp_path):
    """Catches: a site's own folder refused because it is no file, or its bounds not kept."""
    task = TASKS.get("image-classification")(TASKS.get("image-classification").Settings(labels=("cat", "dog")))
    for kind in ("cat", "dog"):
        (tmp_path / "site" / "pictures" / kind).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "site" / "pictures" / kind / "1.png")
    assert site(tmp_path / "site", train="pictures").train_shard(task).columns["label"] == [0, 1]
    with pytest.raises(DataError) as caught:
        site(tmp_path / "site", train="../site/../pictures").train_shard(task)
    assert caught.value.code == "shard-outside"


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


def test_the_stamp_of_a_site_follows_its_file_and_its_data(tmp_path):
    """Catches: a change that nobody notices until a restart; a file that is wrong for a moment, and a traceback."""
    file = site_folder(tmp_path / "acme", "acme")
    stamps = [stamp(file)]
    right = file.read_text()
    for text in (right.replace('"acme"', '"bolt"'), "[site", right + "\n"):
        file.write_text(text)
        stamps.append(stamp(file))
    (tmp_path / "acme" / "train.csv").write_text("text,label\na,0\n")
    stamps.append(stamp(file))
    (tmp_path / "acme" / "train.csv").unlink()
    stamps.append(stamp(file))
    file.unlink()
    stamps.append(stamp(file))
    assert len(set(stamps)) == 7
    assert stamp(file) == stamps[-1]


@pytest.mark.parametrize(("ca", "authority"), [("", ""), ("system", "system"), ("ca.crt", "{folder}/ca.crt")])
def test_the_ca_is_a_file_of_the_site_or_the_machine_s_trust(tmp_path, ca, authority):
    """Catches: a file called "system" looked for beside site.toml."""
    file = site_folder(tmp_path / "acme", "acme")
    file.write_text(f'[server]\nca = "{ca}"\n{file.read_text()}')
    found = read_site(file)
    assert found.server.authority(found.folder) == authority.format(folder=found.folder)
