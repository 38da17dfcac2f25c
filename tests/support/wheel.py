"""The wheel of this tree, and an environment in which it alone is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tests.support.processes import ROOT

PACKAGES = ("tsugiki", "common", "client", "server")


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the tree, without the network; return its path."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return wheel_of(tree, folder / "out")


def wheel_of(tree: Path, out: Path) -> Path:
    """Build the wheel of a project into an empty folder, without the network; return its path."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, tree)
    (built,) = out.glob("*.whl")
    return built


def installed(wheel: Path, folder: Path, *others: Path) -> Path:
    """Install wheels into a new environment that borrows what they need from this one; return its bin folder."""
    venv.create(folder, with_pip=False)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel, *others)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    # A path from a .pth file brings its packages but not its own .pth files, which would lead to this tree.
    borrowed = [path for path in sys.path if path and any(Path(path).glob("*.dist-info"))]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin"


def pip(*arguments: str | Path) -> None:
    """Run pip of this environment; fail with what it said."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
