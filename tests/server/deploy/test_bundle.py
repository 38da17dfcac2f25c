"""The app bundle made from the installed packages is the one that Flower makes from the tree."""

import io
import tomllib
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

from tsugiki.server.deploy.bundle import build

ROOT = Path(__file__).resolve().parents[3]


def contents(bundle):
    """Return {path: content} of a bundle."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_is_what_flower_builds_from_the_tree():
    """Catches: a module that is missing, changed or too much; components or a publisher that differ."""
    ours, flowers = contents(build()), contents(build_fab_from_disk(ROOT))
    apart = {"pyproject.toml", ".info/CONTENT", "LICENSE"}
    assert len(ours) > 50
    assert {name: body for name, body in ours.items() if name not in apart} == {
        name: body for name, body in flowers.items() if name not in apart
    }
    mine, theirs = (tomllib.loads(one["pyproject.toml"].decode())["tool"]["flwr"]["app"] for one in (ours, flowers))
    for key in ("components", "publisher"):
        assert mine[key] == theirs[key]


def test_its_settings_are_those_of_the_tree():
    """Catches: an override that Flower refuses because the bundle does not have the key."""
    ours, flowers = (
        tomllib.loads(contents(one)["pyproject.toml"].decode())["tool"]["flwr"]["app"]["config"]
        for one in (build(), build_fab_from_disk(ROOT))
    )
    assert flatten(ours) == flatten(flowers)
    assert len(flatten(ours)) > 40


def flatten(table, prefix=""):
    """Return {dotted key: value} of nested tables."""
    result = {}
    for key, value in table.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_equal_trees_give_equal_bundles():
    """Catches: a time or an order in it, so that the same code would be a new app for each run."""
    assert build() == build()
