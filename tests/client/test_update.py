import numpy as np

from client.update import make_update


def test_the_update_is_local_minus_received():
    """Catches: the sign turned round, and weights sent instead of their change."""
    local, received = np.array([1.0, 2.0], np.float32), np.array([0.5, 3.0], np.float32)
    update = make_update(local, received)
    assert update.dtype == np.float32
    assert update.tolist() == [0.5, -1.0]


def test_without_training_the_update_is_exactly_zero():
    """Catches: rounding on the way."""
    received = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert not make_update(received.copy(), received).any()


def test_the_arguments_are_not_changed():
    """Catches: a subtraction in place: the received adapter is needed again."""
    local, received = np.ones(3, np.float32), np.full(3, 2.0, np.float32)
    make_update(local, received)
    assert (local.tolist(), received.tolist()) == ([1.0] * 3, [2.0] * 3)


def test_large_and_small_values_are_subtracted_exactly():
    """Catches: an overflow on the way to a difference that float32 holds."""
    update = make_update(np.array([3e38, 1e-45], np.float32), np.array([2.9e38, 0.0], np.float32))
    assert np.isfinite(update).all()
    assert update[1] == np.float32(1e-45)
