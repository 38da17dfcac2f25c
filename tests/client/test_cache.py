"""What a client process keeps between messages."""

from pathlib import Path

import pytest

from tests.support.exports import export_of, settings_of, to_fuse
from tests.support.federation import model_folder, tiny_config, write_rows
from tests.support.tiny import tiny_llama
from tsugiki.client.cache import Desk, load_at
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.site.site import read_site
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS


@pytest.fixture
def desk():
    """An empty one."""
    return Desk()


def test_rows_are_encoded_once(desk, tmp_path, monkeypatch):
    """Catches: a shard that is tokenised anew in every round."""
    config = tiny_config(tmp_path)
    task, calls = TASKS.get(config.task.name), []
    encode = task.encode
    monkeypatch.setattr(task, "encode", lambda *arguments: calls.append(1) or encode(*arguments))
    site = simulated_sites(config)[0]
    first = desk.rows(site, config, "train")
    assert desk.rows(site, config, "train") is first
    assert len(calls) == 1


def test_other_rows_or_another_cut_are_other_entries(desk, tmp_path):
    """Catches: one site trained on another's rows; texts cut as in an earlier run."""
    config = tiny_config(tmp_path)
    one, other = simulated_sites(config)
    shorter = parse({**config.model_dump(mode="json"), "task": {**config.task.model_dump(), "max_length": 8}})
    found = [desk.rows(one, config, "train"), desk.rows(other, config, "train"), desk.rows(one, shorter, "train")]
    assert len({id(rows) for rows in found}) == 3
    assert (
        max(len(row) for row in found[2].texts["input_ids"]) <= 8 < max(len(row) for row in found[0].texts["input_ids"])
    )


def test_a_site_without_evaluation_rows(desk, tmp_path):
    """Catches: a missing file read again at every evaluation, or as an error."""
    config = tiny_config(tmp_path)
    assert desk.rows(simulated_sites(config)[0], config, "evaluation") is None


def test_clients_of_a_gateway(desk, tmp_path):
    """Catches: clients' rows looked up in the file instead of in what was encoded."""
    config = tiny_config(tmp_path, simulation={"clients": 6, "clients_per_site": 3})
    site = simulated_sites(config)[0]
    clients = desk.rows_of_clients(site, config)
    assert [len(rows) for rows in clients] == [4, 4, 4]
    assert sorted(row for rows in clients for row in rows) == list(range(len(desk.rows(site, config, "train"))))


def test_a_task_without_a_tail_has_none(desk, tmp_path):
    """Catches: text classifiers trained together, whose adapters are inside the network."""
    config = tiny_config(tmp_path)
    assert desk.tail(simulated_sites(config)[0], config) is None


def test_a_site_says_where_a_reward_lies(tmp_path):
    """Catches: a folder that the server dictates; a reward of the site's own that passes for the run's."""
    base, task = tiny_llama(tmp_path / "base"), TASKS.get("rlhf")
    reward = settings_of(task.tiny(), base)["reward_adapter"]
    other = export_of(base, tmp_path / "other", task.tiny().exports["reward_adapter"], step=0.3)
    named = {**task.tiny().settings, "name": "rlhf", "reward_adapter": "judge"}
    config = parse({"model": {"name": "base"}, "task": named, "train": {"device": "cpu"}})
    hashes = []
    for models in ({"judge": reward}, {"judge": str(other)}, {reward: reward}):
        lines = [f'"{name}" = "{source}"' for name, source in {"base": str(base), **models}.items()]
        (tmp_path / "site.toml").write_text(
            '[site]\nname = "a"\n[data]\ntrain = "x.csv"\n[models]\n' + "\n".join(lines)
        )
        site = read_site(tmp_path / "site.toml")
        if "judge" in models:
            hashes.append(load_at(site, config).spec.sha256)
    assert hashes[0] != hashes[1]
    with pytest.raises(ModelError) as caught:
        load_at(site, config)
    assert caught.value.code == "model-unknown"


def test_a_site_says_what_it_loads(tmp_path):
    """Catches: an adapter of a run loaded under the name that the server has for it, past the site's [models]."""
    base = Path(model_folder())
    adapters = to_fuse(tmp_path, base)
    write_rows(tmp_path / "train.csv", 8)
    text = '[site]\nname = "acme"\n\n[data]\ntrain = "train.csv"\n\n[models]\n'
    known = {"the-base": str(base), "tone": adapters[0], "topic": adapters[1]}
    (tmp_path / "site.toml").write_text(text + "".join(f'{name} = "{path}"\n' for name, path in known.items()))
    site = read_site(tmp_path / "site.toml")
    named = {"model": {"name": "the-base"}}
    config = parse({**named, "adapter": {"method": "fusion", "adapters": ["tone", "topic"]}})
    at_server = parse({"model": {"name": str(base)}, "adapter": {"method": "fusion", "adapters": adapters}})
    assert load_at(site, config).spec == load_graft(at_server, str(base), config.run.seed).spec
    for others in (["tone", "other"], list(adapters)):
        other = parse({**named, "adapter": {"method": "fusion", "adapters": others}})
        with pytest.raises(ModelError) as caught:
            load_at(site, other)
        assert caught.value.code == "model-unknown"


def test_a_reward_that_a_run_leaves_out_is_missing(tmp_path):
    """Catches: a site that is asked to allow a model without a name."""
    base = tiny_llama(tmp_path / "base")
    (tmp_path / "site.toml").write_text(f'[site]\nname = "a"\n[data]\ntrain = "x.csv"\n[models]\n"base" = "{base}"\n')
    config = parse({"model": {"name": "base"}, "task": {"name": "rlhf"}, "train": {"device": "cpu"}})
    with pytest.raises(ModelError) as caught:
        load_at(read_site(tmp_path / "site.toml"), config)
    assert caught.value.code == "adapter-missing"
