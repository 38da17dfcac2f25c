"""What a request is checked for before a site works on it; test_app.py sends the same through the ClientApp."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from tests.support.exports import export_of, settings_of, to_fuse
from tests.support.federation import model_folder, tiny_config, write_rows
from tests.support.private import plan_of
from tests.support.tiny import tiny_llama
from tsugiki.client import cache, prepare
from tsugiki.client.app import simulated_app
from tsugiki.client.prepare import SiteRun, load_at
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.site.site import read_site
from tsugiki.client.training.cohort import train_openly
from tsugiki.common import __version__
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.errors import DataError, ModelError, PolicyError, SpecError, WireError
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import EvaluateRequest, HelloRequest, TrainRequest, to_record
from tsugiki.server.engines.in_process import InProcessGrid

PRIVATE = {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run of four sites."""
    return tiny_config(tmp_path_factory.mktemp("run"))


@pytest.fixture
def graft(config):
    """The shared model, at its initial values."""
    graft = load_graft(config, config.model.name, config.run.seed)
    graft.write(graft.initial)
    return graft


def asked(config, graft, /, values=None, **fields):
    """Return a train request and its message."""
    request = replace(TrainRequest(config.for_sites(), 1, graft.spec.sha256, 0.0, 0.5, 600.0, "0" * 16, ""), **fields)
    arrays = encode(graft.initial if values is None else values, graft.spec)
    return request, to_record(request, arrays)


def job_of(site, config, graft, /, values=None, **fields):
    """Return the job that a site makes of a train request."""
    request, content = asked(config, graft, values, **fields)
    return SiteRun.open(site, config, request.round).job(request, content)


def test_a_job_starts_from_what_was_received(config, graft):
    """Catches: a site that goes on from its own last parameters; another site's rows."""
    site = simulated_sites(config)[1]
    values = graft.initial + np.float32(0.5)
    job = job_of(site, config, graft, values)
    assert SiteRun.open(site, config).plan is None
    assert np.array_equal(job.received, values)
    assert np.array_equal(graft.read(), values)
    assert list(job.clients) == [site.name]
    assert len(job.encoded) == len(site.rows) == len(job.clients[site.name])


def test_the_size_of_the_largest_adapter_is_known_after_a_hello(config, graft, monkeypatch):
    """Catches: a bound on what a server may send that never follows from the run, or that shrinks in a smaller one."""
    monkeypatch.setattr(cache, "_PROCESS", cache.SiteCache())
    site = simulated_sites(config)[0]
    assert cache.adapter_bytes() == 0
    SiteRun.open(site, config)
    assert cache.adapter_bytes() == graft.spec.size_bytes > 0
    SiteRun.open(site, changed(config, {"adapter.wire_dtype": "float16"}))
    assert cache.adapter_bytes() == graft.spec.size_bytes


def test_rows_are_tokenised_once(config, graft, monkeypatch):
    """Catches: a shard read and tokenised in every round."""
    cache.of_process().clear()
    calls = []
    encode_rows = type(graft.task).encode
    monkeypatch.setattr(type(graft.task), "encode", lambda self, *rest: calls.append(1) or encode_rows(self, *rest))
    for site in simulated_sites(config)[:2] * 2:
        job_of(site, config, graft)
    assert len(calls) == 2


def test_rows_of_other_settings_are_not_kept(config):
    """Catches: a client that stays for many runs and keeps a tokenised copy of its rows for each."""
    cache.of_process().clear()
    site = simulated_sites(config)[0]
    for seed in (1, 2, 3):
        SiteRun.open(site, config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})).train_rows()
    assert [key[1] for key in cache.of_process().rows] == ["train"]


@pytest.mark.parametrize(
    ("policy", "round_number", "refused"),
    [
        ({"tasks": ("causal-lm",)}, 0, "policy-task"),
        ({"base_fingerprints": ("f" * 12,)}, 0, "policy-base"),
        ({"privacy_modes": ("central",)}, 0, "policy-privacy-mode"),
        ({"max_rounds": 5}, 6, "policy-rounds"),
    ],
)
def test_the_policy_is_asked_about_run_base_and_plan(config, policy, round_number, refused, monkeypatch):
    """Catches: one of the three forgotten; a round beyond what was announced."""
    site = simulated_sites(config)[0]
    monkeypatch.setattr(type(site), "policy", SitePolicy(**policy))
    with pytest.raises(PolicyError) as error:
        SiteRun.open(site, config, round_number)
    assert error.value.code == refused


def test_the_policy_is_asked_about_steps(config, graft, monkeypatch):
    """Catches: a limit that is looked at after training."""
    site = simulated_sites(config)[0]
    monkeypatch.setattr(type(site), "policy", SitePolicy(max_local_steps=1))
    with pytest.raises(PolicyError) as error:
        job_of(site, config, graft)
    assert error.value.code == "policy-steps"


def test_a_gateway_does_not_stand_for_more_clients_than_the_plan_believes(config):
    """Catches: a gateway that learns from the operator alone why it was refused."""
    site = simulated_sites(config)[0]
    gateway = replace(site, name="gateway", parts=tuple((row,) for row in site.rows))
    few = plan_of("local", noise_multiplier=1.0, max_clients_per_site=len(gateway.parts) - 1)
    run = SiteRun.open(gateway, config)
    assert run.count_clients() == len(gateway.parts)
    with pytest.raises(DataError) as caught:
        replace(run, plan=few).count_clients()
    assert caught.value.code == "clients"
    assert replace(SiteRun.open(site, config), plan=few).count_clients() == 1


