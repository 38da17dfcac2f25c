"""Secure aggregation: exact sums, nothing else, and no way to be asked for more."""

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.stats import chisquare, ks_2samp

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.privacy.secagg import protocol as secagg
from tsugiki.common.privacy.secagg.messages import Answer, from_fields, to_fields
from tsugiki.common.wire import ring

BITS = 40
SIZE = 50
MANY = 20_000


def code(function, *arguments):
    """Return the code with which a call is refused."""
    with pytest.raises(SecureAggregationError) as caught:
        function(*arguments)
    assert caught.value.exit_status == 14
    return caught.value.code


def site_names(count):
    """Return names whose order as text is not that of their numbers."""
    return [f"site-{number}" for number in range(count)]


class Round:
    """One session, as a server with nothing to hide would run it.

    Args:
        count: clients that announce keys.
        n_min: fewest clients in a sum.
        silent: those that make no shares.
    """

    def __init__(self, count, n_min=2, silent=()):
        self.session, self.n_min = secagg.new_session(), n_min
        self.context = os.urandom(32)
        started = {name: secagg.start(self.session, name) for name in site_names(count)}
        self.keys = {name: state.public_keys for name, state in started.items()}
        made = {
            name: secagg.make_shares(state, self.keys, n_min, self.context)
            for name, state in started.items()
            if name not in silent
        }
        self.sealed = {name: sealed for name, (_, sealed) in made.items()}
        self.shared = {name: state for name, (state, _) in made.items()}
        self.states = {name: secagg.receive_shares(self.shared[name], self.inbox(name)) for name in made}
        self.needed = secagg.threshold(count, n_min)

    def inbox(self, name):
        """Return what the others sealed for a client, by sender."""
        return {sender: sealed[name] for sender, sealed in self.sealed.items() if sender != name}

    def mask(self, vectors, bits=BITS):
        """Let the clients with a vector mask it; return the masked vectors by name."""
        masked = {}
        for name, vector in vectors.items():
            self.states[name], masked[name] = secagg.mask_vector(self.states[name], vector, bits)
        self.survivors, self.dropped = sorted(masked), sorted(self.states.keys() - masked.keys())
        return masked

    def answers(self, names=None):
        """Let survivors answer; return the answers by name, each as it comes through the wire."""
        answers = {}
        for name in self.survivors if names is None else names:
            self.states[name], answer = secagg.answer_unmask(
                self.states[name], self.survivors, self.dropped, self.n_min
            )
            answers[name] = Answer.from_dict(answer.to_dict(), self.survivors, self.dropped)
        return answers

    def open(self, total, answers, bits=BITS, **changes):
        """Open the sum."""
        given = {"survivors": self.survivors, "dropped": self.dropped, "keys": self.keys, "needed": self.needed}
        return secagg.unmask(total, answers=answers, context=self.context, bits=bits, **(given | changes))


def vectors_for(names, size=SIZE):
    """Return a vector with negative numbers for each name, int64."""
    draw = np.random.default_rng(7)
    return {name: draw.integers(-(2**30), 2**30, size) for name in names}


def add(vectors):
    """Return the sum of ring vectors, modulo 2^64."""
    return np.sum(list(vectors), axis=0, dtype=np.uint64)


def as_ring(vectors, bits=BITS):
    """Return the exact sum of integer vectors modulo 2^bits, by Python's integers."""
    return [sum(int(vector[place]) for vector in vectors.values()) % 2**bits for place in range(SIZE)]


@pytest.mark.parametrize(("count", "dropped"), [(2, 0), (3, 0), (3, 1), (6, 0), (6, 2), (30, 0), (30, 1), (30, 14)])
def test_the_sum_is_exact(count, dropped):
    """Catches: a mask that is left over, a sign by number and not by name, a dropped client's masks forgotten."""
    round_ = Round(count)
    vectors = vectors_for(site_names(count)[dropped:])
    masked = round_.mask(vectors)
    assert len(round_.dropped) == dropped
    assert round_.open(add(masked.values()), round_.answers()).tolist() == as_ring(vectors)


@pytest.mark.parametrize("bits", [8, 16, 24, 32, 48, 56, 64])
def test_the_sum_is_exact_in_every_modulus(bits):
    """Catches: masks of another width at the two sides; arithmetic that overflows at 64 bits."""
    round_ = Round(4)
    vectors = vectors_for(site_names(4)[1:])
    masked = round_.mask(vectors, bits)
    assert all(int(vector.max()) < 2**bits for vector in masked.values())
    total = ring.reduce(add(masked.values()), bits)
    assert round_.open(total, round_.answers(), bits).tolist() == as_ring(vectors, bits)


