"""Seeds for every purpose."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsugiki.common.rng import derive_seed, generator, seed_everything

PARTS = st.lists(st.one_of(st.text(max_size=6), st.integers(-5, 5)), max_size=4)


def test_the_formula_stays():
    """Catches: any change to the derivation, after which a resumed run would not end with the same bytes."""
    body = b"".join(
        len(part).to_bytes(4, "big") + part for part in (b"int:42", b"str:batches", b"str:site-0", b"int:3")
    )
    expected = int.from_bytes(hashlib.sha256(body).digest()[:8], "big") // 2
    assert derive_seed(42, "batches", "site-0", 3) == expected == 505148757682329526


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, "ab", "c"), (1, "a", "bc")), ((1, "2"), (1, 2)), ((1,), (1, "")), ((12,), (1, 2)), ((1, "a"), (2, "a"))],
)
def test_parts_do_not_run_together(first, second):
    """Catches: parts joined without their lengths and types, so that two purposes share a stream."""
    assert derive_seed(*first) != derive_seed(*second)


@given(PARTS, PARTS)
def test_other_parts_other_seed(first, second):
    """Catches: a part that is left out of the hash; a seed that torch or NumPy would refuse."""
    seeds = derive_seed(0, *first), derive_seed(0, *second)
    assert (seeds[0] == seeds[1]) == (first == second)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_depends_on_its_purpose_only():
    """Catches: a generator that draws from global state."""
    first = generator(7, "partition").random(5)
    np.random.seed(1)
    assert np.array_equal(first, generator(7, "partition").random(5))
    assert not np.array_equal(first, generator(7, "sampling").random(5))


def draws():
    """Return one number of each global generator."""
    import torch

    return random.random(), float(np.random.random()), float(torch.rand(1))  # noqa: S311


def test_every_global_generator_is_reseeded():
    """Catches: one generator left alone, so that dropout or shuffling depends on what ran before."""
    seed = derive_seed(3, "train", "site-1", 2)  # 63 bits: more than NumPy's global generator takes
    seed_everything(seed)
    first = draws()
    draws()
    seed_everything(seed)
    assert draws() == first
    seed_everything(seed + 1)
    assert not set(draws()) & set(first)
