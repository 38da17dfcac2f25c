"""What a request is checked for before a site works on it; test_app.py sends the same through the ClientApp."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import RecordDict

from tests.support.federation import tiny_config
from tests.support.private import plan_of
from tsugiki.client import prepare
from tsugiki.client.cache import Desk
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.cohort import train_openly
from tsugiki.common.errors import DataError, PolicyError, SpecError, WireError
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import TrainRequest, to_record


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


def test_a_job_starts_from_what_was_received(config, graft):
    """Catches: a site that goes on from its own last parameters; another site's rows."""
    site = simulated_sites(config)[1]
    values = graft.initial + np.float32(0.5)
    job, plan = prepare.make_job(site, *asked(config, graft, values))
    assert plan is None
    assert np.array_equal(job.received, values)
    assert np.array_equal(graft.read(), values)
    assert list(job.clients) == [site.name]
    assert len(job.encoded) == len(site.rows) == len(job.clients[site.name])


def test_rows_are_tokenised_once(config, graft, monkeypatch):
    """Catches: a shard read and tokenised in every round."""
    monkeypatch.setattr(prepare, "desk", Desk())
    calls = []
    encode_rows = type(graft.task).encode
    monkeypatch.setattr(type(graft.task), "encode", lambda self, *rest: calls.append(1) or encode_rows(self, *rest))
    for site in simulated_sites(config)[:2] * 2:
        prepare.make_job(site, *asked(config, graft))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("policy", "round_", "refused"),
    [
        ({"tasks": ("causal-lm",)}, 0, "policy-task"),
        ({"base_fingerprints": ("f" * 12,)}, 0, "policy-base"),
        ({"privacy_modes": ("central",)}, 0, "policy-privacy-mode"),
        ({"max_rounds": 5}, 6, "policy-rounds"),
    ],
)
def test_the_policy_is_asked_about_run_base_and_plan(config, policy, round_, refused, monkeypatch):
    """Catches: one of the three forgotten; a round beyond what was announced."""
    site = simulated_sites(config)[0]
    monkeypatch.setattr(type(site), "policy", SitePolicy(**policy))
    with pytest.raises(PolicyError) as error:
        prepare.load(site, config, round_)
    assert error.value.code == refused


def test_the_policy_is_asked_about_steps(config, graft, monkeypatch):
    """Catches: a limit that is looked at after training."""
    site = simulated_sites(config)[0]
    monkeypatch.setattr(type(site), "policy", SitePolicy(max_local_steps=1))
    with pytest.raises(PolicyError) as error:
        prepare.make_job(site, *asked(config, graft))
    assert error.value.code == "policy-steps"


def test_a_gateway_does_not_stand_for_more_clients_than_the_plan_believes(config):
    """Catches: a gateway that learns from the operator alone why it was refused."""
    site = simulated_sites(config)[0]
    gateway = replace(site, name="gateway", parts=tuple((row,) for row in site.rows))
    few = plan_of("local", noise_multiplier=1.0, max_clients_per_site=len(gateway.parts) - 1)
    assert prepare.clients(gateway, config, None) == len(gateway.parts)
    with pytest.raises(DataError) as caught:
        prepare.clients(gateway, config, few)
    assert caught.value.code == "clients"
    assert prepare.clients(site, config, few) == 1


def test_another_adapter_or_none_is_refused(config, graft):
    """Catches: values written into an adapter that they do not belong to."""
    site = simulated_sites(config)[0]
    with pytest.raises(SpecError):
        prepare.make_job(site, *asked(config, graft, spec_sha256="0" * 64))
    request, _ = asked(config, graft)
    with pytest.raises(WireError) as error:
        prepare.make_job(site, request, RecordDict())
    assert error.value.code == "keys"


def test_moments_are_each_clients_own_and_begin_with_the_run(config, graft):
    """Catches: one site's moments at another, those of an earlier run, and moments kept where none are wanted."""
    keeping = config.model_copy(update={"train": config.train.model_copy(update={"persist_optimizer": True})})
    first, second = simulated_sites(config)[:2]
    job, _ = prepare.make_job(first, *asked(keeping, graft))
    job.moments(first.name)["step"] = 3
    later, _ = prepare.make_job(first, *asked(keeping, graft, round=2))
    assert later.moments(first.name) == {"step": 3}
    assert later.plan(first.name, 1.0).moments is later.moments(first.name)
    other, _ = prepare.make_job(second, *asked(keeping, graft, round=2))
    assert other.moments(second.name) == {}
    anew, _ = prepare.make_job(first, *asked(keeping, graft, round=1))
    assert anew.moments(first.name) == {}
    anew.moments(first.name)["step"] = 9
    much_later, _ = prepare.make_job(first, *asked(keeping, graft, round=7))
    assert much_later.moments(first.name) == {"step": 9}
    earlier_run, _ = prepare.make_job(first, *asked(keeping, graft, round=3))
    assert earlier_run.moments(first.name) == {}
    plain, _ = prepare.make_job(first, *asked(config, graft))
    assert plain.moments(first.name) is None


def test_training_can_be_watched(config, graft):
    """Catches: a status line that knows nothing of the steps."""
    seen = []
    prepare.watch_training(lambda step, steps, losses: seen.append((step, steps)))
    try:
        job, _ = prepare.make_job(simulated_sites(config)[0], *asked(config, graft))
        train_openly(job)
    finally:
        prepare.watch_training(lambda step, steps, losses: None)
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
    assert prepare.clients(site, config, None) == 1
    monkeypatch.setattr(Desk, "rows_of_clients", lambda *_: [[0], [1]])
    with pytest.raises(DataError) as caught:
        prepare.clients(site, config, None)
    assert caught.value.code == "clients"
