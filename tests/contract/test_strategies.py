"""What every strategy promises."""

import copy
import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from tests.support.federation import run_tiny, tiny_config
from tsugiki.client.prepare import make_job
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.cohort import train_openly
from tsugiki.common.files import read_lines
from tsugiki.common.model.load import load_graft
from tsugiki.common.registry import Registry
from tsugiki.common.strategies.factors import pairs
from tsugiki.common.strategies.settings import STRATEGY_SETTINGS
from tsugiki.common.wire.arrays import ARRAY_KEY, encode
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.messages import TrainRequest, to_record
from tsugiki.common.wire.spec import unpack
from tsugiki.server.run.aggregate import STRATEGIES, aggregate, missing_implementations
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.replies import Accepted

SIZE = 40
each_strategy = pytest.mark.parametrize("name", STRATEGIES.names())


@pytest.fixture(autouse=True)
def identity():
    """Flower makes messages only in a process that has one."""
    identify_process()


def names_to_test(registry):
    """Return all names; a loop over none would pass."""
    assert registry.names(), f"no {registry.kind} is registered"
    return registry.names()


def settings(name, **changes):
    """Return a strategy's settings."""
    return STRATEGY_SETTINGS.get(name)(**changes)


def reply(site, update, weight=10):
    """Return an accepted update."""
    update = np.asarray(update, np.float32)
    return Accepted(site, update, weight, 0.5, 1, 0.1, float(np.linalg.norm(update)), update.nbytes)


def updates(count=5, seed=0, scale=0.1):
    """Return updates of several sites, all different, with different weights."""
    generator = np.random.default_rng(seed)
    return [reply(f"site-{n}", scale * generator.normal(size=SIZE), 10 + n) for n in range(count)]


def test_there_are_strategies_and_a_registry_without_any_fails():
    """Catches: tests below that pass because they loop over nothing."""
    assert names_to_test(STRATEGIES)
    with pytest.raises(AssertionError, match="no strategy is registered"):
        names_to_test(Registry("strategy"))


def test_every_strategy_has_settings_and_the_other_way_round(monkeypatch):
    """Catches: a strategy that can be named in a file and does not exist, or one that cannot be named."""
    assert missing_implementations() == set()
    monkeypatch.setitem(STRATEGIES._entries, "new", None)
    assert missing_implementations() == {"new"}
    monkeypatch.setitem(STRATEGY_SETTINGS._entries, "new", None)
    monkeypatch.setitem(STRATEGY_SETTINGS._entries, "other", None)
    assert missing_implementations() == {"other"}


@each_strategy
def test_settings_are_described_and_carry_their_name(name):
    """Catches: settings that choose another strategy; a setting without its sentence."""
    assert settings(name).name == name
    assert all(field.description for field in STRATEGY_SETTINGS.get(name).model_fields.values())


@each_strategy
@pytest.mark.parametrize("count", [4, 5])
def test_the_result_is_float32_of_the_same_shape(name, count):
    """Catches: FedAdam's float64 let through to the wire; an even number of sites, where a median is between two."""
    result, state = aggregate(settings(name), {}, 1, updates(count))
    assert result.dtype == np.float32
    assert result.shape == (SIZE,)
    assert np.isfinite(result).all()
    assert result.any()
    assert all(moment.dtype == np.float64 and moment.shape == (SIZE,) for moment in state.values())


@pytest.mark.parametrize("name", sorted(set(STRATEGIES.names()) - {"fedadam"}))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_the_same_update_from_everybody_is_the_result(name, scale):
    """Catches: a sum in place of a mean; weights that do not add up to 1; distances lost in rounding."""
    update = scale * np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    result, _ = aggregate(settings(name), {}, 1, [reply(f"site-{n}", update, 7 * n + 1) for n in range(5)])
    assert np.allclose(result, update, rtol=1e-6)


@each_strategy
def test_no_update_is_no_step(name):
    """Catches: an adaptive step out of nothing."""
    result, _ = aggregate(settings(name), {}, 1, [reply(f"site-{n}", np.zeros(SIZE)) for n in range(5)])
    assert not result.any()


@each_strategy
def test_the_order_of_replies_does_not_matter(name):
    """Catches: sums in the order of arrival, which differ in the last bits and so in the next round's bytes."""
    replies, results = updates(), set()
    for seed in range(6):
        random.Random(seed).shuffle(replies)  # noqa: S311
        result, state = aggregate(settings(name), {}, 3, replies)
        results.add((result.tobytes(), *(state[key].tobytes() for key in sorted(state))))
    assert len(results) == 1


@each_strategy
def test_replies_are_left_alone(name):
    """Catches: an average in place, which would change what is recorded."""
    replies = updates()
    kept = copy.deepcopy(replies)
    aggregate(settings(name), {}, 1, replies)
    assert [r.site for r in replies] == [r.site for r in kept]
    assert all(np.array_equal(a.update, b.update) for a, b in zip(replies, kept, strict=True))


