"""Running sums: the same bits in any order, as exact as said, and how far updates agree."""

import itertools
import math

import numpy as np
import pytest

from tsugiki.common.wire.arrays import PackedLevels, decode_levels, encode_levels
from tsugiki.common.wire.spec import BLOCK
from tsugiki.server.run.sums import RATIO, SHORT, RunningMean, RunningSum, narrowed, update_cosine

SIZE = 50


def drawn(count, size=SIZE, seed=0, scale=1.0):
    """Return updates of very different lengths, and their weights."""
    draw = np.random.default_rng(seed)
    lengths = scale * 10.0 ** draw.uniform(-12, 0, count)
    updates = [(length * draw.normal(size=size)).astype(np.float32) for length in lengths]
    return updates, [int(weight) for weight in draw.integers(1, 5000, count)]


def norm(update):
    """Return the length of an update."""
    return float(np.linalg.norm(update.astype(np.float64)))


def mean_of(updates, weights, order):
    """Return the running mean of updates that arrive in an order."""
    running = RunningMean(len(updates[0]), len(updates))
    for number in order:
        running.add(updates[number], norm(updates[number]), weights[number])
    return running.value()


def test_the_order_of_arrival_does_not_matter():
    """Catches: a plain sum in float64, whose last bits depend on the order."""
    updates, weights = drawn(5)
    means = {mean_of(updates, weights, order).tobytes() for order in itertools.permutations(range(5))}
    assert len(means) == 1


def plain_sums(updates, weights):
    """Return the plain float64 sums in all orders of arrival."""
    terms = [weight * update.astype(np.float64) for update, weight in zip(updates, weights, strict=True)]
    return {sum(terms[number] for number in order).tobytes() for order in itertools.permutations(range(len(terms)))}


def test_the_updates_of_the_order_test_are_hard_enough():
    """Catches: updates whose plain sum does not depend on the order either, with which the test proves nothing."""
    assert len(plain_sums(*drawn(5))) > 1


@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_mean_is_as_exact_as_its_description_says(count):
    """Catches: a grid that is too coarse, weights lost, a sum that outgrows what float64 holds exactly."""
    updates, weights = drawn(count)
    mean = mean_of(updates, weights, range(count)).astype(np.float64)
    total = sum(weights)
    for place in range(SIZE):
        products = [weight * float(update[place]) for update, weight in zip(updates, weights, strict=True)]
        exact = math.fsum(products) / total
        longest = max(norm(update) * weight for update, weight in zip(updates, weights, strict=True))
        bound = count**2 * 2.0**-51 * SHORT * max(1.0, longest / SHORT * RATIO) / total + abs(exact) * 2.0**-24
        assert abs(mean[place] - exact) <= bound


def test_ties_between_two_units_of_the_grid_do_not_depend_on_the_order():
    """Catches: rounding by the running sum itself, which rounds a tie by what arrived before."""
    running = RunningMean(1, 5)
    half = running._constant(0) / 1.5 * 2.0**-53
    values = [half, half, 3 * half, half, -half]
    updates = [np.array([value], np.float32) for value in values]
    assert all(float(update[0]) == value for update, value in zip(updates, values, strict=True))
    sums = set()
    for order in itertools.permutations(range(5)):
        running = RunningMean(1, 5)
        for number in order:
            running.add(updates[number], norm(updates[number]), 1)
        sums.add(running.value().tobytes())
    assert len(sums) == 1


def test_a_long_update_does_not_make_the_grid_of_ordinary_updates_coarse():
    """Catches: one grid for all, on which every ordinary update is zero beside one of norm 1e30 or of 2^50 rows."""
    updates, weights = drawn(4)
    ordinary = mean_of(updates, weights, range(4)).astype(np.float64) * sum(weights)
    for norm_of_another, rows in ((1e30, 1), (1e-9, 2**50)):
        running = RunningMean(SIZE, 5)
        another = np.zeros(SIZE, np.float32)
        another[0] = norm_of_another
        for update, weight in zip([*updates, another], [*weights, rows], strict=True):
            running.add(update, norm(update), weight)
        rest = running.value()[1:].astype(np.float64) * running.weight
        assert np.allclose(rest, ordinary[1:], rtol=1e-5, atol=0)


def test_updates_on_several_grids_are_all_counted_in_any_order():
    """Catches: a long update on the grid of short ones; a grid that is forgotten in the mean."""
    updates, weights = drawn(3)
    updates.append(np.full(SIZE, 3 * SHORT, np.float32))
    updates.append(np.full(SIZE, 1e12, np.float32))
    weights += [3, 5]
    means = {mean_of(updates, weights, order).tobytes() for order in itertools.permutations(range(5))}
    assert len(means) == 1
    expected = np.average(np.array(updates, np.float64), axis=0, weights=weights)
    assert np.allclose(np.frombuffer(means.pop(), np.float32), expected, rtol=1e-6)


