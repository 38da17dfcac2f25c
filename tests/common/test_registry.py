"""The one registry."""

import sys
import textwrap

import pytest

from tsugiki.common import registry
from tsugiki.common.errors import RegistryError
from tsugiki.common.registry import Plugin, Registry


@pytest.fixture
def shapes():
    """A registry with two entries, entered against the order of the alphabet."""
    found = Registry("shape")
    found.register("square")(4)
    found.register("circle")(0)
    return found


def test_register_get_names(shapes):
    """Catches: names in the order of imports, which differs between machines; the decorator eating its class."""
    assert shapes.names() == ("circle", "square")
    assert shapes.get("square") == 4

    @shapes.register("triangle")
    class Triangle:
        """A class like any other."""

    assert shapes.get("triangle") is Triangle


def test_a_second_entry_is_refused_and_the_first_stays(shapes):
    """Catches: the last import silently winning."""
    with pytest.raises(RegistryError, match=r"Shape 'circle' is registered twice"):
        shapes.register("circle")(1)
    assert shapes.get("circle") == 0


def test_a_miss_lists_what_is_there(shapes):
    """Catches: a bare KeyError; a message that leaves the reader guessing."""
    with pytest.raises(RegistryError, match=r"Unknown shape 'ring'\. Expected one of circle, square") as caught:
        shapes.get("ring")
    assert (caught.value.code, caught.value.exit_status) == ("unknown-name", 2)


def test_registries_share_nothing():
    """Catches: entries kept on the class."""
    first, second = Registry("shape"), Registry("shape")
    first.register("circle")(0)
    assert second.names() == ()


class Shape:
    """What the packages below derive their classes from; `known` is the registry of the test."""

    Settings = dict


def package(folder, name, module, group="toy.shapes", **entries):
    """Write an installed package: one module, and the entry points of its metadata."""
    slug = name.replace("-", "_")
    info = folder / f"{slug}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {target}" for entry, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    (folder / f"{slug}.py").write_text(textwrap.dedent(module))


@pytest.fixture
def extensible(tmp_path, monkeypatch):
    """A registry with one entry that packages in a folder can add to, and the folder."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_EXTENSIBLE", [])
    found = Registry("shape", "toy.shapes", Shape)
    found.register("circle")(type("Circle", (Shape,), {"name": "circle"}))
    monkeypatch.setattr(Shape, "known", found, raising=False)
    yield found, tmp_path
    for name in [name for name in sys.modules if name.startswith("toy_shapes_")]:
        del sys.modules[name]


RING = """
from tests.common.test_registry import Shape

class Ring(Shape):
    name = "ring"
"""
REGISTERED = RING.replace("class Ring", "@Shape.known.register('ring')\nclass Ring")


@pytest.mark.parametrize(
    ("module", "target"),
    [
        (RING, "toy_shapes_a:Ring"),
        (REGISTERED, "toy_shapes_a"),
        (REGISTERED, "toy_shapes_a:Ring"),
    ],
)
def test_an_installed_package_adds_an_entry(extensible, module, target):
    """Catches: entry points that nobody reads; a class that its decorator and its entry point register twice."""
    shapes, folder = extensible
    package(folder, "toy-shapes-a", module, ring=target)
    assert shapes.names() == ("circle", "ring")
    assert shapes.get("ring").__module__ == "toy_shapes_a"
    assert shapes.plugins() == (Plugin("toy-shapes-a 1.0", f"ring = {target}"),)


def test_packages_are_loaded_once_and_late(extensible):
    """Catches: a package imported in the middle of this program's own imports, or again for every name."""
    shapes, folder = extensible
    package(folder, "toy-shapes-a", RING, ring="toy_shapes_a:Ring")
    assert "toy_shapes_a" not in sys.modules
    first = shapes.get("ring")
    del sys.modules["toy_shapes_a"]
    assert shapes.get("ring") is first
    assert "toy_shapes_a" not in sys.modules


