"""Lower bounds on epsilon: published values, and what an honest mechanism must not be charged with."""

import math

import numpy as np
import pytest
from scipy import stats

from tsugiki.server.budget import lower_bounds
from tsugiki.server.budget.lower_bounds import Trials, clopper_pearson, guesses_bound, p_value, rates_bound

DELTA = 1e-5


def gaussian(mu, trials=2000, seed=1):
    """Return the trials of a Gaussian mechanism whose two cases are mu standard deviations apart."""
    draw = np.random.default_rng(seed)
    included = draw.random(trials) < 0.5
    return Trials(included, draw.normal(size=trials) + mu * included)


def bounds(trials, delta=DELTA, confidence=0.99, seed=2):
    """Return the bounds of these trials."""
    return lower_bounds.lower_bounds(trials, delta, confidence, np.random.default_rng(seed))


def exact(successes, trials, error):
    """Return the bounds on one probability."""
    low, high = clopper_pearson(np.array(successes), np.array(trials), error)
    return float(low), float(high)


def rates(*counts):
    """Return the bound of one test."""
    *numbers, delta, confidence = counts
    return float(rates_bound(*map(np.array, numbers), delta, confidence))


def delta_of(epsilon, mu):
    """Return the exact delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


def test_clopper_pearson_is_exact():
    """Catches: a normal approximation, the two ends mixed up, an error that is split twice; no trials at all."""
    low, high = exact(5, 10, 0.025)
    assert (low, high) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))
    assert exact(0, 10, 0.05) == (0.0, pytest.approx(1 - 0.05 ** (1 / 10)))
    assert exact(10, 10, 0.05) == (pytest.approx(0.05 ** (1 / 10)), 1.0)
    assert exact(0, 0, 0.05) == (0.0, 1.0)
    # The tail of the binomial distribution at each end is the error.
    low, high = exact(7, 30, 0.01)
    assert stats.binom.sf(6, 30, low) == pytest.approx(0.01)
    assert stats.binom.cdf(7, 30, high) == pytest.approx(0.01)


def test_the_bound_of_rates_is_the_formula():
    """Catches: delta that is not subtracted, rates taken as they were counted, a bound below 0."""
    error = 0.005
    true_rate = exact(90, 100, error)[0]
    false_rate = exact(2, 200, error)[1]
    assert rates(90, 100, 2, 200, 0.0, 0.99) == pytest.approx(math.log(true_rate / false_rate))
    assert rates(90, 100, 2, 200, 0.3, 0.99) == pytest.approx(math.log((true_rate - 0.3) / false_rate))
    assert rates(50, 100, 100, 200, 0.0, 0.99) == 0.0
    assert rates(0, 0, 0, 0, 0.0, 0.99) == 0.0


@pytest.mark.parametrize(("guesses", "right", "epsilon"), [(100, 95, 2.0), (40, 22, 0.0), (100, 100, 3.0), (6, 1, 1.0)])
def test_the_p_value_is_that_of_the_paper(guesses, right, epsilon):
    """Catches: a sum that is off by one, the mass of delta left out. The loop is that of the paper's appendix D."""
    trials = 1000
    q = 1 / (1 + math.exp(-epsilon))
    alpha = total = 0.0
    for missing in range(1, right + 1):
        total += stats.binom.pmf(right - missing, guesses, q)
        alpha = max(alpha, total / missing)
    wanted = min(1.0, stats.binom.sf(right - 1, guesses, q) + alpha * DELTA * 2 * trials)
    assert p_value(trials, guesses, right, epsilon, DELTA) == pytest.approx(wanted, rel=1e-9)


def test_the_bound_of_guesses():
    """Catches: a bound that chance exceeds: half of the guesses right say nothing, all of them much; trials ignored."""
    assert guesses_bound(1000, 100, 50, DELTA, 0.99) == 0.0
    assert guesses_bound(1000, 0, 0, DELTA, 0.99) == 0.0
    # With delta = 0, all right: q^100 = 0.01.
    q = 0.01 ** (1 / 100)
    assert guesses_bound(1000, 100, 100, 0.0, 0.99) == pytest.approx(math.log(q / (1 - q)), abs=1e-4)
    assert guesses_bound(1000, 100, 100, DELTA, 0.99) < guesses_bound(1000, 100, 100, 0.0, 0.99)
    assert guesses_bound(100_000, 100, 100, DELTA, 0.99) < guesses_bound(1000, 100, 100, DELTA, 0.99)


@pytest.mark.parametrize("mu", [1.0, 2.0])
def test_a_gaussian_mechanism_is_not_charged_with_more_than_it_has(mu):
    """Catches: a bound above the truth; one that finds next to nothing."""
    found = bounds(gaussian(mu))
    for one in (found.threshold, found.guesses):
        assert one > mu / 2
        assert delta_of(one, mu) > DELTA  # a true epsilon has a delta of at most DELTA


def test_what_is_no_attack_finds_nothing():
    """Catches: a threshold or a number of guesses chosen on the trials that are reported, which finds something."""
    chance = [bounds(gaussian(0.0, trials=120, seed=seed), confidence=0.7, seed=seed) for seed in range(40)]
    # Chosen on the reported trials, thresholds find something in 12 of 40 audits, and numbers of guesses in 24.
    assert sum(one.threshold > 0 for one in chance) <= 6
    assert sum(one.guesses > 0 for one in chance) <= 6


def test_clients_that_are_recognised_by_their_absence_count_too():
    """Catches: a test that only ever calls clients included."""
    draw = np.random.default_rng(3)
    included = draw.random(2000) < 0.5
    # One in five clients that were left out is seen for certain; nothing else is.
    gone = ~included & (draw.random(2000) < 0.2)
    scores = draw.random(2000) - 10.0 * gone
    assert bounds(Trials(included, scores)).threshold > 2


def test_certainty_is_bounded_by_the_number_of_trials():
    """Catches: infinity where no guess was wrong; a bound that more trials do not raise."""
    few, many = (bounds(gaussian(1e6, trials)) for trials in (200, 2000))
    assert 1 < few.threshold < many.threshold < 7
    assert 1 < few.guesses < many.guesses < 8
    assert few.largest == max(few.threshold, few.guesses)
    assert bounds(gaussian(1.0, 2)).largest == 0.0