def as_messages(replies):
    """Return replies as Flower's strategies get them, in the order of site names."""
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({ARRAY_KEY: Array(r.update)}),
                    "metrics": MetricRecord({"num-examples": r.weight}),
                }
            ),
            dst_node_id=1,
            message_type="train",
        )
        for r in sorted(replies, key=lambda r: r.site)
    ]


@each_strategy
def test_state_passed_on_is_as_good_as_an_object_kept_alive(name):
    """Catches: a moment that is forgotten, rounded or shared, so that a resumed run goes another way."""
    alive, state = STRATEGIES.get(name)(settings(name)), {}
    for number in (1, 2, 3):
        replies = updates(seed=number)
        zero = np.zeros(SIZE, np.float32)
        if hasattr(alive, "momentum_vector"):
            alive.current_arrays = ArrayRecord({ARRAY_KEY: Array(zero)})
        elif hasattr(alive, "current_arrays"):
            alive.current_arrays = {ARRAY_KEY: zero}
        expected, _ = alive.aggregate_train(number, as_messages(replies))
        handed_in = {key: moment.copy() for key, moment in state.items()}
        result, new = aggregate(settings(name), state, number, replies)
        assert np.allclose(result, expected[ARRAY_KEY].numpy(), rtol=1e-5, atol=0)  # our moments are float64
        assert all(np.array_equal(state[key], handed_in[key]) for key in state)
        state = new


def test_who_remembers_what():
    """Catches: a state that is always empty, with which the test above would pass for strategies without one."""
    remembered = {name: set(aggregate(settings(name), {}, 1, updates())[1]) for name in STRATEGIES.names()}
    assert remembered.pop("fedadam") == {"m_t", "v_t"}
    assert remembered.pop("fedavgm") == {"momentum_vector"}
    assert not any(remembered.values())


def test_fedavgm_is_the_papers_step():
    """Catches: a momentum that does not arrive, is counted twice in the first round, or has the wrong sign.

    Hsu et al. 2019, section 4: v <- beta v + update, w <- w + eta v.
    """
    chosen = settings("fedavgm", server_learning_rate=0.5, server_momentum=0.8)
    state, velocity = {}, np.zeros(SIZE)
    for number in (1, 2, 3):
        replies = updates(seed=number)
        weights = np.array([r.weight for r in replies], np.float64)
        velocity = 0.8 * velocity + np.average([r.update for r in replies], axis=0, weights=weights)
        result, state = aggregate(chosen, state, number, replies)
        assert np.allclose(result, 0.5 * velocity, rtol=1e-4, atol=1e-6)


def test_fedadam_is_the_papers_step():
    """Catches: settings that do not arrive; moments of weights in place of updates.

    Reddi et al. 2021, algorithm 2, with Flower's bias correction, in which round 1 counts as the second step.
    """
    chosen = settings("fedadam", server_learning_rate=0.3, beta_1=0.8, beta_2=0.9, tau=0.01)
    replies = updates()
    weights = np.array([r.weight for r in replies], np.float64)
    mean = np.average([r.update for r in replies], axis=0, weights=weights)
    m, v = 0.2 * mean, 0.1 * mean**2
    rate = 0.3 * np.sqrt(1 - 0.9**2) / (1 - 0.8**2)
    result, _ = aggregate(chosen, {}, 1, replies)
    assert np.allclose(result, rate * m / (np.sqrt(v) + 0.01), rtol=1e-4)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_weights_are_respected(name):
    """Catches: a plain mean; weights by position, not by site."""
    replies = [reply("b", np.ones(SIZE), 30), reply("a", np.zeros(SIZE), 10)]
    result, _ = aggregate(settings(name), {}, 1, replies)
    assert np.allclose(result, 0.75)
    assert np.allclose(aggregate(settings(name), {}, 1, replies[:1])[0], 1.0)


def test_median_and_krum_withstand_one_liar():
    """Catches: a robust strategy that is FedAvg by another name."""
    honest = [reply(f"site-{n}", np.ones(SIZE) + 0.01 * n, 10) for n in range(4)]
    replies = [*honest, reply("liar", np.full(SIZE, -1e4), 10_000)]
    for name in ("fedmedian", "krum"):
        assert np.allclose(aggregate(settings(name), {}, 1, replies)[0], 1.0, atol=0.05), name
    assert aggregate(settings("fedavg"), {}, 1, replies)[0].max() < -1000


def test_krum_returns_one_of_the_updates():
    """Catches: a mean of the closest (that would be Multi-Krum); the number of liars not handed on."""
    replies = updates(6)
    result, _ = aggregate(settings("krum", num_malicious_sites=2), {}, 1, replies)
    assert any(np.array_equal(result, r.update) for r in replies)
    made = STRATEGIES.get("krum")(settings("krum", num_malicious_sites=2))
    assert made.num_malicious_nodes == 2


