"""What the masks are made of: keys that nobody else has, shares that say nothing alone, streams that are uniform."""

import hashlib
import hmac
import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.wire import ring

CONTEXT = bytes(range(32))
KEY = bytes(range(32))
HALVES = (slice(16), slice(16, None))
SIZE = 20_000
WIDTHS = [8, 16, 24, 32, 40, 48, 56, 64]


def code(function, *arguments):
    """Return the code with which a call is refused."""
    with pytest.raises(SecureAggregationError) as caught:
        function(*arguments)
    assert caught.value.exit_status == 14
    return caught.value.code


def test_public_keys_are_those_of_rfc_7748():
    """Catches: another curve, or keys in another order of bytes. The values are from section 6.1."""
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert masks.public_key(private).hex() == public


def test_fresh_keys():
    """Catches: a fixed key, or one from a seeded generator."""
    np.random.seed(0)
    one = masks.new_private_key()
    np.random.seed(0)
    assert len(one) == 32
    assert masks.new_private_key() != one


def test_derived_keys_are_those_of_rfc_5869():
    """Catches: a key that forgets a part; two versions of Tsugiki whose masks do not cancel. HKDF by hand."""
    info = b"tsugiki-secagg-2\0" + CONTEXT + b"\0pair-mask\0a\0b"
    extracted = hmac.digest(bytes(32), KEY, hashlib.sha256)
    assert masks.derive(KEY, CONTEXT, "pair-mask", "b", "a") == hmac.digest(extracted, info + b"\1", hashlib.sha256)


def test_derived_keys_differ():
    """Catches: a key used for two purposes, contexts or pairs; names run together ("ab", "c") and ("a", "bc")."""
    keys = {
        masks.derive(secret, context, purpose, *names)
        for secret in (KEY, KEY[::-1])
        for context in (CONTEXT, CONTEXT[::-1])
        for purpose in ("self-mask", "shares")
        for names in (("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"))
    }
    assert len(keys) == 2 * 2 * 2 * 4


@pytest.mark.parametrize("size", [0, 4, 16, 31, 33])
def test_secrets_of_another_length_are_refused(size):
    """Catches: masks from seeds of 28 or 32 bits, as in Flower's SecAgg+, which can be tried out."""
    short = bytes(size)
    assert code(masks.derive, short, CONTEXT, "self-mask", "a") == "secagg-message"
    assert code(masks.stream, short, 4, 40) == "secagg-message"
    assert code(masks.split, short, 2, 3) == "secagg-message"
    assert code(masks.public_key, short) == "secagg-message"
    assert code(masks.combine, {1: KEY, 2: short}) == "secagg-message"
    assert code(masks.agree, KEY, short, CONTEXT, "shares", ("a", "b")) == "secagg-message"


def test_two_agree_and_a_third_does_not():
    """Catches: a key that depends on who asks, or that others can compute."""
    one, two, three = (masks.new_private_key() for _ in range(3))
    shared = masks.agree(one, masks.public_key(two), CONTEXT, "shares", ("a", "b"))
    assert masks.agree(two, masks.public_key(one), CONTEXT, "shares", ("b", "a")) == shared
    assert masks.agree(three, masks.public_key(one), CONTEXT, "shares", ("b", "a")) != shared
    assert masks.agree(one, masks.public_key(two), CONTEXT, "pair-mask", ("a", "b")) != shared


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_public_key_that_makes_every_secret_zero(point):
    """Catches: a server that hands out a point of low order and so knows all keys."""
    assert code(masks.agree, KEY, point, CONTEXT, "shares", ("a", "b")) == "secagg-message"


def test_sealed_and_opened():
    """Catches: a nonce used twice (equal messages would look equal); content that stays readable."""
    one, two = (masks.seal(KEY, b"content " * 8, CONTEXT, "a", "b") for _ in range(2))
    assert masks.unseal(KEY, one, CONTEXT, "a", "b") == b"content " * 8
    assert len(one) == 64 + masks.SEALED_EXTRA_BYTES
    assert one[:12] != two[:12]
    assert one[12:] != two[12:]
    assert b"content" not in one


