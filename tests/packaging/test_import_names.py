"""The installed program beside what its users have: folders and packages that are called common, client or server."""

import os
import subprocess

import pytest

from tests.support.processes import quiet_environment
from tests.support.serving import tiny_run
from tests.support.tiny import tiny_bert
from tests.support.wheel import build_wheel, installed, pip, wheel_of
from tsugiki.common.config.files import to_toml

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "someone-elses"
version = "1"
[tool.setuptools]
packages = ["common"]
"""

TRAP = 'raise RuntimeError("a module of the user\'s own was imported")\n'


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The bin folder of an environment with nothing but the wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    return installed(build_wheel(folder), folder / "environment")


def run(programs, folder, *command):
    """Run a program of the environment in a folder; return what it printed."""
    environment = {**os.environ, **quiet_environment(folder / "home")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [programs / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_users_own_folders_are_not_ours(programs, tmp_path):
    """Catches: import names that a folder in the current directory takes over."""
    for name in ("common", "client", "server"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    ask = "import tsugiki, tsugiki.common.tasks, tsugiki.client.app, tsugiki.server.app; print(tsugiki.__version__)"
    assert run(programs, tmp_path, "python", "-c", ask) == run(programs, tmp_path, "tsugiki", "--version")
    config = tiny_run(tmp_path, str(tiny_bert(tmp_path / "model")))
    (tmp_path / "run.toml").write_text(to_toml(config))
    run(programs, tmp_path, "tsugiki", "simulate", "run.toml", "--no-export")
    with pytest.raises(AssertionError, match="user's own"):
        run(programs, tmp_path, "python", "-c", "import common")  # else the folders would prove nothing


def test_another_package_called_common_can_come_and_go(programs, tmp_path):
    """Catches: files of ours that another distribution overwrites, and takes away when it is uninstalled."""
    tree = tmp_path / "tree"
    (tree / "common").mkdir(parents=True)
    (tree / "common" / "__init__.py").write_text("THEIRS = True\n")
    (tree / "pyproject.toml").write_text(PYPROJECT)
    wheel = wheel_of(tree, tmp_path / "out")
    python = programs / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    assert run(programs, tmp_path, "python", "-c", "import common; print(common.THEIRS)") == "True\n"
    before = run(programs, tmp_path, "tsugiki", "--version")
    pip("--python", python, "uninstall", "--yes", "someone-elses")
    assert run(programs, tmp_path, "tsugiki", "--version") == before
    assert (
        run(programs, tmp_path, "python", "-c", "import os, tsugiki; print(os.environ['FLWR_TELEMETRY_ENABLED'])")
        == "0\n"
    )
