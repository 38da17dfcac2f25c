"""A column that a task reads from a site's file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Column:
    """A column that a task reads from a site's file.

    Args:
        name: the task's own name for it, to which a file's column is mapped.
        kind: `text`; `label`, a class by name or number; `score`, a float; `image`, a picture.
        required: whether every file must have it.
        blank: whether a text may be empty.
    """

    name: str
    kind: Literal["text", "label", "score", "image"]
    required: bool = True
    blank: bool = False
