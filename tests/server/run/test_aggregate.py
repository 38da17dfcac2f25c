import logging

import numpy as np
import pytest

from tsugiki.common.strategies import STRATEGIES, WeightedUpdate
from tsugiki.common.wire.flower import identify_process
from tsugiki.server.run.aggregate import aggregate

SIZE = 6


@pytest.fixture(autouse=True)
def _identified():
    """Give this process the identity that Flower asks for, as every engine does."""
    identify_process()


def reply(site, update, weight=10):
    """Return an update of a site."""
    return WeightedUpdate(site, np.broadcast_to(np.asarray(update, np.float32), (SIZE,)).copy(), weight)


def strategy(name, **values):
    """Return a strategy, with settings that differ from its defaults."""
    kind = STRATEGIES.get(name)
    return kind(kind.Settings(**values))


def drawn(count, seed=0):
    """Return updates drawn around one."""
    rng = np.random.default_rng(seed)
    return [reply(f"site-{n}", 1 + 0.1 * rng.normal(size=SIZE), int(rng.integers(5, 50))) for n in range(count)]


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_the_mean_is_weighted_by_rows(name):
    """Catches: an unweighted mean."""
    update, remembered = aggregate(strategy(name), {}, 1, [reply("a", 1.0, 30), reply("b", 5.0, 10)])
    assert np.allclose(update, 2.0)
    assert update.dtype == np.float32
    assert remembered == {}


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_the_order_of_replies_does_not_matter(name):
    """Catches: sums in the order of arrival, which differ in their last bits."""
    replies = drawn(5)
    results = {aggregate(strategy(name), {}, 1, order)[0].tobytes() for order in (replies, replies[::-1])}
    assert len(results) == 1


def adam(means, lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3):
    """Return the steps of the server's Adam: Reddi et al. 2021, algorithm 2, with Flower's correction of the step."""
    m, v, steps = np.zeros(SIZE), np.zeros(SIZE), []
    for number, mean in enumerate(means, 1):
        m = beta_1 * m + (1 - beta_1) * mean
        v = beta_2 * v + (1 - beta_2) * mean**2
        eta = lr * np.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
        steps.append(eta * m / (np.sqrt(v) + tau))
    return steps


def test_adam_takes_the_updates_as_its_pseudo_gradient_and_remembers():
    """Catches: moments lost between rounds, a step against the updates, Adam on weights instead of updates."""
    chosen, state, means = strategy("fedadam", server_learning_rate=0.1), {}, []
    for number in (1, 2, 3):
        replies = [reply("a", np.linspace(-1, 1, SIZE) * number, 1), reply("b", 0.5, 1)]
        means.append(np.mean([one.update for one in replies], axis=0))
        update, state = aggregate(chosen, state, number, replies)
        assert np.allclose(update, adam(means)[-1], rtol=1e-5), number
    assert sorted(state) == ["m_t", "v_t"]
    assert all(moment.dtype == np.float32 and moment.shape == (SIZE,) for moment in state.values())


def test_what_is_remembered_is_not_changed_afterwards():
    """Catches: moments that share their memory with the next round's: a retried round would start from moved ones."""
    chosen = strategy("fedadam")
    _, state = aggregate(chosen, {}, 1, drawn(2))
    before = {name: moment.copy() for name, moment in state.items()}
    aggregate(chosen, state, 2, drawn(2, seed=1))
    assert all(np.array_equal(before[name], state[name]) for name in before)


def test_the_median_ignores_how_far_off_an_outlier_is():
    """Catches: a mean in the median's place."""
    update, _ = aggregate(strategy("fedmedian"), {}, 1, [reply("a", 1.0), reply("b", 2.0), reply("c", 1e6)])
    assert np.array_equal(update, np.full(SIZE, 2.0, np.float32))


def test_krum_returns_one_of_the_honest_updates():
    """Catches: a mean over all, and the outlier chosen."""
    honest = drawn(4)
    update, _ = aggregate(strategy("krum", min_clients=5), {}, 1, [*honest, reply("z", -50.0)])
    assert any(np.array_equal(update, one.update) for one in honest)


def test_strategies_see_updates_and_not_the_model():
    """Catches: the model added before the strategy: Krum's float32 distances would drown in large weights."""
    tiny = [reply(f"site-{n}", 1e-6 * (1 + 0.01 * n)) for n in range(4)]
    update, _ = aggregate(strategy("krum", min_clients=5), {}, 1, [*tiny, reply("z", 3e-6)])
    assert any(np.array_equal(update, one.update) for one in tiny)


def test_flower_reports_no_counts_of_its_own(caplog):
    """Catches: Flower's line "Received 1 results and 0 failures", which the guard's record contradicts."""
    with caplog.at_level(logging.DEBUG):
        aggregate(strategy("fedavg"), {}, 1, drawn(2))
    assert not [record for record in caplog.records if record.name.startswith("flwr")]
