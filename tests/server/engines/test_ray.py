import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.federation import tiny_config
from tsugiki.client.app import simulated_app
from tsugiki.common.errors import UsageError
from tsugiki.server.engines import ray as engine
from tsugiki.server.run import simulate as simulation

ROOT = Path(__file__).parents[3]

BOTH = """
import sys
from pathlib import Path
from tests.support.federation import run_tiny, tiny_config

seeded = {"mode": "distributed", "noise_multiplier": 0.5, "delta": 1e-3, "insecure_noise_seed": 7}
privacy = {**seeded, "secure_aggregation": True} if sys.argv[2] == "secure" else {}
for engine in ("in-process", "ray"):
    sections = {"run": {"name": engine, "rounds": 1}, "train": {"threads": 2}, "simulation": {"engine": engine}}
    task = {"warm_head": "auto"}  # the sums before round 1 too
    summary = run_tiny(tiny_config(Path(sys.argv[1]), privacy=privacy, task=task, **sections)).summary
    print("RESULT", summary["adapter_sha256"], summary["after"])
"""
"""Two threads make one worker of Ray's on a machine of two cores: one import of torch less."""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'tsugiki[ray]'")
@pytest.mark.parametrize("privacy", ["open", "secure"])
def test_ray_ends_with_the_same_bytes(tmp_path, privacy):
    """Catches: an engine that seeds, orders or splits in its own way, or loses a session of secure aggregation."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # in a process of its own: Ray leaves things behind
    command = [sys.executable, "-c", BOTH, str(tmp_path), privacy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    here, there = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert here == there


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    """Catches: an ImportError from a dependency that is optional."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'tsugiki\[ray\]'"):
        engine.run(None, 1, 1, 0.0, lambda grid: None)


def test_a_crash_of_the_engine_ends_the_federation(tmp_path, monkeypatch):
    """Catches: a program that hangs after Ray's end, because the federation's thread waits for nodes that are gone."""

    def crash(app, nodes, threads, gpus, main):
        raise RuntimeError("Simulation Runtime crashed.")

    monkeypatch.setattr(engine, "run", crash)
    stop = simulation.Stop()
    with pytest.raises(RuntimeError):
        simulation.simulate(tiny_config(tmp_path, simulation={"engine": "ray"}), simulated_app, stop=stop)
    assert stop.requested
