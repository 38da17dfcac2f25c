"""A linear head in closed form: the sums that a site sends about its rows, and the head that follows from them.

The sums are X'X and X'Y of the features X, with a column of ones for the bias, and the classes Y as one-hot rows. They
add up over sites, so the head is the same however the rows are split. Source: He et al. 2025, "AFL: A Single-Round
Analytic Approach for Federated Learning with Pre-trained Models" (CVPR), arXiv:2405.16240. They solve the least squares
at each site and combine the solutions; adding the sums themselves gives the same head, in one step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tsugiki.common.errors import WireError

Matrix = npt.NDArray[np.float64]

MOST_WIDTH = 4096
"""Most features of a head in closed form: the solution takes their number to the third power of steps."""
MOST_NUMBERS = 10**7
"""Most numbers that a site sends, of 8 bytes each."""
MOST_ROWS = 4096
"""Most rows of a site in its sums: more change the head little, and each costs a pass through the base."""
MOST_FEATURE = 1e6
"""No base has features of this size, in the root mean square over rows; a larger one would drown all others."""
RIDGES = np.logspace(-6, 2, 49)
"""The penalties to choose from, as multiples of the features' mean variance."""
_ROUNDING = 1e-6
"""Relative error that sums of float64 numbers may have."""


@dataclass(frozen=True)
class HeadSums:
    """Sums over rows, of one site or of several.

    Args:
        gram: X'X, shape (width + 1, width + 1); the last column of X is ones.
        moments: X'Y, shape (width + 1, classes); its last row counts the rows of each class.
    """

    gram: Matrix
    moments: Matrix

    @property
    def rows(self) -> int:
        """Number of rows in the sums; rows of sums that were scaled down count less."""
        return round(float(self.gram[-1, -1]))

    @property
    def classes(self) -> int:
        """Number of classes that occur in the rows."""
        return int((self.moments[-1] > 0).sum())

    def plus(self, other: HeadSums) -> HeadSums:
        """Return the sums over the rows of both."""
        return HeadSums(self.gram + other.gram, self.moments + other.moments)

    def scaled(self, factor: float) -> HeadSums:
        """Return the sums in which each row counts as much as `factor` rows."""
        return HeadSums(self.gram * factor, self.moments * factor)


@dataclass(frozen=True)
class ClosedFormHead:
    """A head that was computed from sums.

    Args:
        weight: shape (classes, width), float32.
        bias: shape (classes,), float32; zero if the layer has none.
        ridge: the penalty, as a multiple of the features' mean variance.
        scale: factor between the outputs of the least squares and the logits.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    ridge: float
    scale: float


def zero_sums(width: int, classes: int) -> HeadSums:
    """Return the sums over no rows."""
    return HeadSums(np.zeros((width + 1, width + 1)), np.zeros((width + 1, classes)))


def numbers_of(width: int, classes: int) -> int:
    """Return how many numbers the packed sums have."""
    return (width + 1) * (width + 2) // 2 + (width + 1) * classes


def pack_sums(sums: HeadSums) -> Matrix:
    """Return the upper triangle of X'X, row by row, and X'Y after it, shape (numbers_of(...),)."""
    triangle = [sums.gram[row, row:] for row in range(len(sums.gram))]
    return np.concatenate([*triangle, sums.moments.ravel()])


def unpack_sums(numbers: Matrix, width: int, classes: int) -> HeadSums:
    """Return the sums in a packed array of shape (numbers_of(width, classes),); X'X is symmetric by construction."""
    sums = zero_sums(width, classes)
    start = 0
    for row in range(width + 1):
        length = width + 1 - row
        sums.gram[row, row:] = numbers[start : start + length]
        sums.gram[row:, row] = sums.gram[row, row:]
        start += length
    sums.moments[:] = numbers[start:].reshape(width + 1, classes)
    return sums


def check_sums(sums: HeadSums, rows: int) -> None:
    """Check that these can be the sums over a number of rows, of which each has one class.

    Raises:
        WireError: `head-sums`, they cannot.
    """
    counts = sums.moments[-1]
    squares = np.diagonal(sums.gram)
    if sums.gram[-1, -1] != rows or (counts != np.floor(counts)).any() or (counts < 0).any() or counts.sum() != rows:
        raise WireError("the classes' rows do not add up", f"{rows} rows, each of one class", code="head-sums")
    if (squares[:-1] > rows * MOST_FEATURE**2).any():
        raise WireError("the features are too large", f"at most {MOST_FEATURE:g}", code="head-sums")
    if (squares < 0).any():
        raise WireError("a sum of squares is negative", "sums over rows", code="head-sums")
    # Cauchy-Schwarz: no two columns have a larger product than their lengths
    lengths = np.sqrt(squares)
    longest = np.outer(lengths, lengths) * (1 + _ROUNDING)
    longest_moments = np.outer(lengths, np.sqrt(counts)) * (1 + _ROUNDING)
    if (np.abs(sums.gram) > longest).any() or (np.abs(sums.moments) > longest_moments).any():
        raise WireError("a sum of products is too large", "sums over rows", code="head-sums")
    # each row has one class, so the classes' sums add up to the sum over all rows
    error = np.abs(sums.moments.sum(axis=1) - sums.gram[-1])
    if (error > _ROUNDING * lengths * lengths[-1]).any():
        raise WireError("the classes' features do not add up", "the features of all rows", code="head-sums")


