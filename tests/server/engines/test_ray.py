import importlib.util
import sys

import pytest

from common.errors import UsageError
from server.engines import ray as engine
from tests.support.federation import run_tiny, tiny_config


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'tsugiki[ray]'")
def test_ray_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Catches: an engine that seeds, orders or splits in its own way, or loses what the ServerApp returns."""
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    here = run_tiny(tiny_config(tmp_path, run={"rounds": 1}))
    there = run_tiny(tiny_config(tmp_path, run={"rounds": 1, "name": "ray"}, simulation={"engine": "ray"}))
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there.summary["after"] == here.summary["after"]


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    """Catches: an ImportError from a dependency that is optional."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'tsugiki\[ray\]'"):
        engine.run(None, 1, 1, 0.0, lambda grid: None)
