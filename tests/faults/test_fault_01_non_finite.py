"""Fault 1: NaN or infinity in one update: that site is rejected, the others are averaged."""

import numpy as np
import pytest

from tests.support.toy import ASKED, SPEC, check_only_rejected, of_array, run_with_bad_site, train_reply, with_arrays
from tsugiki.server.run.guard import check


def spoiled(value, place):
    """Return an update with one bad element, or all bad."""
    update = np.zeros(SPEC.size, np.float32)
    update[place] = value
    return of_array(update)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, -1, SPEC.size // 2, slice(None)])
def test_one_bad_element_is_enough(value, place):
    """Catches: a check of the sum, the norm or the first element only."""
    assert check(train_reply(spoiled(value, place)), ASKED, SPEC, 1e30).reason == "non-finite"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_others_are_averaged(tmp_path, value):
    """Catches: a global model of NaN, and a round that ends with the bad site."""
    ran = run_with_bad_site(tmp_path, lambda reply: with_arrays(reply, spoiled(value, -1)))
    check_only_rejected(ran, "non-finite")
