"""Fault 7: bytes that are no array: truncated, random, an archive, a pickle with a side effect."""

import os
from io import BytesIO

import numpy as np
import pytest

from tests.support.federation import CANARY
from tests.support.toy import ASKED, SPEC, check_only_rejected, of_bytes, run_with_bad_site, train_reply, with_arrays
from tsugiki.server.run.guard import check

LENGTH = SPEC.size * 4 + 128


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Tell pickle to make the file."""
        return (os.mkdir, (str(self.path),))


def pickled(path):
    """Return NumPy's bytes of an array of objects."""
    stream = BytesIO()
    np.save(stream, np.array([Trap(path)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def test_the_trap_works(tmp_path):
    """Catches: a trap that never snaps: then the test below would prove nothing."""
    np.load(BytesIO(pickled(tmp_path / "trap")), allow_pickle=True)
    assert (tmp_path / "trap").is_dir()


@pytest.mark.parametrize("declared", ["object", "float32"])
def test_nothing_is_unpickled(tmp_path, monkeypatch, declared):
    """Catches: pickle on the way of received bytes."""
    monkeypatch.chdir(tmp_path)
    data = pickled("trap")
    assert SPEC.size * 4 < len(data) <= SPEC.size * 4 + 256  # or it would be rejected by its size already
    rejected = check(train_reply(of_bytes(data, declared)), ASKED, SPEC, 100.0)
    assert rejected.reason in ("dtype", "decode")
    assert list(tmp_path.iterdir()) == []


def _good():
    stream = BytesIO()
    np.save(stream, np.zeros(SPEC.size, np.float32))
    return stream.getvalue()


CASES = {
    "truncated": _good()[:100],
    "random": np.random.default_rng(0).bytes(LENGTH),
    "zeros": bytes(LENGTH),
    "an archive": b"PK\x03\x04" + bytes(LENGTH - 4),
    "text": (CANARY * 100).encode()[:LENGTH],
    "another version of the format": _good().replace(b"NUMPY\x01", b"NUMPY\x03"),
    "a header that is no dictionary": _good().replace(b"{'descr'", b"['descr'"),
    "a header with a call": _good().replace(b"'<f4'", b"exit("),
    "a header without an end": _good().replace(b"}", b" "),
    "a header of 60,000 bytes": _good()[:8] + b"\x60\xea" + _good()[10:],
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_array_is_rejected(name):
    """Catches: an exception of NumPy's, of its parser or of zipfile, that ends the run."""
    rejected = check(train_reply(of_bytes(CASES[name])), ASKED, SPEC, 100.0)
    assert rejected.reason in ("decode", "size", "dtype")
    assert CANARY not in rejected.detail


@pytest.mark.parametrize("stype", ["torch.Tensor", "pickle", ""])
def test_another_way_of_writing_arrays_is_rejected(stype):
    """Catches: a serialisation that the sender chooses."""
    record = of_bytes(_good())
    record["adapter"].stype = stype
    assert check(train_reply(record), ASKED, SPEC, 100.0).reason == "dtype"


@pytest.mark.parametrize("name", ["random", "text", "a header that is no dictionary"])
def test_the_others_are_averaged(tmp_path, name):
    """Catches: a run that ends with the bad site."""
    ran = run_with_bad_site(tmp_path, lambda reply: with_arrays(reply, of_bytes(CASES[name])))
    check_only_rejected(ran, "decode", "size")
