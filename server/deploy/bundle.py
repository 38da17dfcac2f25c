"""The Flower app bundle (FAB) of this program, made from the installed packages: no checkout is needed.

The SuperLink wants one for every run. Our own nodes never fetch it; stock SuperNodes run what is in it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import tomli_w

from common import __version__
from common.config_file import run_config_defaults

PACKAGES = ("common", "client", "server")
COMPONENTS = {"serverapp": "server.app:app", "clientapp": "client.app:app"}


def build() -> bytes:
    """Return the bundle."""
    from flwr.cli.build import build_fab_from_files

    files: dict[str, bytes | Path] = {"pyproject.toml": tomli_w.dumps(_project()).encode()}
    for package in PACKAGES:
        root = Path(next(iter(import_module(package).__path__)))
        for path in sorted(root.rglob("*.py")):
            files[f"{package}/{path.relative_to(root).as_posix()}"] = path
    return build_fab_from_files(files)[0]


def _project() -> dict[str, object]:
    """Return the bundle's pyproject.toml: what Flower reads, and no more."""
    app = {
        "publisher": "tsugiki",
        "fab-include": [f"{package}/**/*.py" for package in PACKAGES],
        "components": COMPONENTS,
        "config": run_config_defaults(),
    }
    project = {"name": "tsugiki", "version": __version__, "license": "Apache-2.0", "dependencies": []}
    return {"project": project, "tool": {"flwr": {"app": app}}}