def solve(sums: HeadSums, *, bias: bool) -> ClosedFormHead:
    """Return the ridge regression of one-hot classes on the features, scaled to the logits of a cross-entropy.

    Both the penalty and the scale follow from the sums alone. The penalty is the one of `RIDGES` with the least
    generalised cross-validation error (Golub, Heath and Wahba 1979); ridge regression: Hoerl and Kennard 1970.

    Args:
        sums: over at least two rows of at least two classes, so that there is something to tell apart.
        bias: whether the layer has a bias.
    """
    rows = sums.rows
    shares = sums.moments[-1] / rows
    mean = sums.gram[-1, :-1] / rows
    covariance = sums.gram[:-1, :-1] / rows
    products = sums.moments[:-1] / rows
    # without a bias nothing can be centred: only the classes' targets are, because softmax ignores a common shift
    centre = np.full_like(shares, 1 / len(shares))
    if bias:
        covariance = covariance - np.outer(mean, mean)
        centre = shares
    products = products - np.outer(mean, centre)
    # features that do not vary have rounding errors as their variance: the penalty must be above those
    squares = float(np.trace(sums.gram[:-1, :-1])) / rows
    unit = max(float(np.trace(covariance)), 1e-9 * squares, 1e-12) / len(covariance)

    with threadpool_limits(1, "blas"):  # the number of threads would change the last digits
        values, vectors = np.linalg.eigh(covariance)
        values = values.clip(0)
        powers = vectors.T @ products
        fits = [_fit(values, powers, ridge * unit, rows, shares, centre, bias) for ridge in RIDGES]
        best = int(np.argmin([fit.error for fit in fits]))
        weight = vectors @ (powers / (values + RIDGES[best] * unit)[:, None])
    scale = _scale(fits[best], sums)
    offset = scale * (centre - mean @ weight)
    if not bias:
        offset = np.zeros_like(centre)
    return ClosedFormHead(
        weight=np.ascontiguousarray(scale * weight.T, np.float32),
        bias=offset.astype(np.float32),
        ridge=float(RIDGES[best]),
        scale=scale,
    )


@dataclass(frozen=True)
class _Fit:
    """A ridge regression, judged as on rows that it has not seen.

    Args:
        error: mean squared error over the classes together, by generalised cross-validation.
        own_class: mean output for a row's own class.
    """

    error: float
    own_class: float


def _fit(values: Matrix, powers: Matrix, penalty: float, rows: int, shares: Matrix, centre: Matrix, bias: bool) -> _Fit:
    """Return how well the ridge regression with a penalty does.

    Args:
        values: eigenvalues of the features' covariance, shape (width,).
        powers: products of features and targets along its eigenvectors, shape (width, classes).
        penalty: above 0.
        rows: how many there are.
        shares: of the classes among the rows.
        centre: what was subtracted from the one-hot classes.
        bias: whether the regression has a bias.
    """
    shrunk = 1 / (values + penalty)
    squares = np.square(powers).sum(axis=1)
    explained = float((squares * shrunk).sum())
    # of one-hot classes, whose squares sum to 1, less the centre
    total = 1 - 2 * float(shares @ centre) + float(centre @ centre)
    residual = total - 2 * explained + float((squares * values * np.square(shrunk)).sum())
    freedom = float((values * shrunk).sum()) + int(bias)
    # a regression with as many free numbers as rows says nothing about other rows
    left = max(1 - freedom / rows, 1e-3)
    own_class = float(shares @ centre) + explained
    return _Fit(max(residual, 0.0) / left**2, 1 - (1 - own_class) / left)


def _scale(fit: _Fit, sums: HeadSums) -> float:
    """Return the factor from the regression's outputs to logits.

    For two classes with outputs that are normal around their means, the log-odds are the outputs times a / v: a is the
    distance between the means of a row's own class and of the others, v the outputs' variance. With more classes, the
    variance is between two extremes: spread over all others, or all of it on one rival. Their geometric mean is taken.
    """
    others = sums.classes - 1
    wrong = 1 - fit.own_class
    distance = fit.own_class - wrong / others
    spread = fit.error - wrong**2 * (1 + 1 / others)
    # no claim is surer than the rows allow: one error in all of them
    most = float(np.log(sums.rows * others))
    if distance <= 0:
        return 0.0
    return min(distance * float(np.sqrt(others)) / max(spread, 1e-12), most / distance)
