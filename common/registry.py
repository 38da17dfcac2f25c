"""One registry pattern for everything that is chosen by name: tasks, adapter methods, strategies.

Installed packages can add entries of their own, by the entry points in their metadata.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from tsugiki.common.errors import RegistryError

T = TypeVar("T")

log = logging.getLogger("tsugiki")


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed package.

    Args:
        package: the name and version of its distribution.
        entry: the name of the entry point and what it points to, as in "trimmed = acme.strategies".
        problem: why it could not be loaded; empty where it was loaded.
    """

    package: str
    entry: str
    problem: str = ""


class Registry(Generic[T]):
    """Names and the classes behind them. A folder registers its modules by importing them.

    Args:
        kind: the kind of entry, as messages name it.
        group: the group of entry points by which installed packages add to it; empty: they cannot.
        base: the class that every entry is derived from; None: entries are not checked.

    Example:
        >>> SHAPES: Registry[type] = Registry("shape")
        >>> @SHAPES.register("circle")
        ... class Circle: ...
        >>> SHAPES.names()
        ('circle',)
    """

    def __init__(self, kind: str, group: str = "", base: type | None = None) -> None:
        self.kind = kind
        self._group = group
        self._base = base
        self._entries: dict[str, T] = {}
        self._plugins: tuple[Plugin, ...] | None = None
        if group:
            _EXTENSIBLE.append(self)

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its class under `name`.

        Raises:
            RegistryError: `name-taken`; `entry-invalid`, the class is incomplete or of another kind.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                problem = f"{self.kind} {name!r} is registered twice"
                raise RegistryError(problem, "one class for each name", code="name-taken")
            if self._base is not None:
                _check(self.kind, name, entry, self._base)
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the entry that is registered under `name`.

        Raises:
            RegistryError: there is none; the message lists all names.
        """
        self.plugins()
        if name not in self._entries:
            raise RegistryError(f"unknown {self.kind} {name!r}", self.expected())
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        self.plugins()
        return tuple(sorted(self._entries))

    def expected(self) -> str:
        """Return the known names as words for a message, and the packages that could not be loaded."""
        broken = [f"; {one.package} could not be loaded: {one.problem}" for one in self.plugins() if one.problem]
        return f"one of {', '.join(self.names())}" + "".join(broken)

    def plugins(self) -> tuple[Plugin, ...]:
        """Return the entry points of installed packages, by package.

        The first call loads them. By then all modules of this program can be imported: a package may use any of them.
        """
        if self._plugins is None:
            self._plugins = ()  # a package that asks for names while it is imported must not start this again
            # The other groups first. A package that fails is taken out of all registries, and what it asked others to
            # load must not go with it.
            for other in list(_EXTENSIBLE):
                other.plugins()
            if self._group:
                self._plugins = tuple(self._load(found) for found in _installed(self._group))
        return self._plugins

    def _load(self, found: EntryPoint) -> Plugin:
        """Import an entry point. If it cannot be loaded, this is reported, and nothing of it stays registered."""
        package = _package(found)
        entry = f"{found.name} = {found.value}"
        before = [(registry, dict(registry._entries)) for registry in _EXTENSIBLE]
        try:
            loaded: Any = found.load()
            # A module has registered its classes by now, and a decorator may have registered a class.
            is_class = isinstance(loaded, type)
            if is_class and loaded not in self._entries.values():
                self.register(getattr(loaded, "name", ""))(loaded)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # another's module may fail in any way
            for registry, entries in before:
                registry._entries = entries
            problem = error.problem if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
            problem = " ".join(problem.split())[:200]
            log.warning("%s is left out: its %s (%s) could not be loaded: %s", package, self.kind, entry, problem)
            return Plugin(package, entry, problem)
        return Plugin(package, entry)


_EXTENSIBLE: list[Registry[Any]] = []
"""All registries that packages can add to. A module may add to several, and fail after the first."""


def _installed(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, in the same order on every machine: the first one of a name is kept."""
    return sorted(entry_points(group=group), key=lambda found: (_package(found), found.name, found.value))


def _package(found: EntryPoint) -> str:
    return f"{found.dist.name} {found.dist.version}" if found.dist else "an unknown package"


def _check(kind: str, name: str, entry: Any, base: type) -> None:
    """Check that a class is complete: the program would otherwise fail later, and elsewhere."""
    if not (isinstance(entry, type) and issubclass(entry, base)):
        problem = f"no subclass of {base.__name__}"
    elif inspect.isabstract(entry):
        problem = "abstract: it lacks a method"
    elif getattr(entry, "name", "") != name:
        problem = f"called {getattr(entry, 'name', '')!r} by its own attribute `name`"
    elif not hasattr(entry, "Settings"):
        problem = "without a class `Settings`"
    else:
        return
    problem = f"the {kind} {name!r} is {problem}"
    raise RegistryError(
        problem, f"a subclass of {base.__name__} with all its methods and this name", code="entry-invalid"
    )
