"""Write a section of settings as commented TOML, for `tsugiki config init` and `tsugiki site init`."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from typing import Any

import tomli_w
from pydantic_core import PydanticUndefined

from tsugiki.common.settings import Section

_WIDTH = 100


def commented_table(
    name: str, section: type[Section], shown: Mapping[str, Any] | None = None, active: Collection[str] | None = None
) -> str:
    """Return a TOML table with every setting of a section below its description.

    Settings that are sections themselves follow as tables of their own.

    Args:
        name: the table's name, such as "privacy.examples".
        section: the class of the settings.
        shown: values to write instead of the defaults, by key.
        active: keys of the settings that take effect; they come first. None: all. The line of any other setting
            begins with "#", that of a description with "# ".
    """
    values = shown or {}
    optional = set() if active is None else set(section.model_fields) - set(active)
    paragraphs = [f"[{name}]\n{comment(_first_paragraph(section))}".rstrip("\n")]
    tables = []
    # Settings that take effect come first. The sort is stable, so both groups keep the order of the class.
    for key, field in sorted(section.model_fields.items(), key=lambda item: item[0] in optional):
        if isinstance(field.default, Section):
            tables.append(commented_table(f"{name}.{key}", type(field.default)))
            continue
        default = "" if field.default is PydanticUndefined else field.default
        mark = "#" if key in optional else ""
        value = toml_value(values.get(key, default))
        paragraphs.append(f"{comment(str(field.description))}{mark}{key} = {value}")
    return "\n".join(["\n\n".join(paragraphs) + "\n", *tables])


def _first_paragraph(section: type[Section]) -> str:
    return (section.__doc__ or "").partition("\n\n")[0]


def comment(text: str) -> str:
    """Return a text as lines of a TOML comment."""
    lines = textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def toml_value(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, Mapping):
        if not value:
            return "{}"
        pairs = [f"{toml_key(key)} = {toml_value(inner)}" for key, inner in value.items()]
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def toml_key(key: str) -> str:
    """Return a key as TOML, in quotes if it needs them."""
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
