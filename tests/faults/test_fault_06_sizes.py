"""Fault 6: bytes that are not as many as agreed, and headers that ask for a terabyte."""

import tracemalloc
from io import BytesIO

import numpy as np
import pytest

from tests.support.toy import ASKED, SPEC, check_only_rejected, of_bytes, run_with_bad_site, train_reply, with_arrays
from tsugiki.server.run.guard import check


def saved(array):
    """Return NumPy's bytes."""
    stream = BytesIO()
    np.save(stream, array)
    return stream.getvalue()


GOOD = saved(np.zeros(SPEC.size, np.float32))
PAYLOAD = SPEC.size * 4


def claiming(count):
    """Return bytes of the agreed length whose header claims `count` elements."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count},), }}".encode()
    header += b" " * (128 - 10 - 1 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(PAYLOAD)


CASES = {
    "a header for 10^13 elements": (claiming(10**13), {"shape"}),
    "a header for 4 * 10^9 elements": (claiming(4 * 10**9), {"shape"}),
    "a negative number of elements": (claiming(-1), {"shape", "decode"}),
    "bytes after the array": (GOOD + b"x", {"size"}),
    "many bytes after the array": (GOOD + bytes(10_000), {"size"}),
    "one byte short": (GOOD[:-1], {"size"}),
    "another array": (saved(np.zeros(4, np.float32)), {"size"}),
    "a header without an array": (GOOD[:128], {"size"}),
    "nothing": (b"", {"size"}),
    "50 MB": (bytes(50_000_000), {"size"}),
}


def test_the_forger_forges_nothing_else():
    """Catches: a header in these tests that is refused for another reason than its number."""
    assert claiming(SPEC.size) == GOOD


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_the_agreed_size_is_rejected_before_it_is_decoded(name):
    """Catches: an allocation whose size the sender chooses."""
    data, reasons = CASES[name]
    reply = train_reply(of_bytes(data))
    tracemalloc.start()
    try:
        assert check(reply, ASKED, SPEC, 100.0).reason in reasons
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_declared_size_does_not_help():
    """Catches: metadata that are compared with the bytes, but not with the spec."""
    array = np.zeros(10**6, np.float32)
    reply = train_reply(of_bytes(saved(array), shape=array.shape))
    assert check(reply, ASKED, SPEC, 100.0).reason == "shape"


@pytest.mark.parametrize("name", ["a header for 10^13 elements", "bytes after the array", "nothing"])
def test_the_others_are_averaged(tmp_path, name):
    """Catches: a MemoryError that ends the run."""
    data, reasons = CASES[name]
    ran = run_with_bad_site(tmp_path, lambda reply: with_arrays(reply, of_bytes(data)))
    check_only_rejected(ran, *reasons)
