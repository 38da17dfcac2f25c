"""What all tests share: no network, one thread, and the real data where there is any."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models only lose by more, and tests share cores

from pathlib import Path

import pytest
from hypothesis import settings

import tsugiki.common  # noqa: F401  (switches off what would phone home)

settings.register_profile("tsugiki", deadline=None)  # how long an example takes is a matter of the machine
settings.load_profile("tsugiki")


@pytest.fixture
def real_data() -> Path:
    """The folder of real data that TSUGIKI_DATA points to; skips where there is none."""
    folder = os.environ.get("TSUGIKI_DATA", "")
    if not folder:
        pytest.skip("TSUGIKI_DATA is not set: this test reads real data")
    return Path(folder)


@pytest.fixture(scope="session")
def model() -> str:
    """The folder of a tiny model."""
    from tests.support.federation import model_folder

    return model_folder()
