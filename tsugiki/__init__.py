"""Tsugiki. The subpackages live in the top-level folders `common/`, `client/` and `server/`.

A wheel holds them here. A source checkout and an unpacked Flower app (FAB) hold them beside this folder, so there the
search path is extended by one step. Without that, Flower could not load the app where it is not installed.
"""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

from tsugiki.common import __version__  # noqa: E402  (it needs the path; and it switches off what would phone home)

__all__ = ["__version__"]