@pytest.mark.parametrize("later", [0, 1])
def test_who_made_no_shares_is_in_no_list(later):
    """Catches: pair masks with a client that nobody can replace; shares numbered by who is left."""
    round_ = Round(8, silent={"site-0", "site-3"})
    vectors = vectors_for(sorted(round_.states)[later:])
    masked = round_.mask(vectors)
    assert {"site-0", "site-3"}.isdisjoint(round_.survivors + round_.dropped)
    assert round_.open(add(masked.values()), round_.answers()).tolist() == as_ring(vectors)


def test_some_may_drop_out_before_they_answer():
    """Catches: a server that needs everyone's shares, or the first ones' only."""
    round_ = Round(6)
    vectors = vectors_for(site_names(6)[1:])
    total = add(round_.mask(vectors).values())
    answers = round_.answers(round_.survivors[-round_.needed :])
    assert len(answers) == 4
    assert round_.open(total, answers).tolist() == as_ring(vectors)


def test_a_client_goes_on_from_its_stored_state():
    """Catches: a step that needs what is not stored."""
    round_ = Round(3)
    round_.shared = {name: type(state).from_dict(state.to_dict()) for name, state in round_.shared.items()}
    fields = {name: to_fields("shares", round_.inbox(name)) for name in round_.shared}
    round_.states = {
        name: secagg.receive_shares(state, from_fields("shares", fields[name], 92))
        for name, state in round_.shared.items()
    }
    round_.states = {name: type(state).from_dict(state.to_dict()) for name, state in round_.states.items()}
    vectors = vectors_for(site_names(3))
    total = add(round_.mask(vectors).values())
    round_.states = {name: type(state).from_dict(state.to_dict()) for name, state in round_.states.items()}
    assert round_.open(total, round_.answers()).tolist() == as_ring(vectors)


def test_masked_vectors_alone_do_not_give_the_sum():
    """Catches: pair masks only, which cancel before anybody agreed to open the sum."""
    round_ = Round(6)
    vectors = vectors_for(site_names(6))
    total = ring.reduce(add(round_.mask(vectors).values()), BITS)
    assert not (total == np.array(as_ring(vectors), np.uint64)).any()


def octets_are_uniform(vector):
    """Return whether each byte of the ring elements passes a chi-square test."""
    octets = vector.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : BITS // 8]
    return all(chisquare(np.bincount(place, minlength=256)).pvalue > 1e-6 for place in octets.T)


