"""Clipping: whatever an update holds, its norm in levels is at most LEVELS. Compared in Python's unbounded integers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tsugiki.common.privacy import clipping
from tsugiki.common.privacy.clipping import LEVELS, clip, squared_norm, to_float

SIZE = 1000
SPIKE = np.eye(1, SIZE)[0]
ROUNDS_UP = 990
"""An update of norm 1 in so many equal coordinates is 2082.9 levels in each: rounded to the nearest, it is too long."""

ADVERSARIAL = {
    "huge": np.full(SIZE, 1e30),
    "the largest": np.full(SIZE, 1e308),
    "tiny": np.full(SIZE, 1e-30),
    "the smallest": np.full(SIZE, 5e-324),
    "one spike": 1e6 * SPIKE,
    "one negative spike": -1e308 * SPIKE,
    "zeros": np.zeros(SIZE),
    "ordinary": np.random.default_rng(0).normal(0, 1, SIZE),
    "short": np.random.default_rng(1).normal(0, 1e-4, SIZE),
    "at the clip norm": np.full(ROUNDS_UP, 1 / math.sqrt(ROUNDS_UP)),
    "above and below": np.where(np.arange(SIZE) % 2, 1e308, 5e-324),
    "NaN": np.where(SPIKE, np.nan, 1.0),
    "inf": np.where(SPIKE, np.inf, 1.0),
    "-inf": np.where(SPIKE, -np.inf, 0.0),
    "float16": np.full(SIZE, 65504, np.float16),
    "float16 inf": np.full(SIZE, np.inf, np.float16),
    "integers": np.full(SIZE, 10**18, np.int64),
    "bytes": np.full(SIZE, 255, np.uint8),
    "a single one": np.array([1e9]),
}
each_update = pytest.mark.parametrize("update", ADVERSARIAL.values(), ids=list(ADVERSARIAL))


def exact(levels):
    """Return the squared norm in integers that do not overflow."""
    return sum(int(value) ** 2 for value in np.ravel(levels).tolist())


def within(levels):
    """Whether one update is within the sensitivity that the account counts on."""
    return exact(levels) <= LEVELS**2


def nearest(update, clip_norm):
    """Clip in floats and round to the nearest level: the broken variant."""
    norm = np.linalg.norm(update)
    return np.rint(update * min(1.0, clip_norm / norm) * LEVELS).astype(np.int64)


def by_coordinate(update, clip_norm):
    """Clip each coordinate: another broken variant."""
    return np.trunc(np.clip(update, -clip_norm, clip_norm) * (LEVELS / clip_norm)).astype(np.int64)


@each_update
@pytest.mark.parametrize("clip_norm", [1.0, 0.37, 1e-3, 1e6])
def test_the_integer_norm_never_exceeds_the_clip_norm(update, clip_norm):
    """Catches: squares that overflow, a division by a norm of zero, NaN let through, a last bit rounded up."""
    clipped = clip(update, clip_norm)
    assert clipped.levels.dtype == np.int64
    assert within(clipped.levels)
    assert int(squared_norm(clipped.levels)) == exact(clipped.levels)


def test_rounding_to_the_nearest_level_and_clipping_coordinates_fail_the_same_check():
    """Catches: a check of the norm that no wrong clipping fails."""
    update = ADVERSARIAL["at the clip norm"]
    assert within(clip(update, 1.0).levels)
    assert not within(nearest(update, 1.0))
    assert not within(by_coordinate(ADVERSARIAL["huge"], 1.0))


@settings(max_examples=300, deadline=None)
@given(
    arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(width=64)),
    st.floats(1e-6, 1e6, exclude_min=True),
)
def test_no_update_at_all_exceeds_the_clip_norm(update, clip_norm):
    """Catches: the value, of all that float64 has, that an example above does not think of."""
    clipped = clip(update, clip_norm)
    assert within(clipped.levels)
    assert bool(clipped.null) == (not np.isfinite(update).all())
    assert (np.sign(clipped.levels) * np.sign(update) >= 0).all() or clipped.null


@pytest.mark.parametrize("name", ["ordinary", "huge", "the largest", "one spike", "integers", "above and below"])
def test_a_long_update_keeps_nearly_the_whole_clip_norm(name):
    """Catches: a long update set to zero (its norm overflowed), or shortened far more than it has to be."""
    levels = clip(ADVERSARIAL[name], 1.0).levels
    assert math.sqrt(exact(levels)) > LEVELS * (1 - 1e-3)


@each_update
def test_what_is_not_finite_becomes_null_and_is_not_an_error(update):
    """Catches: an exception, which would tell the server something about the data; NaN turned into large integers."""
    clipped = clip(update, 1.0)
    if np.isfinite(np.asarray(update, np.float64)).all():
        assert not clipped.null
    else:
        assert bool(clipped.null)
        assert clipped.norm == 0
        assert not clipped.levels.any()


def test_one_client_moves_a_sum_by_at_most_the_clip_norm():
    """Catches: a factor computed over a batch, so that one client's update decides how others are scaled."""
    clip_norm, others = 0.5, np.random.default_rng(2).normal(0, 1, (9, SIZE))
    without = clip(others, clip_norm).levels.sum(axis=0)
    for name, update in ADVERSARIAL.items():
        if update.shape == (SIZE,):
            batch = clip(np.vstack([others[:4], np.asarray(update, np.float64), others[4:]]), clip_norm)
            moved = batch.levels.sum(axis=0) - without
            assert within(moved), name
            assert np.linalg.norm(to_float(moved, clip_norm, 1)) <= clip_norm * (1 + 1e-6), name


