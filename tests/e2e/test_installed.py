"""`tsugiki serve` and `tsugiki client` from an installed wheel, in folders with nothing of the project in them."""

import subprocess

import pytest

from tests.support.processes import ROOT, quiet_environment
from tests.support.serving import Place, serve_and_join, started, summary, tiny_run
from tests.support.wheel import build_wheel, installed
from tsugiki.client.app import simulated_app
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e


def test_the_wheel_serves_and_joins(tmp_path, model):
    """Catches: a run that needs the checkout: its files, its bundle, a path relative to it."""
    programs = installed(build_wheel(tmp_path), tmp_path / "environment")
    ask = [programs / "python", "-c", "from tsugiki import client, server; print(client.__file__, server.__file__)"]
    environment = quiet_environment(tmp_path / "home")
    loaded = subprocess.run(ask, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert loaded.count(str(tmp_path / "environment")) == 2, loaded
    assert str(ROOT) not in loaded
    here = simulate(tiny_run(tmp_path, model, "here"), simulated_app)
    config = tiny_run(tmp_path, model, "there")
    places = dict.fromkeys(("server", "site-0", "site-1"), Place((programs / "tsugiki",)))
    with started() as start:
        server, _ = serve_and_join(start, tmp_path, config, ["--insecure"], ["--insecure"], places=places)
        assert server.wait(120) == 0, server.text()[-3000:]
    assert summary(config)["adapter_sha256"] == here.summary["adapter_sha256"]
    assert (tmp_path / "runs" / "there" / "adapter" / "adapter_model.safetensors").is_file()
    assert {path.name for path in (tmp_path / "server").iterdir()} <= {"serve.log", "flwr-home"}
