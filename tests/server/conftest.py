import os

import pytest


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Skip flushing to the disk, which only a power cut would tell, and which most of these tests' time would go to."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
