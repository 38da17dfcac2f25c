"""Fault 3: shapes that NumPy would broadcast, and others."""

import numpy as np
import pytest

from tests.support.toy import (
    ASKED,
    SPEC,
    check_only_rejected,
    of_array,
    of_bytes,
    run_with_bad_site,
    train_reply,
    with_arrays,
)
from tsugiki.server.run.guard import check

SHAPES = [(), (1,), (1, SPEC.size), (SPEC.size, 1), (SPEC.size - 1,), (SPEC.size + 1,), (0,), (8, SPEC.size // 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_another_shape_is_rejected_with_both(shape):
    """Catches: broadcasting, flattening, and a message that tells neither shape."""
    rejected = check(train_reply(of_array(np.ones(shape, np.float32))), ASKED, SPEC, 100.0)
    assert rejected.reason == "shape"
    assert str(shape) in rejected.detail
    assert f"({SPEC.size},)" in rejected.detail


def test_a_declared_shape_does_not_hide_another():
    """Catches: the declared shape believed: the bytes hold a transposed matrix of as many elements."""
    from io import BytesIO

    for matrix in (np.ones((8, 5), np.float32), np.asfortranarray(np.ones((5, 8), np.float32))):
        assert matrix.size == SPEC.size
        stream = BytesIO()
        np.save(stream, matrix)
        assert check(train_reply(of_bytes(stream.getvalue())), ASKED, SPEC, 100.0).reason == "shape"


@pytest.mark.parametrize("shape", [(), (1,), (1, SPEC.size)], ids=str)
def test_the_others_are_averaged(tmp_path, shape):
    """Catches: a run that ends in NumPy's ValueError, or an average with one number spread over all."""
    ran = run_with_bad_site(tmp_path, lambda reply: with_arrays(reply, of_array(np.full(shape, 9.0, np.float32))))
    check_only_rejected(ran, "shape")
