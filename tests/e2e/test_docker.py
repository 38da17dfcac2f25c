"""The demo as containers: `make federation`'s script with a real engine."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.three import COMPANIES, demo_of_three
from tsugiki.client.app import simulated_app
from tsugiki.common.files import read_lines
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


def done(*command: str) -> subprocess.CompletedProcess[str]:
    """Return what a command said."""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module", autouse=True)
def _engine():
    """Skip where there is no engine."""
    if not shutil.which("docker") or done("docker", "info").returncode:
        pytest.skip("no Docker engine answers: the federation in containers was not run")
    if done("docker", "compose", "version").returncode and not shutil.which("docker-compose"):
        pytest.skip("no Docker Compose: the federation in containers was not run")


def test_the_demo_in_containers_gives_what_one_process_gives(tmp_path):
    """Catches: an image without a module, a volume that a container cannot write, sites mixed up, orphans."""
    target = tmp_path / "federation"
    ran = done("docker/federation.sh", str(target))
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    assert (target / "adapter" / "modules.json").is_file()
    assert (target / "report.html").stat().st_size > 10_000
    here = read_lines(simulate(demo_of_three(tmp_path / "here"), simulated_app).folder / "metrics.jsonl")
    there = read_lines(target / "metrics.jsonl")
    assert len(there) == len(here) > 2
    for mine, theirs in zip(here, there, strict=True):
        assert mine.get("eval", {}) == pytest.approx(theirs.get("eval", {}), abs=1e-3)
        assert mine.get("train_loss", 0.0) == pytest.approx(theirs.get("train_loss", 0.0), abs=1e-3)
        assert set(mine.get("accepted", COMPANIES)) == set(theirs.get("accepted", COMPANIES)) == set(COMPANIES)
    for problem in ("ps --all", "volume ls", "network ls"):
        left = done("docker", *problem.split(), "--format", "{{json .}}").stdout
        assert "tsugiki-" not in left, left


def test_the_image_holds_no_secret_and_runs_as_nobody_special():
    """Catches: a build folder copied whole; a container that is root; a root file system that has to be writable.

    The image is the one that the test before has built.
    """
    image = ("docker", "run", "--rm", "--read-only", "--network", "none", "--entrypoint", "sh")
    found = done(*image, "tsugiki", "-c", "id -u; ls -A /work; find / -xdev -name '*.key' -not -path '/proc/*' | wc -l")
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["10001", "0"]
    layers = done("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", "tsugiki").stdout
    assert "tsugiki" in layers
    assert not [word for word in ("PRIVATE KEY", "TOKEN", "PASSWORD") if word in layers.upper()]
