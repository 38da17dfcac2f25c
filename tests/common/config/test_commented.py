"""Sections of settings as commented TOML."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from tsugiki.common.config.commented import commented_table, toml_key, toml_value
from tsugiki.common.settings import Names, Section

LONG = "A description of a setting that is so long that it takes " + "more and " * 20 + "more lines."


class Inner(Section):
    """A table of its own."""

    depth: int = Field(default=1, description="How deep.")


class Outer(Section):
    """What it is about.

    Not for the file.
    """

    optional: Names = Field(default=("*",), description="Some names.")
    needed: str = Field(description=LONG)
    inner: Inner = Field(default=Inner(), description="A section in a section.")


def test_each_setting_is_below_its_description():
    """Catches: a description at another setting, cut off, or too wide; a nested section written as a value."""
    lines = commented_table("outer", Outer, {"needed": "x"}).splitlines()
    assert lines[:5] == ["[outer]", "# What it is about.", "", "# Some names.", 'optional = ["*"]']
    described = lines[6 : lines.index('needed = "x"')]
    assert len(described) > 1
    assert max(map(len, described)) <= 100
    assert " ".join(line.removeprefix("# ") for line in described) == LONG
    assert lines[-5:] == ["[outer.inner]", "# A table of its own.", "", "# How deep.", "depth = 1"]


def test_optional_settings_are_commented_out_and_come_last():
    """Catches: an active setting that is to be optional, or the other way round; one in the middle of the others."""
    text = commented_table("outer", Outer, {"needed": "x", "optional": ["a", "b"]}, active=["needed"])
    assert tomllib.loads(text)["outer"] == {"needed": "x", "inner": {"depth": 1}}
    assert text.index("needed =") < text.index('#optional = ["a", "b"]')


@pytest.mark.parametrize("value", [True, 3, 1e-07, "", 'a "quoted", \\ name', [], ["a", "b"], {}, {"a b": "c", "d": 1}])
def test_values_can_be_read_back_from_one_line(value):
    """Catches: a list or a table over several lines, which a comment sign would cut; quotes that are not escaped."""
    text = toml_value(value)
    assert "\n" not in text
    assert tomllib.loads(f"value = {text}") == {"value": value}


@given(st.text(max_size=20))
def test_keys_and_texts_can_be_read_back(text):
    """Catches: a model's name with a slash or a dot written as a bare key."""
    assert tomllib.loads(f"{toml_key(text)} = {toml_value(text)}") == {text: text}
