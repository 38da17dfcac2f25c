"""What every strategy promises."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from tests.support.federation import run_tiny, tiny_config
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.cohort import train_openly
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ConfigError
from tsugiki.common.files import read_lines
from tsugiki.common.model.load import load_graft
from tsugiki.common.registry import Registry
from tsugiki.common.strategies import STRATEGIES, Strategy, WeightedUpdate
from tsugiki.common.strategies.factors import pairs
from tsugiki.common.wire.arrays import ARRAY_KEY, encode
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.messages import TrainRequest, to_record
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec, l2_norm, unpack
from tsugiki.server.run import checkpoint
from tsugiki.server.run.aggregate import aggregate
from tsugiki.server.run.aggregate import step as step_of_round
from tsugiki.server.run.checkpoint import State
from tsugiki.server.run.kept import KeptUpdates
from tsugiki.server.run.progress import Progress
from tsugiki.server.run.sums import RunningMean

SIZE = 40


def step(config, spec, state, found):
    """Return the step of a round whose moments, if any, are small and need no folder."""
    return step_of_round(config, spec, state, found, Path("unused"))


each_strategy = pytest.mark.parametrize("name", STRATEGIES.names())


def lora_spec(merged):
    """Return a spec of a layer of shape (6, 7) with a pair of rank 2, a head, and a merged pair where it is filled."""
    tensors = [TensorSpec("head.weight", (2, 3), "head")]
    for which, rank, part in (("default", 2, "adapter"), ("merged", 6, "merged"))[: 2 if merged else 1]:
        tensors.append(TensorSpec(f"x.lora_A.{which}.weight", (rank, 7), part))
        tensors.append(TensorSpec(f"x.lora_B.{which}.weight", (6, rank), part))
    return AdapterSpec("t", "lora", "{}", "0" * 64, "float32", tuple(tensors))


def lora_case(name, sites=5):
    """Return a run's settings, a spec, a state, and updates of the part that a strategy lets sites train."""
    kind = STRATEGIES.get(name)
    config = SimpleNamespace(strategy=kind.Settings(), run=SimpleNamespace(seed=3))
    spec = lora_spec(kind.fills_merged_pair)
    draw = np.random.default_rng(7)
    trained = {tensor.name for tensor in kind(config.strategy).trained_part(spec, 1).tensors}
    found = []
    for number in range(sites):
        update = 0.1 * draw.normal(size=spec.size).astype(np.float32)
        for tensor, values in unpack(update, spec).items():
            values *= tensor in trained
        found.append(WeightedUpdate(f"site-{number}", update, 10 + number))
    vector = draw.normal(size=spec.size).astype(np.float32)
    return config, spec, State(vector), found


def product(vector, spec):
    """Return what an adapter adds to the layer's weight, multiplied out."""
    tensors = unpack(vector.astype(np.float64), spec)
    kinds = {tensor.rsplit(".", 2)[1] for tensor in tensors if ".lora_A." in tensor}
    return sum(tensors[f"x.lora_B.{kind}.weight"] @ tensors[f"x.lora_A.{kind}.weight"] for kind in kinds)


@pytest.fixture(autouse=True)
def identity():
    """Flower makes messages only in a process that has one."""
    identify_process()


def names_to_test(registry):
    """Return all names; a loop over none would pass."""
    assert registry.names(), f"no {registry.kind} is registered"
    return registry.names()


def strategy(name, **changes):
    """Return a strategy, with settings that differ from its defaults."""
    kind = STRATEGIES.get(name)
    return kind(kind.Settings(**changes))


def reply(site, update, weight=10):
    """Return an update of a site."""
    return WeightedUpdate(site, np.asarray(update, np.float32), weight)


def updates(count=5, seed=0, scale=0.1):
    """Return updates of several sites, all different, with different weights."""
    generator = np.random.default_rng(seed)
    return [reply(f"site-{n}", scale * generator.normal(size=SIZE), 10 + n) for n in range(count)]


def test_there_are_strategies_and_a_registry_without_any_fails():
    """Catches: tests below that pass because they loop over nothing."""
    assert names_to_test(STRATEGIES)
    with pytest.raises(AssertionError, match="no strategy is registered"):
        names_to_test(Registry("strategy"))


@each_strategy
def test_the_class_is_whole(name):
    """Catches: settings that choose another strategy; a setting without its sentence; no word on what it is."""
    kind = STRATEGIES.get(name)
    assert issubclass(kind, Strategy)
    assert kind.name == name == kind.Settings().name
    assert all(field.description for field in kind.Settings.model_fields.values())
    assert kind.__doc__


