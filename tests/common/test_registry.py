"""The one registry."""

import pytest

from tsugiki.common.errors import RegistryError
from tsugiki.common.registry import Registry


@pytest.fixture
def shapes():
    """A registry with two entries, entered against the order of the alphabet."""
    registry = Registry("shape")
    registry.register("square")(4)
    registry.register("circle")(0)
    return registry


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