def test_masked_vectors_are_uniform():
    """Catches: masks of 32 bits on 40, noise in place of masks. The vector itself fails the same test."""
    round_ = Round(3)
    vectors = {name: vector // 2**20 for name, vector in vectors_for(site_names(3), MANY).items()}
    assert not any(octets_are_uniform(ring.reduce(vector, BITS)) for vector in vectors.values())
    masked = round_.mask(vectors)
    assert all(octets_are_uniform(vector) for vector in masked.values())
    assert octets_are_uniform(ring.reduce(add(masked.values()), BITS))


def test_two_inputs_cannot_be_told_apart():
    """Catches: masks too small for what they hide. Unmasked, the same test tells a constant from zeros."""
    inputs = [np.zeros(MANY, np.int64), np.full(MANY, 2**38)]
    masked = [Round(3).mask({name: one for name in site_names(3)})["site-1"].astype(float) for one in inputs]
    assert ks_2samp(*masked).pvalue > 1e-6
    assert ks_2samp(*inputs).pvalue < 1e-6


@pytest.mark.parametrize("name", site_names(3))
def test_two_sessions_have_other_masks(name):
    """Catches: masks that come again in the next round, so that the difference of two updates is seen."""
    zeros = {one: np.zeros(SIZE, np.int64) for one in site_names(3)}
    one, two = (Round(3).mask(zeros)[name] for _ in range(2))
    assert not (one == two).any()


def test_seeds_are_new():
    """Catches: a seed that is fixed or follows from a global generator, so that a sum opens itself."""
    seeds = []
    for _ in range(2):
        np.random.seed(0)
        seeds += [state.seed for state in Round(3).states.values()]
    assert len(set(seeds)) == 6
    assert all(len(seed) == 32 for seed in seeds)


def test_each_mask_alone_hides():
    """Catches: one mask for all pairs, or the same stream with both signs, of which nothing is left."""
    round_ = Round(4)
    masked = round_.mask({name: np.zeros(SIZE, np.int64) for name in site_names(4)})
    seen = [value for vector in masked.values() for value in vector.tolist()]
    assert len(set(seen)) == len(seen)
    for some in (["site-0", "site-1"], ["site-1", "site-2", "site-3"]):
        assert 0 not in ring.reduce(add(masked[name] for name in some), BITS)


def test_masked_vectors_are_one_step_of_a_session():
    """Catches: a second vector under the same masks; steps in another order, or done again."""
    round_ = Round(3)
    vector = np.zeros(SIZE, np.int64)
    state, shared = round_.states["site-0"], round_.shared["site-0"]
    masked, _ = secagg.mask_vector(state, vector, BITS)
    answered, _ = secagg.answer_unmask(masked, site_names(3), [], 2)
    started = secagg.start(round_.session, "site-0")
    calls = {
        "keys": (secagg.make_shares, round_.keys, 2, round_.context),
        "shares": (secagg.receive_shares, round_.inbox("site-0")),
        "received": (secagg.mask_vector, vector, BITS),
        "masked": (secagg.answer_unmask, site_names(3), [], 2),
    }
    for current in (started, shared, state, masked, answered):
        for step, (function, *arguments) in calls.items():
            if step != current.step:
                assert code(function, current, *arguments) == "secagg-refused"


@pytest.mark.parametrize("vector", [np.zeros(3), np.zeros((3, 1), np.int64), np.zeros(3, np.int32)])
def test_only_integer_vectors_are_masked(vector):
    """Catches: floats cut to integers on the way; a vector that is masked in part."""
    with pytest.raises(ValueError, match="expected int64 or uint64"):
        secagg.mask_vector(Round(2).states["site-0"], vector, BITS)


@pytest.mark.parametrize(
    ("clients", "n_min", "expected"),
    [
        (2, 1, 2),
        (2, 2, 2),
        (3, 1, 2),
        (3, 3, 3),
        (4, 2, 3),
        (100, 2, 51),
        (100, 80, 80),
        (255, 255, 255),
        (255, 1, 128),
    ],
)
def test_threshold(clients, n_min, expected):
    """Catches: half of the clients, with which a server that tells two stories gets both secrets."""
    assert secagg.threshold(clients, n_min) == expected
    assert 2 * expected > clients


@pytest.mark.parametrize(
    ("clients", "n_min", "expected"),
    [
        (3, 4, "secagg-too-few"),
        (1, 1, "secagg-too-few"),
        (0, 0, "secagg-too-few"),
        (3, 0, "secagg-too-few"),
        (3, -1, "secagg-too-few"),
        (256, 2, "secagg-message"),
    ],
)
def test_impossible_thresholds(clients, n_min, expected):
    """Catches: a sum of one client, which is its vector; more clients than a sum can be opened for."""
    assert code(secagg.threshold, clients, n_min) == expected


def unmask_code(survivors, dropped, n_min=3):
    """Return the code with which site-0 refuses lists, in a session of 0 to 5 where 5 made no shares."""
    round_ = Round(6, 3, silent={"site-5"})
    round_.mask(vectors_for(site_names(5)))
    state = round_.states["site-0"]
    lists = [[f"site-{number}" for number in numbers] for numbers in (survivors, dropped)]
    refusal = code(secagg.answer_unmask, state, *lists, n_min)
    assert secagg.answer_unmask(state, site_names(4), ["site-4"], 3)[1].mask_keys.keys() == {"site-4"}
    return refusal


@pytest.mark.parametrize(
    ("survivors", "dropped", "n_min", "expected"),
    [
        ([0, 1, 2, 3, 4], [4], 3, "secagg-refused"),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 3, "secagg-refused"),
        ([0, 1, 2, 3, 4], [5], 3, "secagg-refused"),
        ([0, 1, 2, 3, 4, 9], [], 3, "secagg-refused"),
        ([0, 1, 2, 3], [], 3, "secagg-refused"),
        ([0, 1, 2, 3], [9], 3, "secagg-refused"),
        ([1, 2, 3, 4], [0], 3, "secagg-refused"),
        ([], [0, 1, 2, 3, 4], 3, "secagg-refused"),
        ([0, 1, 2], [3, 4], 3, "secagg-too-few"),
        ([0], [1, 2, 3, 4], 1, "secagg-too-few"),
        ([0, 1, 2, 3], [4], 5, "secagg-too-few"),
        ([0, 1, 2, 3, 3], [4], 3, "secagg-message"),
        ([0, 1, 2, 3], [4, 4], 3, "secagg-message"),
    ],
    ids=[
        "one in both lists",
        "all in both lists",
        "one without shares dropped",
        "an unknown one survives",
        "one left out",
        "one exchanged",
        "itself dropped",
        "nobody survives",
        "below the threshold",
        "alone",
        "below n_min",
        "one counted twice",
        "one dropped twice",
    ],
)
def test_unmask_misuse_is_refused(survivors, dropped, n_min, expected):
    """Catches: a client that tells both secrets of one client, or opens a sum of fewer than it agreed to."""
    assert unmask_code(survivors, dropped, n_min) == expected