@each_strategy
@pytest.mark.parametrize("count", [4, 5])
def test_the_result_is_float32_of_the_same_shape(name, count):
    """Catches: FedAdam's float64 let through to the wire; an even number of sites, where a median is between two."""
    result, state = aggregate(strategy(name), {}, 1, updates(count))
    assert result.dtype == np.float32
    assert result.shape == (SIZE,)
    assert np.isfinite(result).all()
    assert result.any()
    assert all(moment.dtype == np.float32 and moment.shape == (SIZE,) for moment in state.values())


@pytest.mark.parametrize("name", sorted(set(STRATEGIES.names()) - {"fedadam"}))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_the_same_update_from_everybody_is_the_result(name, scale):
    """Catches: a sum in place of a mean; weights that do not add up to 1; distances lost in rounding."""
    update = scale * np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    result, _ = aggregate(strategy(name), {}, 1, [reply(f"site-{n}", update, 7 * n + 1) for n in range(5)])
    assert np.allclose(result, update, rtol=1e-6)


@each_strategy
def test_no_update_is_no_step(name):
    """Catches: an adaptive step out of nothing."""
    result, _ = aggregate(strategy(name), {}, 1, [reply(f"site-{n}", np.zeros(SIZE)) for n in range(5)])
    assert not result.any()


@each_strategy
def test_the_order_of_replies_does_not_matter(name):
    """Catches: sums in the order of arrival, which differ in the last bits and so in the next round's bytes."""
    replies, results = updates(), set()
    for seed in range(6):
        random.Random(seed).shuffle(replies)  # noqa: S311
        result, state = aggregate(strategy(name), {}, 3, replies)
        results.add((result.tobytes(), *(state[key].tobytes() for key in sorted(state))))
    assert len(results) == 1


@each_strategy
def test_replies_are_left_alone(name):
    """Catches: an average in place, which would change what is recorded."""
    replies = updates()
    kept = copy.deepcopy(replies)
    aggregate(strategy(name), {}, 1, replies)
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
    alive, state = strategy(name).make(), {}
    for number in (1, 2, 3):
        replies = updates(seed=number)
        zero = np.zeros(SIZE, np.float32)
        if hasattr(alive, "momentum_vector"):
            alive.current_arrays = ArrayRecord({ARRAY_KEY: Array(zero)})
        elif hasattr(alive, "current_arrays"):
            alive.current_arrays = {ARRAY_KEY: zero}
        expected, _ = alive.aggregate_train(number, as_messages(replies))
        handed_in = {key: moment.copy() for key, moment in state.items()}
        result, new = aggregate(strategy(name), state, number, replies)
        assert np.allclose(result, expected[ARRAY_KEY].numpy(), rtol=1e-5, atol=0)
        assert all(np.array_equal(state[key], handed_in[key]) for key in state)
        state = new


def test_who_remembers_what():
    """Catches: a state that is always empty, with which the test above would pass for strategies without one."""
    remembered = {name: set(aggregate(strategy(name), {}, 1, updates())[1]) for name in STRATEGIES.names()}
    assert remembered.pop("fedadam") == {"m_t", "v_t"}
    assert remembered.pop("fedavgm") == {"momentum_vector"}
    assert not any(remembered.values())