@pytest.mark.parametrize(
    "arguments",
    [
        (KEY, CONTEXT, "b", "a"),
        (KEY, CONTEXT, "c", "b"),
        (KEY, CONTEXT, "a", "c"),
        (KEY, CONTEXT[::-1], "a", "b"),
        (KEY[::-1], CONTEXT, "a", "b"),
    ],
    ids=["sent back", "another sender", "another receiver", "another context", "another key"],
)
def test_redirected_messages_do_not_open(arguments):
    """Catches: encryption that is bound to the key alone."""
    key, context, sender, receiver = arguments
    sealed = masks.seal(KEY, bytes(64), CONTEXT, "a", "b")
    assert code(masks.unseal, key, sealed, context, sender, receiver) == "secagg-mismatch"


def test_changed_messages_do_not_open():
    """Catches: encryption without authentication, in which a bit of a share can be flipped; a crash on short ones."""
    sealed = masks.seal(KEY, bytes(64), CONTEXT, "a", "b")
    for place in range(len(sealed)):
        changed = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        assert code(masks.unseal, KEY, changed, CONTEXT, "a", "b") == "secagg-mismatch"
    for short in (b"", sealed[:11], sealed[:12], sealed[:-1]):
        assert code(masks.unseal, KEY, short, CONTEXT, "a", "b") == "secagg-mismatch"


@pytest.mark.parametrize("threshold", [1, 2, 3, 4, 5])
def test_any_threshold_of_shares_gives_the_secret_back(threshold):
    """Catches: shares numbered from 0, halves swapped, a threshold off by one."""
    secret = os.urandom(32)
    shares = dict(enumerate(masks.split(secret, threshold, 5), 1))
    for some in itertools.combinations(shares, threshold):
        assert masks.combine({index: shares[index] for index in some}) == secret
    for few in itertools.combinations(shares, threshold - 1):
        assert masks.combine({index: shares[index] for index in few}) != secret


def test_many_shares():
    """Catches: an index that does not fit, at the most clients there can be."""
    secret = os.urandom(32)
    shares = dict(enumerate(masks.split(secret, 128, 255), 1))
    assert len(set(shares.values())) == 255
    assert masks.combine({index: shares[index] for index in range(128, 256)}) == secret
    assert masks.combine({index: shares[index] for index in range(129, 256)}) != secret


@settings(max_examples=20)
@given(st.binary(min_size=32, max_size=32), st.sets(st.integers(1, 20), min_size=9, max_size=9))
def test_combined_as_pycryptodome_does(secret, some):
    """Catches: a mistake in our own arithmetic in GF(2^128)."""
    from Crypto.Protocol.SecretSharing import Shamir

    shares = masks.split(secret, 9, 20)
    pairs = [(index, shares[index - 1]) for index in some]
    expected = b"".join(Shamir.combine([(index, share[cut]) for index, share in pairs]) for cut in HALVES)
    assert masks.combine(dict(pairs)) == expected == secret


def test_shares_are_uniform_and_new():
    """Catches: a share that is the secret, polynomials with small or fixed coefficients. 400 splits of the same."""
    drawn = np.frombuffer(b"".join(masks.split(bytes(32), 2, 3)[0] for _ in range(400)), np.uint8)
    assert chisquare(np.bincount(drawn, minlength=256)).pvalue > 1e-6
    share = masks.split(bytes(32), 2, 2)[0]
    assert share[:16] != share[16:]


@pytest.mark.parametrize("bits", WIDTHS)
def test_streams_are_aes_in_counter_mode(bits):
    """Catches: another order of bytes, a counter that starts elsewhere, bits lost in packing. Against pycryptodome."""
    from Crypto.Cipher import AES

    width = bits // 8
    data = AES.new(KEY, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(1000 * width))
    expected = [int.from_bytes(data[start : start + width], "little") for start in range(0, len(data), width)]
    drawn = masks.stream(KEY, 1000, bits)
    assert drawn.dtype == np.uint64
    assert drawn.tolist() == expected


