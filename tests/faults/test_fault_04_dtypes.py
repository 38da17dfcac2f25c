"""Fault 4: numbers of another type than the spec's."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest

from tests.support.toy import ASKED, SPEC, of_array, of_bytes, train_reply
from tsugiki.server.run.guard import check
from tsugiki.server.run.replies import Accepted

TYPES = ["float64", "float16", "int32", "complex64", "<U1", ">f4", "bool", "uint8"]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_declared_type_is_rejected(dtype):
    """Catches: a cast of whatever comes, and Flower's own drift to float64."""
    assert check(train_reply(of_array(np.zeros(SPEC.size, dtype))), ASKED, SPEC, 100.0).reason == "dtype"


@pytest.mark.parametrize("dtype", ["<i4", ">f4", "<u4", "<U1", "|V4"])
def test_a_declared_type_does_not_hide_another(dtype):
    """Catches: integers or swapped bytes of the same width read as float32."""
    stream = BytesIO()
    np.save(stream, np.zeros(SPEC.size, dtype))
    assert check(train_reply(of_bytes(stream.getvalue())), ASKED, SPEC, 100.0).reason == "dtype"


def test_the_specs_own_type_is_accepted_and_no_other():
    """Catches: float32 accepted where float16 was agreed."""
    half = replace(SPEC, wire_dtype="float16")
    update = np.full(SPEC.size, 0.5)
    accepted = check(train_reply(of_array(update.astype(np.float16))), ASKED, half, 100.0)
    assert isinstance(accepted, Accepted)
    assert accepted.update.dtype == np.float32
    assert check(train_reply(of_array(update.astype(np.float32))), ASKED, half, 100.0).reason == "dtype"