def test_fedavgm_is_the_papers_step():
    """Catches: a momentum that does not arrive, is counted twice in the first round, or has the wrong sign.

    Hsu et al. 2019, section 4: v <- beta v + update, w <- w + eta v.
    """
    chosen = strategy("fedavgm", server_learning_rate=0.5, server_momentum=0.8)
    state, velocity = {}, np.zeros(SIZE)
    for number in (1, 2, 3):
        replies = updates(seed=number)
        weights = np.array([r.weight for r in replies], np.float64)
        velocity = 0.8 * velocity + np.average([r.update for r in replies], axis=0, weights=weights)
        result, state = aggregate(chosen, state, number, replies)
        assert np.allclose(result, 0.5 * velocity, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_the_servers_rate_scales_the_mean(name):
    """Catches: a rate that does not arrive; one of 1 that changes bytes."""
    mean, _ = aggregate(strategy(name), {}, 1, updates())
    plain, doubled = (
        strategy(name, **rate).combine(None, mean, mean, updates(), None)
        for rate in ({}, {"server_learning_rate": 2.0})
    )
    assert plain.tobytes() == mean.tobytes()
    assert doubled.dtype == np.float32
    assert np.array_equal(doubled, 2 * mean)


def test_fedadam_is_the_papers_step():
    """Catches: settings that do not arrive; moments of weights in place of updates.

    Reddi et al. 2021, algorithm 2, with Flower's bias correction, in which round 1 counts as the second step.
    """
    chosen = strategy("fedadam", server_learning_rate=0.3, beta_1=0.8, beta_2=0.9, tau=0.01)
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
    result, _ = aggregate(strategy(name), {}, 1, replies)
    assert np.allclose(result, 0.75)
    assert np.allclose(aggregate(strategy(name), {}, 1, replies[:1])[0], 1.0)


def test_median_and_krum_withstand_one_liar():
    """Catches: a robust strategy that is FedAvg by another name."""
    honest = [reply(f"site-{n}", np.ones(SIZE) + 0.01 * n, 10) for n in range(4)]
    replies = [*honest, reply("liar", np.full(SIZE, -1e4), 10_000)]
    for name in ("fedmedian", "trimmed_mean", "krum"):
        assert np.allclose(aggregate(strategy(name), {}, 1, replies)[0], 1.0, atol=0.05), name
    assert aggregate(strategy("fedavg"), {}, 1, replies)[0].max() < -1000


def test_krum_returns_one_of_the_updates():
    """Catches: a mean of the closest (that would be Multi-Krum); the number of liars not handed on."""
    replies = updates(6)
    result, _ = aggregate(strategy("krum", num_malicious_sites=2), {}, 1, replies)
    assert any(np.array_equal(result, r.update) for r in replies)
    made = strategy("krum", num_malicious_sites=2).make()
    assert made.num_malicious_nodes == 2


@each_strategy
def test_the_order_of_updates_does_not_matter_for_the_step(name):
    """Catches: factors that are stacked or summed in the order of arrival."""
    config, spec, state, found = lora_case(name)
    steps = {step(config, spec, state, order)[0].tobytes() for order in (found, found[::-1], found[2:] + found[:2])}
    assert len(steps) == 1


@pytest.mark.parametrize("name", sorted(set(STRATEGIES.names()) - {"fedadam"}))
def test_one_sites_update_is_the_step(name):
    """Catches: a combination that loses, doubles or rescales what a site has learned. Adam has steps of its own."""
    config, spec, state, found = lora_case(name, sites=1)
    after = state.vector + step(config, spec, state, found)[0]
    learned = state.vector + found[0].update
    rank = 2 if name == "svd" else 6
    u, values, v = np.linalg.svd(product(learned, spec))
    assert np.allclose(product(after, spec), (u[:, :rank] * values[:rank]) @ v[:rank], atol=1e-4)
    assert np.allclose(unpack(after, spec)["head.weight"], unpack(learned, spec)["head.weight"], atol=1e-5)


@each_strategy
def test_what_is_remembered_survives_a_checkpoint(name, tmp_path):
    """Catches: moments that a checkpoint rounds, renames or leaves out: a resumed run would go another way."""
    config, spec, state, found = lora_case(name)
    update, moments = step(config, spec, state, found)
    state = replace(state, vector=state.vector + update, round=1, strategy=moments)
    checkpoint.save(tmp_path, state, {}, spec.sha256)
    again = checkpoint.load(tmp_path, {}, spec.sha256)
    there, here = (step(config, spec, one, found) for one in (state, again))
    assert there[0].tobytes() == here[0].tobytes()
    assert there[1].keys() == here[1].keys()
    assert all(np.array_equal(there[1][key], here[1][key]) for key in there[1])


def test_a_linear_strategy_needs_the_mean_alone():
    """Catches: a strategy that the private modes allow, and that does something else with a mean than with updates."""
    linear = [name for name in STRATEGIES.names() if STRATEGIES.get(name).linear]
    assert {"fedavg", "fedadam", "ffa"} <= set(linear)
    for name in linear:
        assert not STRATEGIES.get(name).sees_factors
        assert gap_of_the_mean(name) < 1e-6, name
    for name in ("fedmedian", "krum", "flora", "svd"):
        assert gap_of_the_mean(name) > 1e-3, name


def test_a_strategy_that_keeps_no_update_needs_the_mean_alone():
    """Catches: updates forgotten that a strategy reads; a linear strategy that keeps them all in memory."""
    without = [name for name in STRATEGIES.names() if not STRATEGIES.get(name).needs_each_update]
    assert {"fedavg", "fedprox", "fedavgm", "fedadam", "ffa"} <= set(without)
    for name in STRATEGIES.names():
        kind = STRATEGIES.get(name)
        assert not (kind.linear and kind.needs_each_update), name
        if not kind.needs_each_update:
            assert gap_of_the_mean(name) < 1e-6, name


@each_strategy
def test_blocks_give_what_the_whole_gives(name, monkeypatch):
    """Catches: a strategy called coordinate-wise that is not; blocks or moments that are put together wrongly."""
    chosen = strategy(name)
    whole, state = aggregate(chosen, {}, 1, updates())
    monkeypatch.setattr("tsugiki.server.run.aggregate._FLOWER_BLOCK", 1)
    monkeypatch.setattr("tsugiki.server.run.aggregate._SHORTEST_BLOCK", 7)
    parts, others = aggregate(chosen, {}, 1, updates())
    assert parts.tobytes() == whole.tobytes()
    assert others.keys() == state.keys()
    assert all(np.array_equal(others[key], state[key]) for key in state)
    later = [aggregate(chosen, moments, 2, updates(seed=1))[0].tobytes() for moments in (state, others)]
    assert later[0] == later[1]


@pytest.mark.parametrize("name", [name for name in STRATEGIES.names() if not STRATEGIES.get(name).needs_each_update])
def test_the_running_mean_gives_the_step_of_flowers_own_average(name):
    """Catches: weights lost on the way into the running sum; moments that differ from those of the updates."""
    running_state, flowers_state = {}, {}
    for number in (1, 2, 3):
        replies = updates(6, seed=number)
        running = RunningMean(SIZE, len(replies))
        for one in random.Random(number).sample(replies, len(replies)):  # noqa: S311
            running.add(one.update, l2_norm(one.update), one.weight)
        mean = [WeightedUpdate("mean", running.value(), running.weight)]
        step_of_mean, running_state = aggregate(strategy(name), running_state, number, mean)
        flowers, flowers_state = aggregate(strategy(name), flowers_state, number, replies)
        assert np.allclose(step_of_mean, flowers, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("held_bytes", [0, 10**6])
@pytest.mark.parametrize("name", [name for name in STRATEGIES.names() if STRATEGIES.get(name).needs_each_update])
def test_updates_from_the_file_give_the_same_bytes(name, held_bytes, tmp_path):
    """Catches: a strategy that changes the updates it reads, or cannot read them from a file."""
    config, spec, state, found = lora_case(name)
    expected = step(config, spec, state, found)[0]
    kept = KeptUpdates(tmp_path, spec.size, held_bytes)
    for one in found[::-1]:
        kept.add(one)
    assert step(config, spec, state, kept.updates())[0].tobytes() == expected.tobytes()


def gap_of_the_mean(name):
    """Return by how much a strategy's second step differs if it gets the mean in place of the updates."""
    config, spec, state, found = lora_case(name)
    mean = np.average([one.update for one in found], axis=0, weights=[one.weight for one in found])
    steps = []
    for given in (found, [WeightedUpdate("mean", mean.astype(np.float32), 1)]):
        update, moments = step(config, spec, state, given)
        second = replace(state, vector=state.vector + update, round=1, strategy=moments)
        steps.append(step(config, spec, second, given)[0])
    return np.abs(steps[0] - steps[1]).max()


GATEWAYS = {"clients": 8, "data": "rows.csv", "clients_per_site": 2}
PRIVATE = {"mode": "central", "target_epsilon": 8.0}

REFUSALS = {
    "gateways": (lambda kind: kind.sees_factors, {"simulation": GATEWAYS}, "simulation.clients_per_site"),
    "dora": (lambda kind: kind.sees_factors, {"adapter": {"use_dora": True}}, "adapter.use_dora"),
    "another start": (lambda kind: kind.sees_factors, {"adapter": {"init": "orthogonal"}}, "adapter.init"),
    "an optimiser that stays": (
        lambda kind: kind.sees_factors,
        {"train": {"persist_optimizer": True}},
        "train.persist_optimizer",
    ),
    "no LoRA": (lambda kind: kind.needs_lora, {"adapter": {"method": "ia3"}}, "adapter.method"),
    "a frozen A": (
        lambda kind: kind.needs_lora and not kind.freezes_a,
        {"adapter": {"freeze_a": "yes"}},
        "adapter.freeze_a",
    ),
    "a trained A": (lambda kind: kind.freezes_a, {"adapter": {"freeze_a": "no"}}, "adapter.freeze_a"),
    "ranks": (lambda kind: not kind.mixed_ranks, {"simulation": {"ranks": [1, 2]}}, "simulation.ranks"),
    "a merged pair": (lambda kind: not kind.fills_merged_pair, {"adapter": {"merged_rank": 4}}, "adapter.merged_rank"),
    "private clients": (lambda kind: not kind.linear, {"privacy": PRIVATE}, "strategy.name"),
    "private rows": (
        lambda kind: not kind.same_part,
        {"privacy": {"examples": {"target_epsilon": 8.0}}},
        "strategy.name",
    ),
}


@each_strategy
@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_rules_between_settings_ask_the_traits(name, refusal):
    """Catches: a trait that no rule asks; a rule that knows strategies by name, and overlooks a new one."""
    trait, sections, key = REFUSALS[refusal]
    try:
        parse({"strategy": {"name": name}, **sections})
        keys = set()
    except ConfigError as error:
        keys = {problem.key for problem in error.problems}
    assert (key in keys) == trait(STRATEGIES.get(name))


@each_strategy
def test_what_a_strategy_needs_of_lora_is_set(name):
    """Catches: A trained where it is to be frozen; no pair to merge into; settings that nobody asked for."""
    kind, adapter = STRATEGIES.get(name), parse({"strategy": {"name": name}}).adapter
    assert (adapter.freeze_a == "yes") == kind.freezes_a
    assert (adapter.merged_rank > 0) == kind.fills_merged_pair


@each_strategy
def test_sites_train_the_same_part_where_the_strategy_says_so(name):
    """Catches: DP-SGD allowed where a round trains other numbers; a merged pair sent back by sites."""
    kind = STRATEGIES.get(name)
    spec = lora_spec(merged=True)
    parts = [kind(kind.Settings()).trained_part(spec, round_number) for round_number in (1, 2, 3)]
    assert all(tensor.part != "merged" for part in parts for tensor in part.tensors)
    assert all("head.weight" in {tensor.name for tensor in part.tensors} for part in parts)
    if kind.same_part:
        assert parts[0] == parts[1] == parts[2]


SKEWED = {"clients": 3, "partition": "dirichlet", "dirichlet_alpha": 0.1, "min_rows": 3}


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_federation_of_lora_learns_and_tells_its_aggregation_error(name, tmp_path):
    """Catches: a strategy that a run cannot use; an error that is not told, or told of an exact mean."""
    of_three = {
        "krum": {"min_clients": 3, "num_malicious_sites": 0},
        "trimmed_mean": {"min_clients": 3, "trim_fraction": 0.34},
    }
    settings = of_three.get(name, {})
    config = tiny_config(
        tmp_path,
        run={"rounds": 3},
        train={"local_steps": 6},
        strategy={"name": name, **settings},
        simulation={"clients": 3},
    )
    before, *lines = read_lines(run_tiny(config).folder / "metrics.jsonl")
    errors = [line["aggregation_error"] for line in lines if "aggregation_error" in line]
    assert "aggregation_error" in lines[0]  # later ones only while measuring takes a small share of the time
    if name in {"ffa", "rolora", "flora"}:
        assert max(errors) < 1e-5
    else:
        assert min(errors) > 1e-4
    assert lines[-1]["eval"]["loss"] < before["eval"]["loss"]


def test_svd_at_full_rank_has_no_error(tmp_path):
    """Catches: a projection that loses something where there is room for all."""
    config = tiny_config(tmp_path, adapter={"rank": 32}, strategy={"name": "svd"}, simulation=SKEWED)
    lines = read_lines(run_tiny(config).folder / "metrics.jsonl")[1:]
    assert max(line["aggregation_error"] for line in lines if "aggregation_error" in line) < 1e-5


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
        run = SiteRun.open(simulated_sites(config)[0], config, number)
        job = run.job(*asked_of(config, graft, values, number))
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
        train_openly(SiteRun.open(site, config, 1).job(*asked_of(config, graft)))
        tensors = unpack(graft.read(), graft.spec)
        for pair in pairs(graft.spec):
            assert not tensors[pair.a][site.max_rank :].any()
            assert not tensors[pair.b][:, site.max_rank :].any()
            assert tensors[pair.b][:, : site.max_rank].any()
