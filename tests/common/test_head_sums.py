"""The head in closed form, from sums that add up over any split."""

import numpy as np
import pytest

from tsugiki.common.errors import WireError
from tsugiki.common.head_sums import (
    HeadSums,
    check_sums,
    numbers_of,
    pack_sums,
    solve,
    unpack_sums,
    zero_sums,
)

WIDTH = 12
CLASSES = 5


def rows_of(count, seed=7, noise=1.0):
    """Return features and classes of rows around one centre for each class."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(CLASSES, WIDTH))
    classes = draw.integers(0, CLASSES, count)
    return centres[classes] + noise * draw.normal(size=(count, WIDTH)) + 3.0, classes


def sums_of(features, classes):
    """Return the sums over these rows."""
    ones = np.column_stack([features, np.ones(len(features))])
    return HeadSums(ones.T @ ones, ones.T @ np.eye(CLASSES)[classes])


def cross_entropy(logits, classes):
    """Return the mean cross-entropy of logits, shape (rows, classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(classes)), classes]).mean())


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("bias", [True, False])
def test_any_split_gives_the_head_of_one_place(alpha, bias):
    """Catches: a mean of the sites' own solutions; a site's own centre; sums in less than float64."""
    features, classes = rows_of(400)
    whole = solve(sums_of(features, classes), bias=bias)
    draw = np.random.default_rng(3)
    shares = draw.dirichlet([alpha] * 6, CLASSES)
    site = np.array([draw.choice(6, p=shares[one]) for one in classes])
    total = zero_sums(WIDTH, CLASSES)
    assert len(set(site)) > 2
    for number in sorted(set(site)):
        part = sums_of(features[site == number], classes[site == number])
        total = total.plus(unpack_sums(pack_sums(part), WIDTH, CLASSES))
    split = solve(total, bias=bias)
    assert np.abs(split.weight - whole.weight).max() <= 1e-6 * np.abs(whole.weight).max()
    assert np.abs(split.bias - whole.bias).max() <= 1e-6 * (np.abs(whole.bias).max() + 1)
    assert (split.ridge, split.scale) == (whole.ridge, pytest.approx(whole.scale, rel=1e-9))


def test_it_is_the_ridge_regression_on_centred_rows():
    """Catches: a penalty on the bias; a penalty that does not grow with the rows; classes that are not centred."""
    features, classes = rows_of(300)
    head = solve(sums_of(features, classes), bias=True)
    centred = features - features.mean(axis=0)
    targets = np.eye(CLASSES)[classes]
    penalty = head.ridge * len(features) * centred.var(axis=0).mean()
    wanted = np.linalg.solve(
        centred.T @ centred + penalty * np.eye(WIDTH), centred.T @ (targets - targets.mean(axis=0))
    )
    assert np.allclose(head.weight, head.scale * wanted.T, atol=1e-5)
    outputs = features @ head.weight.T.astype(float) + head.bias
    assert np.allclose(outputs.mean(axis=0), head.scale * targets.mean(axis=0), atol=1e-4)


@pytest.mark.parametrize(("count", "noise"), [(60, 1.0), (400, 0.5), (4000, 3.0)])
def test_the_scale_is_near_the_best_on_rows_that_were_not_seen(count, noise):
    """Catches: outputs between 0 and 1 as logits; a scale from the rows' own fit, too sure where rows are few."""
    head = solve(sums_of(*rows_of(count, noise=noise)), bias=True)
    features, classes = rows_of(4000, seed=8, noise=noise)
    outputs = (features @ head.weight.T.astype(float) + head.bias) / head.scale
    best = min(cross_entropy(scale * outputs, classes) for scale in np.logspace(-1, 3, 81))
    assert cross_entropy(head.scale * outputs, classes) <= 1.15 * best + 0.02
    assert best < np.log(CLASSES) - 0.1


def test_more_noise_needs_a_larger_penalty():
    """Catches: a penalty that is the same whatever the rows say."""
    sure = solve(sums_of(*rows_of(400, noise=0.3)), bias=True)
    unsure = solve(sums_of(*rows_of(30, noise=6.0)), bias=True)
    assert unsure.ridge > sure.ridge
    assert unsure.scale < sure.scale


def test_rows_that_say_nothing_give_finite_numbers():
    """Catches: a division by zero for constant features, and for classes that are told apart without any error."""
    constant = np.ones((20, WIDTH))
    classes = np.arange(20) % CLASSES
    easy = 100.0 * np.eye(CLASSES, WIDTH)[classes]
    for features in (constant, easy):
        for bias in (True, False):
            head = solve(sums_of(features, classes), bias=bias)
            assert np.isfinite(head.weight).all()
            assert np.isfinite(head.bias).all()
    assert (np.argmax(easy @ head.weight.T, axis=1) == classes).all()
    assert np.abs(easy @ head.weight.T).max() < 50


def test_a_class_without_rows_is_not_chosen():
    """Catches: a division by the number of rows of a class."""
    features, classes = rows_of(300)
    kept = classes != 2
    head = solve(sums_of(features[kept], classes[kept]), bias=True)
    assert 2 not in np.argmax(features @ head.weight.T + head.bias, axis=1)
    assert np.isfinite(head.weight).all()


def test_packing_keeps_all_and_is_symmetric():
    """Catches: a triangle in another order; moments cut off."""
    sums = sums_of(*rows_of(50))
    numbers = pack_sums(sums)
    assert numbers.shape == (numbers_of(WIDTH, CLASSES),)
    again = unpack_sums(numbers, WIDTH, CLASSES)
    assert np.allclose(again.gram, sums.gram, rtol=1e-12)
    assert np.array_equal(again.gram, again.gram.T)
    assert np.array_equal(again.moments, sums.moments)
    assert (again.rows, again.classes) == (50, CLASSES)
    check_sums(again, 50)


def _changed(change):
    sums = sums_of(*rows_of(50))
    change(sums)
    return sums


FORGED = {
    "more rows of a class": lambda sums: sums.moments.__setitem__((-1, 0), sums.moments[-1, 0] + 1),
    "half a row": lambda sums: sums.moments.__setitem__((-1, slice(0, 2)), sums.moments[-1, :2] + [0.5, -0.5]),
    "rows below zero": lambda sums: sums.moments.__setitem__((-1, slice(0, 2)), [-1.0, sums.moments[-1, :2].sum() + 1]),
    "a negative square": lambda sums: sums.gram.__setitem__((0, 0), -1.0),
    "a product beyond the squares": lambda sums: sums.gram.__setitem__((0, 1), 1e6),
    "classes' features beyond the squares": lambda sums: sums.moments.__setitem__((0, 0), 1e6),
    "classes' features that do not add up": lambda sums: sums.moments.__setitem__((0, 0), sums.moments[0, 0] + 0.5),
    "another number of rows": lambda sums: sums.gram.__setitem__((-1, -1), 51.0),
}


@pytest.mark.parametrize("forged", FORGED)
def test_numbers_that_no_rows_have_are_refused(forged):
    """Catches: a site that outweighs all others with numbers that are no sums over its rows."""
    with pytest.raises(WireError) as caught:
        check_sums(_changed(FORGED[forged]), 50)
    assert caught.value.code == "head-sums"