SKEWED = {"clients": 3, "partition": "dirichlet", "dirichlet_alpha": 0.1, "min_rows": 3}


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_federation_of_lora_learns_and_tells_its_aggregation_error(name, tmp_path):
    """Catches: a strategy that a run cannot use; an error that is not told, or told of an exact mean."""
    settings = {"min_clients": 3, "num_malicious_sites": 0} if name == "krum" else {}
    config = tiny_config(
        tmp_path,
        run={"rounds": 3},
        train={"local_steps": 6},
        strategy={"name": name, **settings},
        simulation={"clients": 3},
    )
    before, *lines = read_lines(run_tiny(config).folder / "metrics.jsonl")
    errors = [line["aggregation_error"] for line in lines]
    assert len(errors) == 3
    if name in {"ffa", "rolora", "flora"}:
        assert max(errors) < 1e-5
    else:
        assert min(errors) > 1e-4
    assert lines[-1]["eval"]["loss"] < before["eval"]["loss"]


def test_svd_at_full_rank_has_no_error(tmp_path):
    """Catches: a projection that loses something where there is room for all."""
    config = tiny_config(tmp_path, adapter={"rank": 32}, strategy={"name": "svd"}, simulation=SKEWED)
    lines = read_lines(run_tiny(config).folder / "metrics.jsonl")[1:]
    assert max(line["aggregation_error"] for line in lines) < 1e-5


def test_rolora_sends_half(tmp_path):
    """Catches: zeros for the factor that was not trained on their way."""
    bytes_up = {}
    for name in ("fedavg", "rolora"):
        config = tiny_config(tmp_path, run={"name": name}, strategy={"name": name})
        bytes_up[name] = read_lines(run_tiny(config).folder / "metrics.jsonl")[1]["bytes_up"]
    assert bytes_up["rolora"] < 0.7 * bytes_up["fedavg"]


def asked_of(config, graft, values=None, number=1):
    """Return a train request of a round that starts from an adapter, and its message."""
    request = TrainRequest(config.for_sites(), number, graft.spec.sha256, 0.0, 0.5, 600.0, "0" * 16, "")
    return request, to_record(request, encode(graft.initial if values is None else values, graft.spec))


@pytest.mark.parametrize(("name", "rounds"), [("rolora", 3), ("flora", 2)])
def test_a_site_trains_nothing_but_what_it_sends(name, rounds, tmp_path):
    """Catches: weight decay, an optimiser's memory or a gradient on what is not trained in a round."""
    train = {"weight_decay": 0.1, "persist_optimizer": name == "rolora"}
    config = tiny_config(tmp_path, train=train, strategy={"name": name})
    graft = load_graft(config, config.model.name, config.run.seed)
    values = graft.initial + np.random.default_rng(1).normal(scale=0.05, size=graft.spec.size).astype(np.float32)
    for number in range(1, rounds + 1):
        job, _ = make_job(simulated_sites(config)[0], *asked_of(config, graft, values, number))
        assert job.part != job.graft.spec
        train_openly(job)
        after, before = (unpack(vector, graft.spec) for vector in (graft.read(), values))
        trained = {tensor.name for tensor in job.part.tensors}
        for tensor in graft.spec.tensors:
            same = np.array_equal(after[tensor.name], before[tensor.name])
            assert same == (tensor.name not in trained), (number, tensor.name)
        values = graft.read()


@pytest.mark.parametrize("name", ["flora", "rolora", "svd"])
def test_a_resumed_run_ends_with_the_same_bytes(name, tmp_path):
    """Catches: factors drawn anew, or a round of the other factor, after a resume."""
    ranks = {"ranks": [2, 1]} if name == "svd" else {}
    adapter = {"rank": 2, "wire_dtype": "float16"}
    found = []
    for stopped in (False, True):
        config = tiny_config(
            tmp_path,
            run={"name": f"{name}-{int(stopped)}", "rounds": 3},
            adapter=adapter,
            strategy={"name": name},
            simulation={"clients": 2, **ranks},
        )
        if stopped:
            stop_after(config, 1)
        found.append(run_tiny(config, resume=stopped).summary["adapter_sha256"])
    assert found[0] == found[1]


def stop_after(config, rounds):
    """Run a federation up to the end of a round."""

    class Ends(Progress):
        def round_ends(self, record):
            if record["round"] == rounds:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(config, progress=Ends())


def test_sites_of_smaller_ranks_train_the_first_components_only(tmp_path):
    """Catches: ranks that change nothing; a small site whose update moves components that it does not train."""
    ranks = {**SKEWED, "partition": "iid", "ranks": [1, 2, 4]}
    train, run = {"local_steps": 6}, {"rounds": 3}
    config = tiny_config(
        tmp_path, run=run, train=train, adapter={"rank": 4}, strategy={"name": "svd"}, simulation=ranks
    )
    sites = simulated_sites(config)
    assert [site.max_rank for site in sites] == [1, 2, 4]
    lines = read_lines(run_tiny(config).folder / "metrics.jsonl")
    assert lines[-1]["eval"]["loss"] < lines[0]["eval"]["loss"]
    graft = load_graft(config, config.model.name, config.run.seed)
    for site in sites:
        train_openly(make_job(site, *asked_of(config, graft))[0])
        tensors = unpack(graft.read(), graft.spec)
        for pair in pairs(graft.spec):
            assert not tensors[pair.a][site.max_rank :].any()
            assert not tensors[pair.b][:, site.max_rank :].any()
            assert tensors[pair.b][:, : site.max_rank].any()
