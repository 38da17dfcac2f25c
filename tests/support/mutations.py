"""Hostile variants of valid inputs, for the fuzz targets: bytes, JSON values, lines of TOML, and fields of records."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

DEPTH = 3000
"""Brackets that are deeper than Python's parsers and functions may recurse."""


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**400, -0.0, 0.5, 1e308, 1e-308, math.nan, math.inf, -math.inf)
_TEXTS = ("", "\x00", "\ud800", "../../x", "é" * 300, "0", "nan", "x" * 70_000, "2026-01-01", "${HOME}", "~", "{", "[")
JSON_VALUES = st.sampled_from(
    [None, True, False, *_NUMBERS, *_TEXTS, [], {}, [[]], [None], {"": None}, _nested(5), [0] * 1000]
)
FIELD_VALUES = st.one_of(
    st.sampled_from([*_NUMBERS, *_TEXTS, True, b"", b"\x00" * 64, [], [True], [b""], ["a", "a"], [0] * 1000]),
    st.binary(max_size=160),
    st.text(max_size=40),
    st.lists(st.text(max_size=8), max_size=4),
    st.lists(st.binary(max_size=100), max_size=4),
    st.lists(st.integers(), max_size=4),
)
"""What Flower's `ConfigRecord` takes."""

_TOML_WORDS = "nan -inf -1 0 9223372036854775807 1e400 true [] {} [[]] {a=1} [1,'a'] '' '../x' 1979-05-27 07:32:00"
_TOML_VALUES = st.sampled_from(
    [
        *_TOML_WORDS.split(),
        '"\\ud800"',
        '"\\u0000"',
        "[" * DEPTH,
        f"'{'x' * 70_000}'",
        "9" * 5000,
        "0x",
        '"""',
        "2026-01-01T00:00:00Z",
        "['a', 'a']",
    ]
)


@st.composite
def mutated_bytes(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds after up to three changes: cut, flipped, doubled, inserted, or with a huge number."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 24)))
        kind = draw(st.sampled_from(["cut", "drop", "flip", "double", "insert", "huge", "zero"]))
        if kind == "cut":
            del content[start:]
        elif kind == "drop":
            del content[start:stop]
        elif kind == "double":
            content[start:start] = content[start:stop] * draw(st.sampled_from([1, 2, 1000]))
        elif kind == "insert":
            content[start:start] = draw(st.binary(max_size=24))
        elif kind == "flip" and start < len(content):
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif kind in ("huge", "zero"):
            content[start:stop] = (b"\xff" if kind == "huge" else b"\x00") * (stop - start)
    return bytes(content)


@st.composite
def mutated_value(draw: st.DrawFn, seed: Any) -> Any:
    """Return a copy of a JSON value in which one place, at any depth, is replaced, dropped, added or doubled."""
    if isinstance(seed, dict) and seed and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(seed)))
        kind = draw(st.sampled_from(["inside", "inside", "inside", "drop", "add", "rename"]))
        rest = {name: value for name, value in seed.items() if name != key}
        if kind == "inside":
            return {**seed, key: draw(mutated_value(seed[key]))}
        if kind == "add":
            return {**seed, draw(st.sampled_from(["", "x", "name", "method", key + "s"])): draw(JSON_VALUES)}
        return rest if kind == "drop" else {**rest, "x": seed[key]}
    if isinstance(seed, list) and seed and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(seed) - 1))
        changed = draw(
            st.one_of(mutated_value(seed[index]).map(lambda one: [one]), st.just([]), st.just([seed[index]] * 2))
        )
        return [*seed[:index], *changed, *seed[index + 1 :]]
    return draw(JSON_VALUES)


def mutated_json(seed: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy of JSON texts: a changed value, changed bytes, or brackets without end."""
    text = json.dumps(seed).encode()
    values = mutated_value(seed)
    changed = st.recursive(values, lambda inner: inner.flatmap(mutated_value), max_leaves=3)
    deep = st.sampled_from([b"[" * DEPTH, b'{"a":' * DEPTH, b"[" * DEPTH + b"]" * DEPTH])
    written = changed.map(lambda value: json.dumps(value).encode())
    return st.one_of(written, mutated_bytes([text]), deep)


@st.composite
def mutated_toml(draw: st.DrawFn, seed: str) -> bytes:
    """Return a TOML text in which up to three lines have another value, are dropped, doubled or of another section."""
    lines = seed.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(lines) - 1))
        key, equals, _value = lines[index].partition("=")
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "double", "text", "table"]))
        if kind == "value" and equals:
            lines[index] = f"{key}= {draw(_TOML_VALUES)}"
        elif kind == "table":
            lines[index] = draw(
                st.sampled_from(["[site]", "[[data]]", "[x.y]", "[policy.tell]", "site = 1", "x.y.z = 1"])
            )
        elif kind == "text":
            lines[index] += draw(st.text(max_size=20))
        else:
            lines[index : index + 1] = [lines[index]] * (2 if kind == "double" else 0) or ["#"]
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return draw(st.one_of(st.just(text), mutated_bytes([text])))


@st.composite
def mutated_fields(draw: st.DrawFn, seed: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a record with up to two of them replaced, dropped, renamed or changed inside."""
    fields = dict(seed)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*sorted(fields), "more"]))
        value = fields.get(key)
        kind = draw(st.sampled_from(["replace", "drop", "inside", "inside", "rename"]))
        if kind == "inside" and isinstance(value, bytes):
            fields[key] = draw(mutated_bytes([value]))
        elif kind == "inside" and isinstance(value, list) and value:
            index = draw(st.integers(0, len(value) - 1))
            other = draw(mutated_bytes([value[index]])) if isinstance(value[index], bytes) else value[index - 1]
            fields[key] = draw(
                st.sampled_from([[*value[:index], other, *value[index + 1 :]], value[:index], value * 2])
            )
        elif kind in ("drop", "rename"):
            fields.pop(key, None)
            if kind == "rename" and value is not None:
                fields["renamed"] = value
        else:
            fields[key] = draw(FIELD_VALUES)
    return fields
