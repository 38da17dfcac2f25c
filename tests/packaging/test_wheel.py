"""What `pip install` brings."""

import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.wheel import PACKAGES, build_wheel


def sources():
    """Return {path in the wheel: path in the tree} of all modules, and of the files that they read."""
    paths = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    paths |= {Path("tsugiki/py.typed"), Path("server/report/report.html.j2")}
    return {("" if path.parts[0] == "tsugiki" else "tsugiki/") + path.as_posix(): ROOT / path for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, opened."""
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


def test_every_module_is_in_it_and_nothing_else(wheel):
    """Catches: a new package that is missing from [tool.setuptools] packages; tests or scripts that slip in."""
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert len(files) > 30
    assert files == set(sources())


def test_modules_are_whole(wheel):
    """Catches: files of an old build folder."""
    for name, path in sources().items():
        assert wheel.read(name) == path.read_bytes(), name


def test_the_command_and_the_licence_are_there(wheel):
    """Catches: an entry point that points nowhere; a wheel without its licence or with another version."""
    from tsugiki import cli
    from tsugiki.common import __version__

    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "tsugiki = tsugiki.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert callable(cli.main)
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert metadata["Version"] == declared["version"] == __version__
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == len(declared["dependencies"])
