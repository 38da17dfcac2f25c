"""Lower bounds on epsilon from an attacker's scores: what a mechanism cannot be better than, with confidence.

Each trial has a coin, heads if the client took part, and a score, high if the attacker thinks so. One half of the
trials chooses how the attacker decides, and the other half alone is reported: a threshold that was chosen on the trials
that it is judged by would find more than there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_EPSILON = 50.0
"""No number of trials shows more."""
_SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Shares of the trials on which the attacker of one run may guess; on the others it abstains."""

Scores = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trials:
    """The trials of an attack.

    Args:
        included: whether each client took part with its data, shape (trials,), bool; each by a fair coin.
        scores: of the attacker, shape (trials,).
    """

    included: Coins
    scores: Scores

    def take(self, chosen: npt.NDArray[np.int64]) -> Trials:
        """Return the chosen trials."""
        return Trials(self.included[chosen], self.scores[chosen])

    def halves(self, draw: np.random.Generator) -> tuple[Trials, Trials]:
        """Return two random halves."""
        order = draw.permutation(len(self.scores))
        middle = len(order) // 2
        return self.take(order[:middle]), self.take(order[middle:])


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on epsilon, each with the same confidence.

    Args:
        threshold: from the rates of a threshold test; it takes the trials as independent.
        guesses: from the number of right guesses; it does not.
    """

    threshold: float
    guesses: float

    @property
    def largest(self) -> float:
        """The larger of the two."""
        return max(self.threshold, self.guesses)


def lower_bounds(trials: Trials, delta: float, confidence: float, draw: np.random.Generator) -> Bounds:
    """Return what an attack shows about epsilon.

    Args:
        trials: all trials, of one run or of several.
        delta: of the claim.
        confidence: of each bound, in (0, 1).
        draw: splits the trials.
    """
    chosen_on, reported = trials.halves(draw)
    return Bounds(
        _threshold_bound(chosen_on, reported, delta, confidence),
        _guess_bound(chosen_on, reported, delta, confidence),
    )


# Threshold tests


def clopper_pearson(successes: Counts, trials: Counts, error: float) -> tuple[Scores, Scores]:
    """Return bounds on probabilities, each of which is wrong with a probability of at most `error`.

    Args:
        successes: counts, of any shape.
        trials: from which they come, of the same shape.
        error: in (0, 1).

    Source: Clopper and Pearson 1934, Biometrika 26(4).
    """
    from scipy.stats import beta

    # Without a success, or without a failure, one of the parameters is 0, and the distribution is not defined.
    low = np.nan_to_num(beta.ppf(error, successes, trials - successes + 1), nan=0.0)
    high = np.nan_to_num(beta.ppf(1 - error, successes + 1, trials - successes), nan=1.0)
    return low, high


def rates_bound(
    right: Counts, positives: Counts, wrong: Counts, negatives: Counts, delta: float, confidence: float
) -> Scores:
    """Return log((TPR - delta) / FPR) with the least TPR and the largest FPR that the counts allow; at least 0.

    Args:
        right: how many of `positives` trials the attacker calls positive; counts of any shape.
        positives: number of trials that are.
        wrong: how many of `negatives` trials the attacker calls positive.
        negatives: number of trials that are not.
        delta: in [0, 1).
        confidence: of each bound; each rate has half of the error.

    Source: Jagielski, Ullman and Oprea 2020, arXiv:2006.07709, section 3; Kairouz, Oh and Viswanath 2015,
    arXiv:1311.0776, theorem 2.1.
    """
    error = (1 - confidence) / 2
    true_rate, _ = clopper_pearson(right, positives, error)
    _, false_rate = clopper_pearson(wrong, negatives, error)
    return np.log(np.maximum(true_rate - delta, false_rate) / false_rate)


def _threshold_bound(chosen_on: Trials, reported: Trials, delta: float, confidence: float) -> float:
    """Return the bound of the best threshold test.

    The test calls a client included if its score is above the threshold, or left out if it is below: which of the two,
    and the threshold, are chosen on other trials.
    """

    def bounds(trials: Trials, sign: int, thresholds: Scores) -> Scores:
        called = sign * trials.scores > thresholds[:, np.newaxis]
        are = trials.included if sign > 0 else ~trials.included
        right = (called & are).sum(axis=1)
        wrong = (called & ~are).sum(axis=1)
        return rates_bound(right, are.sum(), wrong, (~are).sum(), delta, confidence)

    best = (0.0, 1, np.zeros(1))
    for sign in (1, -1):
        thresholds = _thresholds(sign * chosen_on.scores)
        found = bounds(chosen_on, sign, thresholds)
        number = int(found.argmax())
        best = max(best, (float(found[number]), sign, thresholds[number : number + 1]), key=lambda one: one[0])
    _, sign, threshold = best
    return float(bounds(reported, sign, threshold)[0])


def _thresholds(scores: Scores) -> Scores:
    """Return thresholds between the scores, at least one and at most 200 of them."""
    ordered = np.unique(scores)
    between = (ordered[1:] + ordered[:-1]) / 2
    if len(between) == 0:
        return ordered
    return np.asarray(between[np.linspace(0, len(between) - 1, min(len(between), 200)).astype(int)])


# Guesses in one run


def p_value(trials: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of so many right guesses, if the mechanism is (epsilon, delta)-private.

    Args:
        trials: clients that were each in the run by a fair coin.
        guesses: on how many of them the attacker has guessed; on the others it abstained.
        right: number of right guesses.
        epsilon: 0 or more.
        delta: in [0, 1].

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2 and appendix D.
    """
    from scipy.special import expit
    from scipy.stats import binom

    rate = float(expit(epsilon))
    chance = float(binom.sf(right - 1, guesses, rate))
    if delta == 0 or right == 0:
        return min(1.0, chance)
    # alpha = max over i of P[right - i <= W < right] / i, for W ~ Binomial(guesses, rate)
    fewer = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, rate))
    alpha = float(np.max(fewer / np.arange(1, right + 1)))
    return min(1.0, chance + 2 * trials * delta * alpha)


def guesses_bound(trials: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon, up to `MOST_EPSILON`, at which so many right guesses are too unlikely; at least 0.

    Args:
        trials: see `p_value`.
        guesses: see `p_value`.
        right: see `p_value`.
        delta: see `p_value`.
        confidence: of the bound.

    Source: as `p_value`.
    """

    def unlikely(epsilon: float) -> bool:
        return p_value(trials, guesses, right, epsilon, delta) < 1 - confidence

    low = 0.0
    high = MOST_EPSILON
    if not unlikely(low):
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if unlikely(middle):
            low = middle
        else:
            high = middle
    return low


def _guess_bound(chosen_on: Trials, reported: Trials, delta: float, confidence: float) -> float:
    """Return the bound of the best number of guesses, which is chosen on other trials.

    The attacker guesses that the clients with the highest scores were included, and as many with the lowest left out.
    Given the coins of the other half, the reported half is a one-run audit of its own, so the theorem holds for it.
    """

    def bound(trials: Trials, share: float) -> float:
        count = len(trials.scores)
        each = int(share * count / 2)
        order = np.argsort(trials.scores, kind="stable")
        right = int((~trials.included[order[:each]]).sum() + trials.included[order[count - each :]].sum())
        return guesses_bound(count, 2 * each, right, delta, confidence)

    best = max(_SHARES, key=lambda share: bound(chosen_on, share))
    return bound(reported, best)
