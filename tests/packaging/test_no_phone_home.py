"""Nothing phones home, whichever module is imported first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import json, os, socket, threading

attempts = []

def refuse(*arguments, **named):
    attempts.append(repr(arguments))
    raise OSError("no network in this test")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = refuse

{first}
from flwr.supercore import telemetry
from flwr.supercore.telemetry import EventType, event

answer = event(EventType.PING).result(timeout=20)
from flwr.supercore.update_check import warn_if_flwr_update_available
warn_if_flwr_update_available("flower-supernode")
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(20)
print(json.dumps({{
    "flag": telemetry.FLWR_TELEMETRY_ENABLED,
    "answer": answer,
    "attempts": attempts,
    "environment": {{name: os.environ.get(name) for name in {names!r}}},
}}))
"""

EXPECTED = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def probe(first, tmp_path, **extra):
    """Run the probe in a fresh process after some imports; return what it saw."""
    environment = {name: value for name, value in os.environ.items() if name not in EXPECTED}
    environment |= {"PYTHONPATH": str(ROOT), "FLWR_HOME": str(tmp_path), **extra}
    code = PROBE.format(first=first, names=sorted(EXPECTED))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "first",
    [
        "import tsugiki",
        "import tsugiki.client.app",
        "import tsugiki.server.app",
        "import flwr.supercore.telemetry, tsugiki",
    ],
)
def test_nothing_leaves(first, tmp_path):
    """Catches: switches set after Flower read them: it does at import, and Flower's processes import it before us."""
    seen = probe(first, tmp_path)
    assert seen == {"flag": "0", "answer": "disabled", "attempts": [], "environment": EXPECTED}


def test_a_users_own_setting_does_not_switch_it_on(tmp_path):
    """Catches: setdefault, which an environment that says otherwise would win over."""
    seen = probe("import tsugiki", tmp_path, FLWR_TELEMETRY_ENABLED="1", RAY_USAGE_STATS_ENABLED="1")
    assert (seen["flag"], seen["attempts"], seen["environment"]) == ("0", [], EXPECTED)


def test_the_probe_sees_what_it_looks_for(tmp_path):
    """Catches: a probe through which Flower slips, with which the tests above would prove nothing."""
    seen = probe("", tmp_path)
    assert seen["flag"] == "1"
    assert len(seen["attempts"]) >= 2


def test_ray_and_the_hub_read_the_switches():
    """Catches: a switch that was renamed by its library."""
    from huggingface_hub import constants

    import tsugiki  # noqa: F401

    assert constants.HF_HUB_DISABLE_TELEMETRY
    usage = pytest.importorskip("ray._common.usage.usage_lib", reason="ray is not installed")
    assert not usage.usage_stats_enabled()