BROKEN = {
    "an import": ("import no_such_library", "toy_shapes_a", "ModuleNotFoundError: No module named 'no_such_library'"),
    "an exit": ("raise SystemExit('gone')", "toy_shapes_a", "SystemExit: gone"),
    "a name that is taken": (RING.replace('"ring"', '"circle"'), "toy_shapes_a:Ring", "'circle' is registered twice"),
    "another class": (RING.replace("(Shape)", ""), "toy_shapes_a:Ring", "no subclass of Shape"),
    "another name": (REGISTERED.replace("'ring'", "'torus'"), "toy_shapes_a", "called 'ring'"),
    "an abstract class": (
        RING.replace("(Shape)", "(Shape, metaclass=__import__('abc').ABCMeta)")
        + "    @__import__('abc').abstractmethod\n    def area(self): ...\n",
        "toy_shapes_a:Ring",
        "abstract",
    ),
    "the second class of a module": (REGISTERED + "\nraise ValueError('half way')", "toy_shapes_a", "half way"),
    "no such attribute": (RING, "toy_shapes_a:Torus", "AttributeError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_reported_and_left_out(extensible, caplog, case):
    """Catches: a program that goes down with a foreign package, or goes on without a word; half of it registered."""
    shapes, folder = extensible
    module, target, problem = BROKEN[case]
    circle = shapes._entries["circle"]
    package(folder, "toy-shapes-a", module, ring=target)
    package(folder, "toy-shapes-b", RING.replace('"ring"', '"oval"'), oval="toy_shapes_b:Ring")
    assert shapes.names() == ("circle", "oval")
    assert shapes.get("circle") is circle
    broken, whole = shapes.plugins()
    assert problem in broken.problem
    assert not whole.problem
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("toy-shapes-a 1.0 is left out")
    assert problem in line
    with pytest.raises(RegistryError, match=r"one of circle, oval; toy-shapes-a 1\.0 could not be loaded") as caught:
        shapes.get("ring")
    assert problem in str(caught.value)


def test_a_broken_package_takes_nothing_of_another_group_with_it(extensible, monkeypatch):
    """Catches: plugins that are gone, and called whole, because a broken one had asked for their names."""
    shapes, folder = extensible
    colours = Registry("colour", "toy.colours", Shape)
    monkeypatch.setattr(Shape, "colours", colours, raising=False)
    package(folder, "toy-shapes-b", RING, group="toy.colours", ring="toy_shapes_b:Ring")
    asks = "from tests.common.test_registry import Shape\nShape.colours.names()\nraise ValueError('gone')"
    package(folder, "toy-shapes-a", asks, ring="toy_shapes_a")
    assert shapes.names() == ("circle",)
    assert "gone" in shapes.plugins()[0].problem
    assert colours.names() == ("ring",)
    assert not colours.plugins()[0].problem


def test_of_two_packages_with_one_name_the_first_by_name_stays(extensible):
    """Catches: an order of folders or of time, by which two machines would run two classes under one name."""
    shapes, folder = extensible
    for letter in "ba":
        package(folder, f"toy-shapes-{letter}", RING, ring=f"toy_shapes_{letter}:Ring")
    assert shapes.get("ring").__module__ == "toy_shapes_a"
    assert [bool(one.problem) for one in shapes.plugins()] == [False, True]


def test_what_a_package_adds_elsewhere_goes_with_it(extensible, tmp_path):
    """Catches: a package that is left out, half of which stays in another registry."""
    shapes, folder = extensible
    others = Registry("other shape", "toy.others", Shape)
    Shape.known = others
    package(folder, "toy-shapes-a", REGISTERED + "\nraise ValueError('half way')", ring="toy_shapes_a")
    assert shapes.names() == ("circle",)
    assert others.names() == ()


@pytest.mark.parametrize(
    ("entry", "code"), [("ring", "entry-invalid"), (type("Ring", (Shape,), {"name": "circle"}), "name-taken")]
)
def test_refused_entries_have_codes(extensible, entry, code):
    """Catches: an error that its reader cannot look up."""
    with pytest.raises(RegistryError) as caught:
        extensible[0].register("circle" if code == "name-taken" else "ring")(entry)
    assert caught.value.code == code
