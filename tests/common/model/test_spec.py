"""Specs: which tensors belong to heads, and what makes two specs differ."""

from dataclasses import replace

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.model.spec import make_spec
from tsugiki.common.tasks import TASKS

SHAPES = {"bert.up.weight": (2, 3), "classifier.bias": (2,), "bert.classifiers.weight": (4,), "a.classifier.x": (5,)}


def spec(agreed=None, shapes=None, **settings):
    """Return the spec of a classifier's bottlenecks."""
    task, method = TASKS.get("sequence-classification"), ADAPTERS.get("houlsby")
    made = task(task.Settings()), method(method.Settings(**settings))
    return make_spec(*made, agreed or {}, "0" * 64, shapes or SHAPES, ("classifier",))


def test_heads_are_told_by_whole_names():
    """Catches: a module of the base whose name begins like a head's; a wrapped head left out; order by chance."""
    found = spec()
    assert [one.name for one in found.tensors] == sorted(SHAPES)
    assert {one.name for one in found.tensors if one.part == "head"} == {"classifier.bias", "a.classifier.x"}
    assert (found.parameters("adapter"), found.parameters("head")) == (10, 7)
    assert spec(shapes=dict(reversed(SHAPES.items()))) == found


def test_settings_and_what_is_agreed_on_count():
    """Catches: sites with another nonlinearity or reward, whose tensors have the same shapes, in one run."""
    several = (spec(), spec(activation="relu"), spec({"reward_sha256": "ab"}), replace(spec(), base_fingerprint="1"))
    assert len({one.sha256 for one in several}) == 4
