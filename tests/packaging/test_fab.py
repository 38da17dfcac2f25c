"""What `flwr run` sends to the SuperLink, and from there to whoever starts the apps: an allow-list, and no more."""

import io
import shutil
import zipfile
from pathlib import Path

import pytest
import tomli
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).resolve().parents[2]
FLOWERS_OWN = {"pyproject.toml", ".info/CONTENT"}
SECRETS = (
    "secrets.json",
    ".env",
    "site.toml",
    "data/train.csv",
    "runs/demo/adapter.safetensors",
    "common/secrets.json",
    "common/data/train.csv",
    "client/site.toml",
    "server/site.toml",
    "common/data/notes.md",
    "client/key.pem",
    "server/.env",
    "server/token.txt",
    "tests/test_x.py",
    "scripts/keys.py",
    "docs/notes.md",
    "secrets.py",
)


def allowed():
    """Return the paths that the bundle has to hold."""
    modules = (
        path.relative_to(ROOT).as_posix()
        for name in ("tsugiki", "common", "client", "server")
        for path in (ROOT / name).rglob("*.py")
    )
    return {"LICENSE", *modules}


def names(folder):
    """Build the bundle of a folder and return what is in it."""
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        return set(bundle.namelist())


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with secrets lying about."""
    target = tmp_path / "tsugiki"
    target.mkdir()
    for name in ("pyproject.toml", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, target / name)
    for name in ("tsugiki", "common", "client", "server"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SECRETS:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("Patient Jane hf_abc")
    return target


def test_the_bundle_holds_the_allow_list(tree):
    """Catches: a module that the apps need and the bundle lacks; anything that merely lies in the folder."""
    assert len(allowed()) > 30
    assert names(tree) - FLOWERS_OWN == allowed()


def test_without_the_allow_list_secrets_would_travel(tree):
    """Catches: secrets that Flower leaves out by itself, with which the test above would prove nothing."""
    file = tree / "pyproject.toml"
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("fab-include")]
    file.write_text("\n".join(lines), "utf-8")
    assert len(names(tree) & set(SECRETS)) >= 3


def test_the_bundle_does_not_depend_on_the_machine(tree, tmp_path):
    """Catches: times or paths in the bundle, whose hash names it."""
    other = tmp_path / "elsewhere" / "tsugiki"
    shutil.copytree(tree, other, copy_function=shutil.copyfile)
    assert build_fab_from_disk(tree) == build_fab_from_disk(other)


def test_the_bundle_names_the_apps_and_the_defaults(tree):
    """Catches: components that do not exist; a bundle without the run config's keys, which Flower refuses to set."""
    from flwr.common.config import flatten_dict

    from tsugiki.client import app as client_app
    from tsugiki.common.config.files import run_config_defaults
    from tsugiki.server import app as server_app

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tree))) as bundle:
        app = tomli.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "tsugiki.server.app:app", "clientapp": "tsugiki.client.app:app"}
    assert type(server_app.app).__name__ == "ServerApp"
    assert type(client_app.app).__name__ == "ClientApp"
    assert flatten_dict(app["config"]) == run_config_defaults()
