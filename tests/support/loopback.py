"""A whole Flower deployment on loopback: one SuperLink, stock SuperNodes, and a run submitted with `flwr run`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from tests.support.processes import BIN, ROOT, quiet_environment, running, wait_for_port
from tsugiki.server.deploy.superlink_process import free_port


@dataclass(frozen=True)
class Deployment:
    """Where a running SuperLink is: its logs and its Flower home."""

    folder: Path
    home: Path
    fleet_port: int

    def run(self, run_config: Mapping[str, bool | float | int | str], timeout_s: float, app: Path = ROOT) -> str:
        """Submit the app with a run config, wait for its end, and return what was printed."""
        overrides = self.folder / "run-config.toml"
        overrides.write_text(tomli_w.dumps(dict(run_config)))
        done = subprocess.run(
            [BIN / "flwr", "run", app, "loopback", "--stream", "--run-config", overrides],
            env=quiet_environment(self.home),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.stdout + done.stderr


@contextmanager
def deployment(folder: Path, sites: Sequence[Path]) -> Iterator[Deployment]:
    """Run a SuperLink, and a stock SuperNode for each site.toml, inside a `with` block."""
    home = folder / "flwr-home"
    home.mkdir(parents=True)
    runtime, fleet = free_port(), free_port()
    config = {"superlink": {"default": "loopback", "loopback": {"address": f"127.0.0.1:{runtime}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(config))
    environment = quiet_environment(home)
    with ExitStack() as stack:
        log = folder / "superlink.log"
        command = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(runtime)]
        command += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
        superlink = stack.enter_context(running(command, log, environment))
        wait_for_port(fleet, superlink, 60, log)
        wait_for_port(runtime, superlink, 60, log)
        for number, site in enumerate(sites):
            command = [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{fleet}"]
            command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", f'site="{site}"']
            stack.enter_context(running(command, folder / f"supernode-{number}.log", environment))
        yield Deployment(folder, home, fleet)
