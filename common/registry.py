"""One registry pattern for everything that is chosen by name: tasks, adapter methods, strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from tsugiki.common.errors import RegistryError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and the classes behind them. A folder registers its modules by importing them.

    Example:
        >>> SHAPES: Registry[type] = Registry("shape")
        >>> @SHAPES.register("circle")
        ... class Circle: ...
        >>> SHAPES.names()
        ('circle',)
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its class under `name`.

        Raises:
            RegistryError: the name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise RegistryError(f"{self.kind} {name!r} is registered twice", "one class for each name")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return what is registered under `name`.

        Raises:
            RegistryError: nothing is; the message lists what is.
        """
        if name not in self._entries:
            raise RegistryError(f"unknown {self.kind} {name!r}", f"one of {', '.join(self.names())}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        return tuple(sorted(self._entries))
