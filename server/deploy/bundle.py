"""The Flower app bundle (FAB) of this program, made from the installed packages: no checkout is needed.

The SuperLink wants one for every run. Our own nodes never fetch it; stock SuperNodes run what is in it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import tomli_w

from tsugiki.common import __version__
from tsugiki.common.config.files import run_config_defaults

FOLDERS = ("tsugiki", "common", "client", "server")
"""As in a checkout: `tsugiki` has the bridge and the command line, the others are its subpackages."""
COMPONENTS = {"serverapp": "tsugiki.server.app:app", "clientapp": "tsugiki.client.app:app"}


def build() -> bytes:
    """Return the bundle."""
    from flwr.cli.build import build_fab_from_files

    files: dict[str, bytes | Path] = {"pyproject.toml": tomli_w.dumps(_project()).encode()}
    for folder in FOLDERS:
        name = f"tsugiki.{folder}"
        pattern = "**/*.py"
        # An installed `tsugiki` has the other folders inside it; in the bundle they are beside it, as in a checkout.
        if folder == "tsugiki":
            name = "tsugiki"
            pattern = "*.py"
        root = Path(next(iter(import_module(name).__path__)))
        for path in sorted(root.glob(pattern)):
            files[f"{folder}/{path.relative_to(root).as_posix()}"] = path
    return build_fab_from_files(files)[0]


def _project() -> dict[str, object]:
    """Return the bundle's pyproject.toml, with the entries that Flower reads."""
    app = {
        "publisher": "tsugiki",
        "fab-include": [f"{folder}/**/*.py" for folder in FOLDERS],
        "components": COMPONENTS,
        "config": run_config_defaults(),
    }
    project = {"name": "tsugiki", "version": __version__, "license": "Apache-2.0", "dependencies": []}
    return {"project": project, "tool": {"flwr": {"app": app}}}
