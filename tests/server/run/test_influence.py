"""How much one site may move a round: the cap on its weight, the bound on its norm, and the mean that keeps both."""

import itertools
from fractions import Fraction
from statistics import median

import numpy as np
import pytest

from tests.support.toy import toy_config
from tsugiki.common.settings import StrategySettings
from tsugiki.common.wire.spec import l2_norm
from tsugiki.server.run.influence import (
    RECENT,
    BoundedMean,
    dominant_sites,
    norm_bound,
    remembered_norms,
    weight_cap,
    weights_of,
)
from tsugiki.server.run.replies import Accepted

SIZE = 50
HUGE = 10**18


def settings(**strategy):
    """Return the settings of a strategy."""
    return toy_config("runs", strategy=strategy).strategy


@pytest.mark.parametrize(
    ("rows", "share", "cap"),
    [
        ([100, 900], 0.5, 100),  # each of two sites has one half
        ([100, 100, 900], 0.5, 200),  # as much as the others together
        ([100, 100, 100], 0.5, 150),  # nobody is above it
        ([10, 20, 30, HUGE], 0.5, 60),
        ([10, 20, 30, HUGE, HUGE + 1], 0.25, 30),  # 30 of 120: two liars, and an honest site that just has its share
        ([1, 1, HUGE], 0.01, 1),  # an equal share is always allowed
        ([7], 0.5, 7),
        ([5, HUGE], 1.0, HUGE + 5),
    ],
)
def test_the_cap_is_a_share_of_the_capped_weights(rows, share, cap):
    """Catches: a cap by the share of the claimed rows; one by floats, which lose small sites beside 10^18."""
    assert weight_cap(rows, share) == cap


def test_no_site_weighs_more_than_its_share():
    """Catches: a cap that is right for one large site and not for several; weights below one row."""
    draw = np.random.default_rng(1)
    for _ in range(300):
        rows = [int(10**exponent) for exponent in draw.uniform(0, 12, int(draw.integers(1, 12)))]
        share = float(draw.uniform(0.02, 1))
        cap = weight_cap(rows, share)
        weights = [min(count, cap) for count in rows]
        allowed = max(Fraction(share), Fraction(1, len(rows)))
        assert min(weights) >= 1
        assert all(Fraction(weight, sum(weights)) <= allowed for weight in weights)
        # and no cap is lower than it has to be
        more = [min(count, cap + 1) for count in rows]
        assert more == weights or max(Fraction(weight, sum(more)) for weight in more) > allowed


def test_weights_follow_the_setting():
    """Catches: a setting that is not read; a round without replies that ends the run."""
    rows = {"a": 10, "b": 20, "c": HUGE}
    assert weights_of(rows, settings()) == {"a": 10, "b": 20, "c": 30}
    assert weights_of(rows, settings(weighting="rows")) == rows
    assert weights_of(rows, settings(weighting="equal")) == {"a": 1, "b": 1, "c": 1}
    assert weights_of({}, settings()) == {}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ({"a": 100, "b": 100, "c": 100, "d": 401, "e": 100, "f": 100}, ["d"]),
        ({"a": 100, "b": 100, "c": 100, "d": 400, "e": 100, "f": 100}, []),
        ({"a": 10, "b": 10, "c": 21}, ["c"]),  # over half of all
        ({"a": 12, "b": 13}, []),
        ({"a": 100, "b": 900}, ["b"]),
        ({"a": HUGE}, []),
    ],
)
def test_a_dominant_site_is_named(rows, found):
    """Catches: one of two alike sites named for having more than half; a liar that is not."""
    assert dominant_sites(rows) == found


def test_what_is_remembered_has_the_median_of_the_round():
    """Catches: a middle that is off by one; a memory that grows with the sites."""
    draw = np.random.default_rng(2)
    for count in range(4, 40):
        norms = [float(norm) for norm in draw.uniform(0.1, 9, count)]
        kept = remembered_norms([1e6], norms)
        assert median(kept) == median(norms)
        assert len(kept) <= RECENT


def test_few_norms_join_those_of_earlier_rounds():
    """Catches: a round of one site that sets its own bound; updates of zero that pull the bound to zero."""
    assert norm_bound(5.0, (), remembered_norms((), [99.0])) == 5 * 99.0  # nothing to compare with
    before = (1.0, 1.1, 1.2)
    assert norm_bound(5.0, before, remembered_norms(before, [99.0])) == 5 * 1.15
    assert remembered_norms((), [0.0, 1.0, 0.0]) == (1.0,)
    assert norm_bound(5.0, (), ()) == float("inf")
    assert norm_bound(0.0, (1.0,), (1.0,)) == float("inf")


def test_norms_may_fall_and_rise():
    """Catches: a bound from the round before alone, or from this round alone."""
    small = (0.1,) * 4
    large = (1.0,) * 4
    assert norm_bound(5.0, large, small) == norm_bound(5.0, small, large) == 5.0


def replies(norms, rows):
    """Return accepted replies with random updates of these norms."""
    draw = np.random.default_rng(3)
    found = []
    for number, (norm, count) in enumerate(zip(norms, rows, strict=True)):
        direction = draw.normal(size=SIZE)
        update = (direction * norm / np.linalg.norm(direction)).astype(np.float32)
        found.append(Accepted(f"site-{number}", update, count, 0.5, 1, 0.0, l2_norm(update), 4 * SIZE))
    return found


