"""The runs that a site was asked to join, and those to which somebody at the site has said yes: `[policy] ask`.

`asked/RUN.json` in the site's folder holds the settings that the server has sent, and the hash of what was approved. A
run that comes with other settings, more rounds or another privacy plan needs another yes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsugiki.common.config.parse import site_config
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import PolicyError, UsageError
from tsugiki.common.files import make_folder, read_json, to_json, write_atomically
from tsugiki.common.privacy.plan import Plan

_FOLDER = "asked"


@dataclass(frozen=True)
class Asked:
    """A run that waits for a yes, or has it.

    Args:
        path: of its file.
        text: the run's settings, as the server has sent them.
        settings_sha256: hash of what a yes is for.
        approved_sha256: hash of what was approved; empty before the first yes.
    """

    path: Path
    text: str
    settings_sha256: str
    approved_sha256: str

    @property
    def config(self) -> RunConfig:
        """The run.

        Raises:
            ConfigError: its settings are wrong.
        """
        return site_config(self.text)

    def approve(self) -> None:
        """Say yes to the run as it is here, whatever the server has sent meanwhile.

        Raises:
            StorageError: it cannot be written.
        """
        _write(self.path, self.text, self.settings_sha256, self.settings_sha256)


def check_approved(folder: Path, config: RunConfig, plan: Plan | None) -> None:
    """Check that somebody has said yes to a run; if not, keep it for `tsugiki site approve`.

    Args:
        folder: of the site.
        config: the run in a message.
        plan: its privacy plan, as the site has made it.

    Raises:
        PolicyError: `policy-ask`, nobody has.
        StorageError: the file is damaged, or cannot be written.
    """
    path = folder / _FOLDER / f"{config.run.name}.json"
    wanted = _hash(config, plan)
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    approved = str(known.get("approved_sha256", ""))
    if approved == wanted:
        return
    if known.get("settings_sha256") != wanted:
        make_folder(path.parent)
        _write(path, config.for_sites(plan), wanted, approved)
    raise PolicyError(
        f"nobody here has said yes to the run {config.run.name!r} with these settings",
        "a run that was approved, because policy.ask is set",
        f"`tsugiki site approve {config.run.name}`, which shows it and asks",
        code="policy-ask",
    )


def read_asked(folder: Path, run: str) -> Asked:
    """Return a run that the server has asked for.

    Args:
        folder: of the site.
        run: its name.

    Raises:
        UsageError: no server has asked for such a run since policy.ask was set.
        StorageError: the file is damaged.
    """
    paths = {path.stem: path for path in (folder / _FOLDER).glob("*.json")}
    if run not in paths:
        there = ", ".join(sorted(paths)) or "none yet: the client writes it down when a server asks"
        raise UsageError(f"no server has asked for a run {run!r}", f"one of the runs in {folder / _FOLDER}: {there}")
    known = read_json(paths[run])
    return Asked(
        paths[run],
        str(known.get("config")),
        str(known.get("settings_sha256")),
        str(known.get("approved_sha256", "")),
    )


def _hash(config: RunConfig, plan: Plan | None) -> str:
    """Return the hash over what a yes is for: what shapes the result, the number of rounds, and the privacy plan."""
    body = {**config.fixed, "run.rounds": config.run.rounds, "plan": asdict(plan) if plan else None}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(path: Path, config: str, settings_sha256: str, approved_sha256: str) -> None:
    body = {"config": config, "settings_sha256": settings_sha256, "approved_sha256": approved_sha256}
    write_atomically(path, to_json(body, indent=1).encode())
