"""Measure the structure of the code: import circles, rooms, floors, upward arrows; and the density of its lines.

    python scripts/structure.py             a table of rooms, then the figures, one JSON object for each
    python scripts/structure.py --circles   also draw each circle

A *room* is a module or folder at the top level of `common/`, `client/` or `server/`. A room has an arrow to each room
that one of its modules imports. Each room is on a *floor* above all rooms that it imports. If rooms import each other
in a circle, no such order exists; then the order with the fewest *arrows upwards* is used.

All imports count, also those inside functions and those for annotations only. The modules are parsed with `ast`, not
imported.

Density is measured on lines of code, without blank lines and docstrings. Twelve codebases that read well (httpx, trio,
grain, attrs and others) have 24 to 40 characters a line, 0.1 to 2.7 packed assignments (`a, b = x, y`) and 2 to 15
conditional expressions in 1,000 lines, and 2 to 15 comments in 100.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tsugiki", "common", "client", "server")
_TARGETS = {"circles": 0, "server rooms": 13, "server arrows up": 0, "common floors": 6}
_MOST_TRIED = 8
"""The largest circle whose rooms are tried in all orders. In a larger one, the rooms that import most come last."""

Graph = Mapping[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return all modules of the project by their import names."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts if folder == "tsugiki" else ("tsugiki", *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, source: str, known: Iterable[str]) -> set[str]:
    """Return the modules of the project that a module imports, anywhere in it.

    Args:
        name: of the module.
        source: its text.
        known: names of all modules.
    """
    known = set(known)
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from package import name` takes the module `package.name`, or a name out of the package itself
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else str(node.module))
    return (found & known) - {name}


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Return the modules that each module imports, by name."""
    named = modules(root)
    return {name: imports(name, path.read_text("utf-8"), named) for name, path in named.items()}


def circles(edges: Graph) -> list[list[str]]:
    """Return the strongly connected components of two or more nodes, sorted (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


def drawn(circle: Iterable[str], edges: Graph) -> str:
    """Return a shortest path around a circle, as "a -> b -> a"."""
    members = set(circle)
    start = min(members)
    ways = [[start]]
    while True:
        way = ways.pop(0)
        for other in sorted(edges[way[-1]] & members):
            if other == start:
                return " -> ".join([*way, start])
            if other not in way:
                ways.append([*way, other])


def rooms(side: str, edges: Graph) -> dict[str, set[str]]:
    """Return the other rooms of a folder that each of its rooms imports."""

    def room(name: str) -> str:
        parts = name.split(".")
        return parts[2] if parts[:2] == ["tsugiki", side] and len(parts) > 2 else ""

    found: dict[str, set[str]] = {}
    for name, others in edges.items():
        if own := room(name):
            found.setdefault(own, set())
            found[own] |= {room(other) for other in others} - {"", own}
    return found


def arrows_up(arrows: Graph) -> list[tuple[str, str]]:
    """Return the upward arrows, for the order of rooms that has the fewest of them."""
    found = []
    for circle in circles(arrows):
        inside = {room: arrows[room] & set(circle) for room in circle}
        busiest = tuple(sorted(circle, key=lambda room: len(inside[room])))
        orders: Iterator[tuple[str, ...]] = permutations(circle) if len(circle) <= _MOST_TRIED else iter([busiest])
        best = min((_upwards(order, inside) for order in orders), key=len)
        found += best
    return sorted(found)


def _upwards(order: tuple[str, ...], arrows: Graph) -> list[tuple[str, str]]:
    """Return the arrows from a room to a later one in this order."""
    place = {room: number for number, room in enumerate(order)}
    return [(room, other) for room in order for other in arrows[room] if place[other] > place[room]]


def floors(arrows: Graph) -> dict[str, int]:
    """Return the floor of each room, counted from 1. Upward arrows are ignored."""
    up = set(arrows_up(arrows))
    down = {room: {other for other in others if (room, other) not in up} for room, others in arrows.items()}
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max((level(other) for other in down[room]), default=0)
        return levels[room]

    for room in down:
        level(room)
    return levels


def figures(root: Path = ROOT) -> dict[str, int]:
    """Return the numbers of modules, circles, rooms, floors and upward arrows, by name."""
    edges = graph(root)
    found = {"modules": len(edges), "circles": len(circles(edges))}
    for side in FOLDERS[1:]:
        arrows = rooms(side, edges)
        found[f"{side} rooms"] = len(arrows)
        found[f"{side} floors"] = max(floors(arrows).values())
        found[f"{side} arrows up"] = len(arrows_up(arrows))
    return found


def density(source: str) -> dict[str, int]:
    """Return the numbers of lines, characters, packed assignments, conditional expressions and comments of a module."""
    docstrings: set[int] = set()
    found = {"lines": 0, "characters": 0, "packed": 0, "conditional": 0, "comments": 0}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.Assign):
            found["packed"] += isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        found["conditional"] += isinstance(node, ast.IfExp)
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in docstrings]
    lines = [line for line in lines if line]
    found["lines"] = len(lines)
    found["characters"] = sum(map(len, lines))
    for token in tokenize.tokenize(io.BytesIO(source.encode()).readline):
        marks = ("# noqa", "# type: ignore")  # for tools, not for readers
        found["comments"] += token.type == tokenize.COMMENT and not token.string.startswith(marks)
    return found


def densities(root: Path = ROOT) -> dict[str, float]:
    """Return the density of all modules except the demo's clauses, which are prose."""
    counted = [density(path.read_text("utf-8")) for path in modules(root).values() if "clauses" not in path.name]
    total = {name: sum(one[name] for one in counted) for name in counted[0]}
    lines = total["lines"]
    return {
        "characters a line": total["characters"] / lines,
        "packed assignments in 1,000 lines": 1000 * total["packed"] / lines,
        "conditional expressions in 1,000 lines": 1000 * total["conditional"] / lines,
        "comments in 100 lines": 100 * total["comments"] / lines,
    }


def main() -> None:
    """Print the rooms with their arrows, then all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circles", action="store_true", help="draw each circle of imports")
    arguments = parser.parse_args()
    edges = graph()
    if arguments.circles:
        for circle in circles(edges):
            print(f"circle of {len(circle)}: {drawn(circle, edges)}")
    for side in FOLDERS[1:]:
        arrows = rooms(side, edges)
        for name, floor in sorted(floors(arrows).items(), key=lambda one: (-one[1], one[0])):
            print(f"{side:7} floor {floor:2}  {name:16} -> {', '.join(sorted(arrows[name]))}")
        for room, other in arrows_up(arrows):
            print(f"{side:7} upwards   {room} -> {other}")
    for name, value in {**figures(), **densities()}.items():
        target = _TARGETS.get(name)
        holds = None if target is None else value <= target
        print(json.dumps({"name": name, "value": round(value, 1), "unit": "", "target": target, "holds": holds}))


if __name__ == "__main__":
    main()
