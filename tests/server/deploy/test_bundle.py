"""The app bundle made from the installed packages is the one that Flower makes from the tree."""

import io
import tomllib
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

from server.deploy.bundle import build

ROOT = Path(__file__).resolve().parents[3]


def contents(bundle):
    """Return {path: content} of a bundle."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_is_what_flower_builds_from_the_tree():
    """Catches: a module that is missing, changed or too much; components or settings that differ."""
    ours, flowers = contents(build()), contents(build_fab_from_disk(ROOT))
    apart = {"pyproject.toml", ".info/CONTENT", "tsugiki.py", "LICENSE"}
    assert len(ours) > 50
    assert {name: body for name, body in ours.items() if name not in apart} == {
        name: body for name, body in flowers.items() if name not in apart
    }
    mine, theirs = (tomllib.loads(one["pyproject.toml"].decode())["tool"]["flwr"]["app"] for one in (ours, flowers))
    for key in ("components", "publisher"):
        assert mine[key] == theirs[key]


def test_its_settings_are_the_programs(tmp_path):
    """Catches: an override that Flower refuses because the bundle does not have the key."""
    from common.config_file import run_config_defaults

    app = tomllib.loads(contents(build())["pyproject.toml"].decode())["tool"]["flwr"]["app"]
    flat = {f"{section}.{key}" for section, table in app["config"].items() if isinstance(table, dict) for key in table}
    assert (flat or set(app["config"])) == set(run_config_defaults())


def test_equal_trees_give_equal_bundles():
    """Catches: a time or an order in it, so that the same code would be a new app for each run."""
    assert build() == build()
