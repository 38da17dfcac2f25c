"""A package that is installed beside the program adds a task, an adapter method and a strategy."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from tests.support.federation import app_of_sites, site_folder, tiny_config
from tests.support.processes import ROOT, quiet_environment
from tests.support.tiny import tiny_bert
from tests.support.wheel import build_wheel, installed, wheel_of
from tsugiki.common import __version__
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.strategies import STRATEGIES
from tsugiki.common.tasks import TASKS
from tsugiki.common.wire.messages import HelloRequest, to_record
from tsugiki.server.engines.in_process import InProcessGrid

ADDED = ("text-regression", "norms", "capped-mean")

ADAPTER = '''
"""Layer norms, under another name."""

from typing import Literal

from pydantic import Field

from tsugiki.common.adapters.layernorm import LayerNorm, LayerNormSettings


class NormsSettings(LayerNormSettings):
    """As layernorm."""

    method: Literal["norms"] = Field(default="norms", description="the adapter method")


class Norms(LayerNorm):
    """As layernorm."""

    name = "norms"
    Settings = NormsSettings
'''

RUN = """
import json, sys, tomllib
from pathlib import Path
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import parse
from tsugiki.server.run.simulate import simulate

config = parse(tomllib.loads(Path("run.toml").read_text()))
summary = simulate(config, simulated_app).summary
chosen = [summary[key] for key in ("task", "method", "strategy")]
better = summary["after"]["mse"] < summary["before"]["mse"]
print(json.dumps({"chosen": chosen, "better": better, "sent": config.for_sites()}))
"""


def page(name: str) -> list[tuple[str, str]]:
    """Return the code on a page, with its languages."""
    return re.findall(r"```(python|toml)\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)


def write_package(folder: Path) -> Path:
    """Write the package of the pages, with their task and strategy, and an adapter method beside them."""
    inside = folder / "acme_tsugiki"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("")
    (inside / "capped.py").write_text(page("adding-a-strategy.md")[0][1])
    (inside / "regression.py").write_text(page("adding-a-task.md")[0][1])
    (inside / "norms.py").write_text(ADAPTER)
    project = page("adding-a-strategy.md")[2][1]
    entries = '[project.entry-points."tsugiki.tasks"]\ntext-regression = "acme_tsugiki.regression"\n'
    entries += '[project.entry-points."tsugiki.adapters"]\nnorms = "acme_tsugiki.norms:Norms"\n'
    # One entry point of the same package is broken.
    entries += 'gone = "acme_tsugiki.gone"\n'
    (folder / "pyproject.toml").write_text(f"{project}\n{entries}")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a base, a run file, and an environment in which the package is installed."""
    folder = tmp_path_factory.mktemp("plugins")
    acme = wheel_of(write_package(folder / "acme"), folder / "acme-out")
    installed(build_wheel(folder), folder / "environment", acme)
    rows = [f"the {word} clause number {n},{score}" for n in range(12) for word, score in (("good", 1.0), ("bad", 0.0))]
    (folder / "data.csv").write_text("\n".join(["text,score", *rows]) + "\n")
    tiny_bert(folder / "model")
    (folder / "run.toml").write_text(
        '[run]\nname = "toy"\nrounds = 3\n[model]\nname = "model"\n[adapter]\nmethod = "norms"\n'
        "[train]\nlearning_rate = 1e-2\nlocal_steps = 10\nper_device_train_batch_size = 8\nthreads = 1\n"
        '[simulation]\nclients = 2\ndata = "data.csv"\n[evaluation]\ndata = "data.csv"\n'
        + page("adding-a-task.md")[1][1]
        + page("adding-a-strategy.md")[1][1]
    )
    return folder


def run(place: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in its folder."""
    program, *rest = command
    return subprocess.run(
        [place / "environment" / "bin" / program, *rest],
        cwd=place,
        env=quiet_environment(place / "home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def ran(place: Path) -> dict[str, Any]:
    """What a federation of the package's task, adapter method and strategy printed."""
    done = run(place, "python", "-c", RUN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "acme-tsugiki 1.0 is left out: its adapter method (gone = acme_tsugiki.gone)" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_federation_runs_with_what_a_package_adds(ran: dict[str, Any]) -> None:
    """Catches: entry points that are not read; a broken one that takes the run down, or is left out in silence."""
    assert ran["chosen"] == list(ADDED)
    assert ran["better"]


def test_the_doctor_and_the_schema_know_the_package(place: Path) -> None:
    """Catches: a package that only a run finds; a broken entry point that nobody is told of."""
    done = run(place, "tsugiki", "doctor", "--json")
    findings = [one for one in json.loads(done.stdout) if one["name"] == "acme-tsugiki 1.0"]
    assert [one["fine"] for one in findings].count(True) == 3
    (broken,) = [one for one in findings if not one["fine"]]
    assert "acme_tsugiki.gone" in broken["found"]
    assert "ModuleNotFoundError" in broken["found"]
    schema = run(place, "tsugiki", "config", "schema").stdout
    assert all(f'"{name}"' in schema for name in ADDED)
    wrong = run(place, "tsugiki", "config", "show", "run.toml", "--set", "adapter.method=telepathy")
    assert wrong.returncode == 2
    assert "acme-tsugiki 1.0 could not be loaded" in wrong.stdout + wrong.stderr


def test_a_site_without_the_package_refuses_the_run_with_a_code(ran: dict[str, Any], tmp_path: Path) -> None:
    """Catches: a site that loads what a server names, or answers with an exception's text."""
    for registry, name in zip((TASKS, ADAPTERS, STRATEGIES), ADDED, strict=True):
        assert name not in registry.names()
    config = tiny_config(tmp_path)
    grid = InProcessGrid(*app_of_sites([site_folder(tmp_path / "acme", "acme")])(config))
    ids = grid.push_messages([Message(to_record(HelloRequest(ran["sent"], __version__)), 1, "query")])
    (reply,) = grid.pull_messages(ids)
    assert reply.has_error()
    assert reply.error.reason == "config-invalid"