def octets(vector, bits):
    """Return ring elements as they travel, shape (size, bits / 8): little endian."""
    return vector.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : bits // 8]


@pytest.mark.parametrize("bits", WIDTHS)
def test_streams_are_uniform(bits):
    """Catches: bytes that are always zero, or a stream cut to fewer bits than the modulus."""
    for place in octets(masks.stream(os.urandom(32), SIZE, bits), bits).T:
        assert chisquare(np.bincount(place, minlength=256)).pvalue > 1e-6


def test_the_top_value_occurs():
    """Catches: `randint(0, modulus - 1)`, whose end is excluded: masks that never take the last value."""
    assert set(masks.stream(os.urandom(32), SIZE, 8).tolist()) == set(range(256))


def test_streams_follow_the_key():
    """Catches: one stream for all; a stream that is another one's beginning shifted."""
    one = masks.stream(KEY, 100, 64)
    assert one.tolist() == masks.stream(KEY, 200, 64)[:100].tolist()
    assert not set(one.tolist()) & set(masks.stream(KEY[::-1], 200, 64).tolist())
    assert masks.stream(KEY, 0, 40).shape == (0,)


@given(st.lists(st.integers(-(2**39), 2**39 - 1), min_size=1, max_size=9))
def test_signs_survive_the_ring(values):
    """Catches: a sum below zero that comes out as a large one; the least value taken for the greatest."""
    vector = np.array(values, np.int64)
    assert ring.signed(ring.reduce(vector, 40), 40).tolist() == values
    assert ring.signed(ring.reduce(vector, 64), 64).tolist() == values


@given(st.lists(st.integers(0, 2**64 - 1), max_size=9), st.sampled_from(WIDTHS))
def test_ring_elements_travel_whole(values, bits):
    """Catches: a last element that is read beyond the end, an element that leaks into its neighbour."""
    vector = ring.reduce(np.array(values, np.uint64), bits)
    data = octets(vector, bits).tobytes()
    assert len(data) == len(values) * bits // 8
    assert ring.ring_from_bytes(data, len(values), bits).tolist() == [value % 2**bits for value in values]


@pytest.mark.parametrize("change", [-5, -1, 1, 5])
def test_a_masked_vector_of_another_length_is_refused(change):
    """Catches: a message that fills part of the vector, or more than it."""
    assert code(ring.ring_from_bytes, bytes(10 * 5 + change), 10, 40) == "secagg-message"


def test_reducing():
    """Catches: negative numbers that lose their place, and a vector that is changed under its owner's hands."""
    vector = np.array([-1, 0, 1, 2**40, -(2**40) - 3, 2**63 - 1], np.int64)
    kept = vector.copy()
    reduced = ring.reduce(vector, 40)
    assert reduced.tolist() == [int(value) % 2**40 for value in kept]
    reduced[:] = 7
    assert (vector == kept).all()
    assert ring.reduce(vector, 64).tolist() == [int(value) % 2**64 for value in kept]


@pytest.mark.parametrize("vector", [np.zeros(3), np.zeros((3, 1), np.int64), np.zeros(3, np.int32), np.zeros(3, bool)])
def test_only_integer_vectors_are_masked(vector):
    """Catches: floats that are cut to integers on the way, shapes that broadcast."""
    with pytest.raises(ValueError, match="expected int64 or uint64"):
        ring.reduce(vector, 40)


@pytest.mark.parametrize("bits", [0, 1, 7, 12, 63, 72, -8])
def test_only_whole_bytes_are_uniform(bits):
    """Catches: a modulus that the stream would have to be squeezed into."""
    with pytest.raises(ValueError, match="expected 8, 16"):
        masks.stream(KEY, 3, bits)
