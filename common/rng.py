"""Randomness derived from one seed.

Every random choice of a run is a function of the run's seed and of what the choice is for, so that it depends neither
on the order in which sites answer nor on how many times a process was restarted. Privacy noise is the exception: it
never comes from here.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive_seed(run_seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, for example `derive_seed(42, "batches", "site-0", 3)`.

    It is a SHA-256 over the parts and their lengths, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.sha256()
    for part in (run_seed, *purpose):
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(4, "big") + encoded)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generator(run_seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a NumPy generator for one purpose."""
    return np.random.default_rng(derive_seed(run_seed, *purpose))


def seed_everything(seed: int) -> None:
    """Reseed every global generator that a library below us may draw from (dropout draws from torch's)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's old generator takes 32 bits
    torch.manual_seed(seed)