def test_another_adapter_or_none_is_refused(config, graft):
    """Catches: values written into an adapter that they do not belong to."""
    site = simulated_sites(config)[0]
    with pytest.raises(SpecError):
        job_of(site, config, graft, spec_sha256="0" * 64)
    request, _ = asked(config, graft)
    with pytest.raises(WireError) as error:
        SiteRun.open(site, config).job(request, RecordDict())
    assert error.value.code == "keys"


def test_moments_are_each_clients_own_and_begin_with_the_run(config, graft):
    """Catches: one site's moments at another, those of an earlier run, and moments kept where none are wanted."""
    keeping = config.model_copy(update={"train": config.train.model_copy(update={"persist_optimizer": True})})
    first, second = simulated_sites(config)[:2]
    job = job_of(first, keeping, graft)
    job.moments[first.name]["step"] = 3
    later = job_of(first, keeping, graft, round=2)
    assert later.moments[first.name] == {"step": 3}
    assert later.local_round(first.name, 1.0).moments is later.moments[first.name]
    other = job_of(second, keeping, graft, round=2)
    assert other.moments[second.name] == {}
    anew = job_of(first, keeping, graft, round=1)
    assert anew.moments[first.name] == {}
    anew.moments[first.name]["step"] = 9
    much_later = job_of(first, keeping, graft, round=7)
    assert much_later.moments[first.name] == {"step": 9}
    earlier_run = job_of(first, keeping, graft, round=3)
    assert earlier_run.moments[first.name] == {}
    plain = job_of(first, config, graft)
    assert plain.moments == {}
    assert plain.local_round(first.name, 1.0).moments is None


def test_training_can_be_watched(config, graft):
    """Catches: a status line that knows nothing of the steps."""
    seen = []
    cache.watch_training(lambda step, steps, losses: seen.append((step, steps)))
    try:
        job = job_of(simulated_sites(config)[0], config, graft)
        train_openly(job)
    finally:
        cache.watch_training(lambda step, steps, losses: None)
    assert seen == [(1, 2), (2, 2)]


def test_a_site_of_a_small_rank_refuses_what_it_cannot_train(tmp_path):
    """Catches: a site that trains more than its machine holds, or is cut to its rank where all need the same."""

    def rank(name, most, **adapter):
        config = tiny_config(tmp_path, adapter={"rank": 4, **adapter}, strategy={"name": name})
        return prepare.own_rank(replace(simulated_sites(config)[0], max_rank=most), config)

    assert [rank("svd", most) for most in (0, 3, 4, 9)] == [0, 3, 0, 0]
    assert rank("fedavg", 4) == 0
    assert rank("fedavg", 3, method="vera") == 0  # its rank is no size of what is trained
    with pytest.raises(PolicyError) as caught:
        rank("fedavg", 3)
    assert caught.value.code == "policy-rank"


@pytest.mark.parametrize("name", ["flora", "svd"])
def test_a_gateway_is_refused_where_each_clients_factors_are_needed(tmp_path, name, monkeypatch):
    """Catches: a mean of factors that is taken for a client's own, with an error of nothing."""
    config = tiny_config(tmp_path, strategy={"name": name})
    site = simulated_sites(config)[0]
    run = SiteRun.open(site, config)
    assert run.count_clients() == 1
    monkeypatch.setattr(SiteRun, "rows_of_clients", lambda _: [[0], [1]])
    with pytest.raises(DataError) as caught:
        run.count_clients()
    assert caught.value.code == "clients"


def counted(config, monkeypatch, kind, content):
    """Return how often a site loads its model for one message."""
    calls = []
    monkeypatch.setattr(prepare, "load_graft", lambda *arguments: calls.append(1) or load_graft(*arguments))
    grid = InProcessGrid(*simulated_app(config))
    (reply,) = grid.pull_messages(grid.push_messages([Message(content, 1, kind)]))
    assert not reply.has_error()
    return len(calls)


@pytest.mark.parametrize("privacy", [{}, PRIVATE], ids=["open", "private"])
def test_one_message_opens_one_run(tmp_path, privacy, monkeypatch):
    """Catches: a model, a plan or a policy that is asked for anew by each part of one answer."""
    config = tiny_config(tmp_path, privacy=privacy, simulation={"evaluation_fraction": 0.25})
    graft = load_graft(config, config.model.name, config.run.seed)
    _, train = asked(config, graft)
    hello = to_record(HelloRequest(config.for_sites(), __version__))
    assert counted(config, monkeypatch, "query", hello) == 1
    assert counted(config, monkeypatch, "train", train) == 1


def test_an_evaluation_opens_one_run(config, graft, monkeypatch):
    """Catches: a model that is asked for anew by each part of one answer."""
    held = config.model_copy(update={"simulation": config.simulation.model_copy(update={"evaluation_fraction": 0.25})})
    request = EvaluateRequest(held.for_sites(), 1, graft.spec.sha256, "0" * 16)
    content = to_record(request, encode(graft.initial, graft.spec))
    assert counted(held, monkeypatch, "evaluate", content) == 1


def test_a_site_says_where_a_reward_lies(tmp_path):
    """Catches: a folder that the server dictates; a reward of the site's own that passes for the run's."""
    base, task = tiny_llama(tmp_path / "base"), TASKS.get("rlhf")
    reward = settings_of(task.test_case(), base)["reward_adapter"]
    other = export_of(base, tmp_path / "other", task.test_case().exports["reward_adapter"], step=0.3)
    named = {**task.test_case().settings, "name": "rlhf", "reward_adapter": "judge"}
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