@pytest.mark.parametrize("lists", [(None, []), ("site-0", []), (["site-0", b"site-1"], []), (["site-0"], [["x"]])])
def test_lists_that_are_none_are_refused(lists):
    """Catches: a TypeError, and text taken for a list of its letters."""
    round_ = Round(3)
    round_.mask(vectors_for(site_names(3)))
    assert code(secagg.answer_unmask, round_.states["site-0"], *lists, 2) == "secagg-message"


def test_a_client_answers_once():
    """Catches: a server that asks again with the lists exchanged, and then has both secrets of a client."""
    round_ = Round(5)
    round_.mask(vectors_for(site_names(5)))
    state, answer = secagg.answer_unmask(round_.states["site-0"], site_names(4), ["site-4"], 2)
    assert answer.seeds.keys() == set(site_names(4))
    assert code(secagg.answer_unmask, state, site_names(5), [], 2) == "secagg-refused"
    assert code(secagg.answer_unmask, state, site_names(4), ["site-4"], 2) == "secagg-refused"
    assert not state.held


def test_an_answer_has_never_both_secrets():
    """Catches: the two shares of a client exchanged, or both sent and the server trusted to look away."""
    round_ = Round(4)
    round_.mask(vectors_for(site_names(3)))
    held = round_.states["site-1"].held
    _, answer = secagg.answer_unmask(round_.states["site-1"], site_names(3), ["site-3"], 2)
    assert answer.seeds == {name: held[name][:32] for name in site_names(3)}
    assert answer.mask_keys == {"site-3": held["site-3"][32:]}


def test_changed_shares_are_refused():
    """Catches: shares that a server could exchange: changed, another sender's, another receiver's, sent back."""
    round_ = Round(4)
    state, inbox = round_.shared["site-0"], round_.inbox("site-0")
    flipped = inbox["site-1"][:-1] + bytes([inbox["site-1"][-1] ^ 1])
    for wrong in (flipped, inbox["site-2"], round_.sealed["site-1"]["site-2"], round_.sealed["site-0"]["site-1"]):
        assert code(secagg.receive_shares, state, inbox | {"site-1": wrong}) == "secagg-mismatch"
    for wrong in (inbox["site-1"][:-1], inbox["site-1"] + b"\0", None):
        assert code(secagg.receive_shares, state, inbox | {"site-1": wrong}) == "secagg-message"
    assert code(secagg.receive_shares, state, inbox | {"site-9": flipped}) == "secagg-message"
    assert code(secagg.receive_shares, state, inbox | {"site-0": flipped}) == "secagg-mismatch"
    assert secagg.receive_shares(state, inbox).step == "received"


def test_shares_of_another_session_are_refused():
    """Catches: last round's shares, sealed for the same client under the same keys, sent again."""
    session = secagg.new_session()
    mine, other = secagg.start(session, "a"), secagg.start(session, "b")
    keys = {state.name: state.public_keys for state in (mine, other)}
    state, _ = secagg.make_shares(mine, keys, 2, bytes(32))
    _, old = secagg.make_shares(other, keys, 2, b"1" * 32)
    assert code(secagg.receive_shares, state, {"b": old["a"]}) == "secagg-mismatch"
    _, same = secagg.make_shares(other, keys, 2, bytes(32))
    assert secagg.receive_shares(state, {"b": same["a"]}).step == "received"
    assert code(secagg.make_shares, mine, keys, 2, bytes(31)) == "secagg-message"


def test_masks_of_another_context_do_not_cancel():
    """Catches: a context that is only in the sealed shares: sites that go on all the same open a true sum."""
    round_ = Round(3)
    round_.states["site-2"] = replace(round_.states["site-2"], context=b"2" * 32)
    masked = round_.mask({name: np.zeros(SIZE, np.int64) for name in site_names(3)})
    opened = round_.open(add(masked.values()), round_.answers())
    assert 0 not in opened


def test_too_few_made_shares():
    """Catches: a session so small that the sum can never be opened, or only against the rule."""
    round_ = Round(6, 4)
    state, inbox = round_.shared["site-0"], round_.inbox("site-0")
    few = {name: inbox[name] for name in ("site-1", "site-2", "site-3")}
    assert secagg.receive_shares(state, few).held.keys() == {"site-0", *few}
    del few["site-2"]
    assert code(secagg.receive_shares, state, few) == "secagg-too-few"
    assert code(secagg.receive_shares, state, {}) == "secagg-too-few"