def bounded(folder, given, before=(), **strategy):
    """Return the mean of replies that arrive in this order, and the verdict on them."""
    mean = BoundedMean(folder, SIZE, len(given), settings(**{"norm_tolerance": 5.0, **strategy}), before)
    for reply in given:
        mean.add(reply)
    settled = mean.settle(sorted((reply.without_update() for reply in given), key=lambda reply: reply.site))
    return mean.mean.value(), settled


NORMS = [1.0, 1.5, 99.0, 2.0, 0.5]
ROWS = [10, 400, 30, 20, 50]


@pytest.mark.parametrize("before", [(), (1.0,) * 4, (0.01,) * 4, (30.0,) * 4], ids=["none", "as now", "less", "more"])
def test_the_mean_is_that_of_capped_and_clipped_updates(tmp_path, before):
    """Catches: the bound of the round before; a weight by rows in the sum; an update that is left out."""
    given = replies(NORMS, ROWS)
    mean, settled = bounded(tmp_path, given, before)
    bound = 5 * max(median(before or [0.0]), 1.5)
    weights = np.array([10, 110, 30, 20, 50])
    clipped = [reply.update * min(1.0, bound / reply.norm) for reply in given]
    assert np.allclose(mean, np.average(clipped, axis=0, weights=weights), rtol=1e-5, atol=1e-7)
    assert [reply.weight for reply in settled.accepted] == weights.tolist()
    named = {reply.site: reply.clipped_to for reply in settled.accepted if reply.clipped_to}
    assert named == ({"site-2": pytest.approx(bound)} if bound < 99 else {})


@pytest.mark.parametrize("strategy", [{}, {"max_site_share": 0.21}, {"weighting": "equal"}, {"weighting": "rows"}])
@pytest.mark.parametrize("before", [(), (1.0,) * 4], ids=["none", "some"])
def test_the_order_of_arrival_changes_no_bit(tmp_path, strategy, before):
    """Catches: a cap or a bound that depends on who came first; sums whose bits do."""
    given = replies(NORMS, ROWS)
    means = {bounded(tmp_path, order, before, **strategy)[0].tobytes() for order in itertools.permutations(given)}
    assert len(means) == 1


def test_the_share_holds_when_sites_drop_out(tmp_path):
    """Catches: a cap from all sites that were asked, under which a large one decides if the others are missing."""
    _, settled = bounded(tmp_path, replies([1.0, 1.0], [10, HUGE]))
    assert [reply.weight for reply in settled.accepted] == [10, 10]


def test_few_updates_wait(tmp_path):
    """Catches: a server that writes every update of every round to its disk."""
    mean = BoundedMean(tmp_path, SIZE, 40, settings(norm_tolerance=5.0), (1.0,) * 4)
    given = replies([1.0] * 39 + [99.0], [100] * 40)
    for reply in given:
        mean.add(reply)
    # the first, which was the largest so far, and the outlier
    assert [one.site for one in mean._waiting._updates] == ["site-0", "site-39"]


def test_without_bounds_nothing_waits(tmp_path):
    """Catches: a file of updates for a run that has switched the bounds off."""
    mean = BoundedMean(tmp_path, SIZE, 5, settings(weighting="rows", norm_tolerance=0.0), ())
    for reply in replies(NORMS, ROWS):
        mean.add(reply)
    assert mean._waiting._updates == []


def test_by_default_no_site_moves_the_model_further_than_a_typical_one(tmp_path):
    """Catches: a default under which one liar counts several times; half of all honest sites named in each round."""
    default = StrategySettings(name="fedavg").norm_tolerance
    _, settled = bounded(tmp_path, replies(NORMS, ROWS), norm_tolerance=default)
    clipped = {reply.site: reply.clipped_to for reply in settled.accepted if reply.clipped_to}
    assert clipped == {"site-2": pytest.approx(1.5), "site-3": pytest.approx(1.5)}
    assert [reply.site for reply in settled.far] == ["site-2"]


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 5.0])
def test_of_two_sites_neither_is_clipped(tmp_path, tolerance):
    """Catches: of two honest sites, the one that learns more cut down to the other."""
    _, settled = bounded(tmp_path, replies([1.0, 60.0], [10, 10]), norm_tolerance=tolerance)
    assert [reply.clipped_to for reply in settled.accepted] == [None, None]
    assert settled.far == []


@pytest.mark.parametrize("sites", [3, 4])
def test_norms_may_rise_from_round_to_round(tmp_path, sites):
    """Catches: a bound that stays where the first round of a warm-up put it."""
    norms = ()
    for round_ in range(1, 7):
        given = replies([0.5 * round_] * sites, [10] * sites)
        mean = BoundedMean(tmp_path, SIZE, sites, settings(norm_tolerance=1.0), norms)
        for reply in given:
            mean.add(reply)
        settled = mean.settle([reply.without_update() for reply in given])
        norms = settled.norms
        assert [reply.norm_in_mean for reply in settled.accepted] == pytest.approx([0.5 * round_] * sites)


def test_two_replies_of_three_do_not_clip_each_other(tmp_path):
    """Catches: a tolerance that follows who was asked, and not who answered."""
    given = replies([1.0, 4.0], [10, 10])
    mean = BoundedMean(tmp_path, SIZE, 3, settings(norm_tolerance=1.0), ())
    for reply in given:
        mean.add(reply)
    settled = mean.settle([reply.without_update() for reply in given])
    assert [reply.clipped_to for reply in settled.accepted] == [None, None]