@pytest.mark.parametrize("shape", [(7, SIZE), (3, 1), (2, 2), (50, 3), (2, 3, 5)])
def test_a_batch_is_clipped_row_by_row(shape):
    """Catches: a norm over the whole batch, and one row's NaN that makes the others null."""
    batch = np.random.default_rng(3).normal(0, 10.0 ** np.arange(shape[-1]).clip(0, 4), shape)
    batch[-1, ..., 0] = np.nan
    whole = clip(batch, 1.0)
    assert whole.null.any()
    assert not whole.null.all()
    for index in np.ndindex(shape[:-1]):
        alone = clip(batch[index], 1.0)
        assert np.array_equal(whole.levels[index], alone.levels)
        assert (whole.norm[index], whole.null[index]) == (alone.norm, alone.null)


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e3, 1e3)),
    st.sampled_from([0.25, 1.0, 8.0, 4096.0]),
)
def test_short_updates_are_rounded_toward_zero_by_less_than_a_level(update, clip_norm):
    """Catches: rounding away from zero, which lengthens; another scale than LEVELS; clipping for nothing."""
    clipped = clip(update, clip_norm)
    if clipped.norm > clip_norm * (1 - 1e-12):
        return
    for value, level in zip(update.tolist(), clipped.levels.tolist(), strict=True):
        wanted = Fraction(value) * LEVELS / Fraction(clip_norm)
        assert abs(level) <= abs(wanted) * (1 + Fraction(1, 10**14))
        assert abs(wanted - level) < 1 + abs(wanted) * Fraction(1, 10**14)


def test_numbers_that_are_whole_levels_stay_as_they_are():
    """Catches: the loss of a level in updates that need no rounding."""
    levels = np.array([0, 1, -1, 20_000, -20_000, 40_000])
    assert clip(levels / LEVELS * 4.0, 4.0).levels.tolist() == levels.tolist()
    assert clip(np.array([-4.0]), 4.0).levels.tolist() == [-LEVELS]


def test_the_direction_is_kept():
    """Catches: coordinates clipped each by itself, or the whole of the norm taken out of the largest ones."""
    update = np.array([3.0, -4.0, 0.0]) * 1e5
    assert clip(update, 1.0).levels.tolist() == [int(0.6 * LEVELS), -int(0.8 * LEVELS), 0]


@pytest.mark.parametrize("name", ["ordinary", "short", "one spike", "zeros", "huge", "tiny", "the smallest"])
def test_the_norm_before_clipping_is_told(name):
    """Catches: the norm after clipping, by which nobody could choose a clip norm."""
    norm = float(clip(ADVERSARIAL[name], 1.0).norm)
    assert norm == pytest.approx(math.sqrt(float(np.square(ADVERSARIAL[name].astype(np.longdouble)).sum())), rel=1e-12)


def test_the_update_itself_is_not_changed():
    """Catches: an update scaled or zeroed in place, which the site still wants to log or to repeat."""
    update = np.array([[3.0, 4.0], [np.nan, 1.0]])
    clip(update, 1.0)
    assert update[0].tolist() == [3.0, 4.0]
    assert np.isnan(update[1, 0])


def test_what_floats_leave_too_long_is_shortened_exactly():
    """Catches: a last line of defence that was never tried: a longer row left alone, or all rows shortened."""
    rows = np.array([[LEVELS, 1, 0], [LEVELS, 0, 0], [LEVELS + 2, -3, 1], [5, -6, 7]])
    mended = clipping._within(rows)
    assert mended.tolist() == [[LEVELS - 1, 0, 0], [LEVELS, 0, 0], [LEVELS - 1, 0, 0], [5, -6, 7]]
    assert all(within(row) for row in mended)


def test_a_norm_that_is_taken_too_short_does_no_harm(monkeypatch):
    """Catches: clipping that trusts its floats: the last line of defence left out."""
    real = clipping._norm
    monkeypatch.setattr(clipping, "_norm", lambda values: real(values) * (1 - 1e-4))
    assert within(clip(ADVERSARIAL["one spike"], 1.0).levels)
    monkeypatch.setattr(clipping, "_within", lambda levels: levels)
    assert not within(clip(ADVERSARIAL["one spike"], 1.0).levels)


def test_a_mean_is_in_the_adapters_own_units():
    """Catches: a mean in levels, one not divided by the clients, and the clip norm applied twice or not at all."""
    mean = to_float(np.array([LEVELS, 0, -LEVELS // 2]), 2.0, 4)
    assert mean.dtype == np.float32
    assert mean.tolist() == [0.5, 0.0, -0.25]
    assert to_float(np.array([LEVELS]), 1.0, 2.5).tolist() == [np.float32(0.4)]


def test_clip_and_mean_undo_each_other():
    """Catches: a factor that one of the two has and the other lacks."""
    update = np.random.default_rng(4).normal(0, 0.01, SIZE)
    clip_norm = 3.0
    back = to_float(clip(update, clip_norm).levels, clip_norm, 1)
    assert np.abs(back - update).max() <= clip_norm / LEVELS * (1 + 1e-3)


@pytest.mark.parametrize("clip_norm", [1e-6, 0.5, 1e6])
@each_update
def test_no_update_makes_a_warning(update, clip_norm):
    """Catches: a warning on a site's terminal about the size of its update; here warnings are errors."""
    clip(update, clip_norm)