def test_hostile_lists_of_keys_are_refused():
    """Catches: one client under two names, its own keys replaced, keys cut or repeated, a list without itself."""
    session = secagg.new_session()
    state, *others = (secagg.start(session, name) for name in site_names(4))
    keys = {one.name: one.public_keys for one in (state, *others)}
    twice = keys["site-1"][:32]
    cases = [
        (keys | {"site-2": keys["site-1"]}, 2, "secagg-message"),
        (keys | {"site-2": twice + keys["site-2"][32:]}, 2, "secagg-message"),
        (keys | {"site-2": keys["site-2"][:32] + twice}, 2, "secagg-message"),
        (keys | {"site-2": 2 * os.urandom(32)}, 2, "secagg-message"),
        (keys | {"site-2": keys["site-2"][:32] + bytes(32)}, 2, "secagg-message"),
        (keys | {"site-2": keys["site-2"][:-1]}, 2, "secagg-message"),
        (keys | {"site-2": keys["site-2"].hex()[:64]}, 2, "secagg-message"),
        (keys | {"../x": os.urandom(64)}, 2, "secagg-message"),
        (keys | {f"s{number}": os.urandom(64) for number in range(252)}, 2, "secagg-message"),
        (keys | {"site-0": os.urandom(64)}, 2, "secagg-refused"),
        ({name: keys[name] for name in site_names(4)[1:]}, 2, "secagg-refused"),
        ({"site-0": keys["site-0"]}, 1, "secagg-too-few"),
        (keys, 5, "secagg-too-few"),
    ]
    for wrong, n_min, expected in cases:
        assert code(secagg.make_shares, state, wrong, n_min, bytes(32)) == expected
    assert secagg.make_shares(state, keys, 4, bytes(32))[0].threshold == 4


def test_too_few_shares_open_nothing():
    """Catches: a sum put together from what there is, which would be random; one share of each kind missing."""
    round_ = Round(6)
    total = add(round_.mask(vectors_for(site_names(5))).values())
    answers = round_.answers(site_names(4))
    assert round_.open(total, answers).shape == (SIZE,)
    few = {name: answers[name] for name in site_names(3)}
    assert code(round_.open, total, few) == "secagg-too-few"
    assert code(round_.open, total, {}) == "secagg-too-few"
    for kind, name in (("seeds", "site-2"), ("mask_keys", "site-5")):
        shares = {one: share for one, share in getattr(answers["site-3"], kind).items() if one != name}
        partly = answers | {"site-3": replace(answers["site-3"], **{kind: shares})}
        assert code(round_.open, total, partly) == "secagg-too-few"


def test_fewer_shares_than_the_threshold_give_another_secret():
    """Catches: a polynomial of lower degree than the threshold says."""
    round_ = Round(6)
    shares = {number: round_.states[name].held["site-5"][32:] for number, name in enumerate(site_names(6), 1)}
    private = masks.combine({number: shares[number] for number in (1, 3, 4, 6)})
    assert masks.public_key(private) == round_.keys["site-5"][:32]
    few = masks.combine({number: shares[number] for number in (1, 3, 4)})
    assert few[:16] != private[:16]
    assert few[16:] != private[16:]


def test_a_wrong_mask_key_is_noticed():
    """Catches: masks of a wrong key taken away, which leaves a random sum that nobody notices."""
    round_ = Round(4)
    total = add(round_.mask(vectors_for(site_names(3))).values())
    answers = round_.answers()
    share = answers["site-0"].mask_keys["site-3"]
    changed = share[:5] + bytes([share[5] ^ 1]) + share[6:]  # X25519 ignores some bits of a key's first and last byte
    wrong = replace(answers["site-0"], mask_keys={"site-3": changed})
    assert code(round_.open, total, answers | {"site-0": wrong}) == "secagg-message"


def test_the_server_checks_its_own_lists():
    """Catches: a KeyError, and a sum from which too few or too many masks were taken."""
    round_ = Round(4)
    total = add(round_.mask(vectors_for(site_names(3))).values())
    answers = round_.answers()
    stranger = {name: key for name, key in round_.keys.items() if name != "site-3"}
    for changes in (
        {"dropped": ["site-0", "site-3"]},
        {"dropped": ["site-9"]},
        {"survivors": [*site_names(3), "site-9"]},
        {"keys": stranger},
        {"survivors": site_names(2)},
        {"needed": 2},
    ):
        assert code(partial(round_.open, **changes), total, answers) == "secagg-refused"
