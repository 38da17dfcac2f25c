"""The search for a site that spoils sums, for every site, every size of a sum, and every pattern of lies."""

from itertools import count, product

import pytest

from tsugiki.server.run.search import REST, Rest, Search

SIZES = [(sites, least) for sites in range(3, 10) for least in range(2, sites)]


class Ran:
    """A run of some rounds over sites that may lie, with the search alone."""

    def __init__(self, sites, least, lies, rounds=24):
        self.names = [f"s{number}" for number in range(sites)]
        self.least = least
        self.search = Search()
        self.failures = 0  # attempts in which no sum passed
        self.asked = {}
        self.stopped = ""
        for self.round in range(1, rounds + 1):
            self.stopped = self._round(lies)
            if self.stopped:
                break

    def _fits(self, group):
        return len(group) >= self.least

    def _round(self, lies):
        for _ in range(len(self.names) + 1):
            groups = self.search.groups(self.search.available(self.names, self.round, self._fits), self._fits)
            if not groups:
                return "too few"
            sites = [site for group in groups for site in group]
            assert len(set(sites)) == len(sites)
            assert all(self._fits(group) for group in groups)
            self.asked[self.round] = set(sites)
            failed = [group for group in groups if lies(group)]
            passed = [group for group in groups if group not in failed]
            self.search = self.search.after(failed, passed, self.round)
            if passed:
                return ""
            self.failures += 1
        return "failed"

    def blamed(self):
        """Return the sites that were suspected at some time, or named."""
        return self.search.rests.keys() | self.search.liars


@pytest.mark.parametrize(("sites", "least"), SIZES)
def test_one_liar_is_found_wherever_it_is(sites, least):
    """Catches: a liar that is never left out, or an honest site in its place; a search that asks again without end."""
    for liar in range(sites):
        ran = Ran(sites, least, lambda group, liar=f"s{liar}": liar in group)
        assert ran.stopped == ""
        assert ran.blamed() == {f"s{liar}"}
        if sites >= 2 * least:  # disjoint groups: only the first sum is lost
            assert ran.failures == 1
            assert ran.search.liars == {f"s{liar}"}
            assert ran.asked[ran.round] == set(ran.names) - {f"s{liar}"}
        else:  # all may have to be left out once; then again when the suspect is back, in rounds that grow apart
            assert ran.failures <= sites + 3


@pytest.mark.parametrize("sites", range(2, 7))
def test_where_nobody_can_be_left_out_nothing_is_asked_again(sites):
    """Catches: the same sum asked for again and again, which costs privacy and shows nothing."""
    ran = Ran(sites, sites, lambda group: "s0" in group)
    assert (ran.stopped, ran.failures, ran.blamed()) == ("too few", 1, set())


@pytest.mark.parametrize(("sites", "least"), [(3, 2), (4, 2), (4, 3), (5, 3), (6, 3)])
def test_a_liar_that_lies_at_times_gets_no_honest_site_expelled(sites, least):
    """Catches: a sum that passed taken for proof, so that a site that lies once gets another expelled for good."""
    for liar, pattern in product(range(sites), product((False, True), repeat=7)):
        turns = iter(pattern)
        ran = Ran(sites, least, lambda group, name=f"s{liar}", turns=turns: name in group and next(turns, False))
        assert ran.search.liars <= {f"s{liar}"}
        assert ran.failures <= sum(pattern)
        if not ran.stopped:  # honest again: everybody is back in the end
            last = max((rest.until for rest in ran.search.rests.values()), default=0)
            everybody = set(ran.names) - ran.search.liars
            assert set(ran.search.available(ran.names, last, ran._fits)) == everybody


def test_a_site_that_is_framed_is_left_out_for_a_time_only():
    """Catches: an honest site expelled by a liar that lies only in sums with it."""
    ran = Ran(5, 3, lambda group: {"s1", "s3"} <= set(group), rounds=60)
    assert not ran.stopped
    assert not ran.search.liars


def test_each_further_suspicion_lasts_twice_as_long():
    """Catches: a liar that costs a sum every few rounds; an honest site that is not asked again after one failure."""
    search = Search(rests={"b": Rest(5, 1)})
    assert search.resting(4) == {"b"}
    assert search.resting(5) == set()
    search = search.after([("a", "b", "c")], [], 5).after([], [("a", "c")], 5)
    assert search.rests == {"b": Rest(5 + 2 * REST, 2)}


def test_suspects_come_back_if_nobody_else_can_be_left_out():
    """Catches: a run that ends with too few sites while a suspect, who may be honest, could be asked."""
    search = Search(rests={"d": Rest(9, 1)})

    def fits(group):
        return len(group) >= 3

    assert search.available(["a", "b", "c", "d"], 1, fits) == ["a", "b", "c"]
    assert search.available(["a", "b", "d"], 1, fits) == ["a", "b", "d"]
    search = search.after([("a", "b", "c")], [], 1)
    assert search.available(["a", "b", "c", "d"], 1, fits) == ["a", "b", "c", "d"]
    assert [len(group) for group in search.groups(["a", "b", "c", "d"], fits)] == [3]


def test_the_verdict_on_a_liar_ends_with_a_sum_that_fails_without_it():
    """Catches: with two liars, a site expelled for good because it was in all sums that had failed until then."""
    search = Search(liars=frozenset({"e"})).after([("a", "b", "c")], [], 2)
    assert not search.liars
    assert search.resting(2) == {"e"}
    assert search.resting(2 + REST) == set()


def test_several_liars_end_the_search_or_are_left_out():
    """Catches: a search that never ends because no single site explains all failures."""
    for sites, least in SIZES:
        ran = Ran(sites, least, lambda group: bool({"s0", "s1"} & set(group)))
        assert ran.stopped in ("", "failed")
        assert ran.failures <= 2 * sites + 5


def test_sites_are_asked_together_while_nothing_has_failed():
    """Catches: groups, which carry more noise than one sum and stand fewer dropouts, without any need."""
    search = Search().after([], [("a", "b", "c", "d")], 1)
    numbers = count(1)
    for _ in range(3):
        assert search.groups(["a", "b", "c", "d"], lambda group: len(group) >= 2) == [("a", "b", "c", "d")]
        search = search.after([], [("a", "b", "c", "d")], next(numbers))
    assert search == Search()


def test_a_site_is_no_liar_for_good_if_a_sum_with_it_has_passed():
    """Catches: with two liars, an honest site that happened to be in all failed sums, expelled although it passed."""
    failed = [("a", "b", "c"), ("a", "d", "e")]
    apart = Search().after(failed[:1], [], 1).after(failed[1:], [], 1)
    assert apart.liars == {"a"}
    passed = Search().after(failed[:1], [], 1).after([], [("a", "f", "g")], 1).after(failed[1:], [], 1)
    assert not passed.liars