def test_a_sum_refuses_what_its_grid_was_not_made_for():
    """Catches: an update that silently leaves the range in which sums are exact."""
    running = RunningMean(SIZE, 1)
    running.add(np.ones(SIZE, np.float32), 8.0, 1)
    with pytest.raises(ValueError, match="no room for another"):
        running.add(np.zeros(SIZE, np.float32), 0.0, 1)


def test_a_mean_takes_the_memory_of_the_sums():
    """Catches: sums that stay in memory beside their mean; a sum that goes on after its mean was taken."""
    running = RunningMean(SIZE, 5)
    running.add(np.ones(SIZE, np.float32), 8.0, 1)
    mean = running.value()
    assert mean.base.nbytes < 8 * (SIZE + 1) / 2 + 8
    with pytest.raises(ValueError, match="no room for another"):
        running.add(np.ones(SIZE, np.float32), 8.0, 1)


@pytest.mark.parametrize("size", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_numbers_are_narrowed_in_place(size):
    """Catches: a block that overwrites wide numbers which are still to be read."""
    wide = np.random.default_rng(5).normal(size=size)
    expected = (2 * wide).astype(np.float32)
    found = narrowed(wide, lambda part: 2 * wide[part])
    assert np.array_equal(found, expected)
    assert np.shares_memory(found, wide)


def test_vectors_of_several_blocks_are_added_to_their_end():
    """Catches: a last block that is left out, or added at another place."""
    updates, weights = drawn(3, size=2 * BLOCK + 17)
    expected = np.average(np.array(updates, np.float64), axis=0, weights=weights)
    assert np.allclose(mean_of(updates, weights, range(3)), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bits", [24, 32, 64])
def test_packed_levels_are_added_without_a_rounding(bits):
    """Catches: bytes read at a wrong offset beyond the first block; a sign lost."""
    draw = np.random.default_rng(1)
    size = BLOCK + 5
    found = [draw.integers(-(2**22), 2**22, size) for _ in range(3)]
    running = RunningSum(size)
    for levels in found:
        packed = decode_levels(encode_levels(levels, bits), size, bits)
        assert packed.size == size
        assert packed.l2_norm() == pytest.approx(np.linalg.norm(levels))
        running.add(packed)
    assert np.array_equal(running.total, sum(found))


def test_masked_sums_wrap_around():
    """Catches: an overflow that raises, or a sum that is not the one modulo 2^64."""
    largest = np.frombuffer(np.array([2**63 - 1], "<i8").tobytes(), np.uint8)
    running = RunningSum(1)
    running.add(PackedLevels(largest, 64))
    running.add(PackedLevels(largest, 64))
    assert running.total.view(np.uint64)[0] == 2**64 - 2


def cosines(updates):
    """Return the cosines of all pairs of updates, shape (count, count)."""
    directions = np.array([update / norm(update) for update in updates], np.float64)
    return directions @ directions.T


def test_the_mean_cosine_is_that_of_all_pairs():
    """Catches: the pairs of an update with itself counted; a cosine of the mean instead."""
    draw = np.random.default_rng(4)
    shared = draw.normal(size=SIZE)
    updates = [(shared + draw.normal(size=SIZE)).astype(np.float32) for _ in range(6)]
    weights = [10, 20, 30, 40, 50, 60]
    norms = [norm(update) for update in updates]
    mean = np.average(np.array(updates, np.float64), axis=0, weights=weights)
    lengths = np.array(norms) * weights
    each = np.outer(lengths, lengths) * (1 - np.eye(6))
    expected = (each * cosines(updates)).sum() / each.sum()
    assert 0.2 < expected < 0.8
    assert update_cosine(norms, weights, norm(mean)) == pytest.approx(expected)


def test_equal_and_opposite_updates_are_the_ends_of_the_scale():
    """Catches: a scale that ends elsewhere; a number where there is nothing to compare."""
    assert update_cosine([2.0, 2.0, 2.0], [5, 5, 5], 2.0) == pytest.approx(1.0)
    assert update_cosine([2.0, 2.0], [5, 5], 0.0) == pytest.approx(-1.0)
    assert update_cosine([2.0], [5], 2.0) is None
    assert update_cosine([2.0, 0.0, 0.0], [5, 5, 5], 0.7) is None
