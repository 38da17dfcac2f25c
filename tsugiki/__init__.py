"""Tsugiki: federated fine-tuning with small adapters. `docs/python.md` describes these functions.

The subpackages live in the top-level folders `common/`, `client/` and `server/`.

A wheel holds them here. A source checkout and an unpacked Flower app (FAB) hold them beside this folder, so there the
search path is extended by one step. Without that, Flower could not load the app where it is not installed.
"""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

# These imports need the path. None brings Flower, torch or a hub: `tsugiki.common` switches off telemetry before that.
from tsugiki.api import (  # noqa: E402
    Comparison,
    Run,
    Table,
    compare,
    load_adapter,
    open_run,
    read_config,
    simulate,
)
from tsugiki.common import __version__  # noqa: E402
from tsugiki.common.errors import ConfigError, TsugikiError  # noqa: E402

__all__ = [
    "Comparison",
    "ConfigError",
    "Run",
    "Table",
    "TsugikiError",
    "__version__",
    "compare",
    "load_adapter",
    "open_run",
    "read_config",
    "simulate",
]
