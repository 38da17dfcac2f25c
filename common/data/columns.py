"""A column that a task reads from a site's file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A column that a task reads from a site's file.

    Args:
        name: the task's name for the column; a file's column is mapped to it.
        kind: `text`; `label`, a class by name or number; `score`, a float; `image`, a picture.
        required: whether every file must have the column.
        blank: whether a text may be empty.
    """

    name: str
    kind: Literal["text", "label", "score", "image"]
    required: bool = True
    blank: bool = False
