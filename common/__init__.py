"""What server and client must agree on. Imports neither of them.

Nothing phones home: importing any part of Tsugiki comes through here first, and switches off the telemetry, update
checks and usage statistics of the libraries below us before they are imported.
"""

import os
import sys

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ[_name] = _value
if "flwr.supercore.telemetry" in sys.modules:  # it read its switch when Flower imported us, not we Flower
    sys.modules["flwr.supercore.telemetry"].FLWR_TELEMETRY_ENABLED = "0"  # type: ignore[attr-defined]  # a module's global
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our forks do not mix

__version__ = "0.1.0"


def minor(version: str) -> str:
    """Return major and minor version: what two sides have to have in common."""
    return ".".join(version.split(".")[:2])
