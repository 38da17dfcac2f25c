"""Rebuild an uploaded message from its objects, within a limit on its size.

Flower cuts arrays into chunks, and lists their order in the array's own object. The sender writes this list: in a few
kilobytes, it can name one chunk again and again, until the array has gigabytes. So the sizes are added up before
anything is inflated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tsugiki.common.errors import WireError
from tsugiki.common.wire.flower import chunk_ids, inflate_object

if TYPE_CHECKING:
    from flwr.app import Message


def inflate(object_id: str, contents: Mapping[str, bytes], most_bytes: int) -> Message:
    """Return the message that consists of these objects.

    Args:
        object_id: id of the message itself.
        contents: the bytes of all its objects, by id.
        most_bytes: the most bytes that all its arrays together may have.

    Raises:
        WireError: `size`, the arrays are too large; `decode`, a malformed object made Flower raise an exception.
    """
    from flwr.app import Message

    # Malformed objects can make Flower raise any exception; all of them become one error.
    try:
        size = _array_bytes(contents)
        message = inflate_object(object_id, contents) if size <= most_bytes else None
    except Exception as error:
        raise WireError("the upload is no message", "a message of Flower", code="decode") from error
    if size > most_bytes:
        raise WireError(f"the arrays of a message have {size} bytes", f"at most {most_bytes}", code="size")
    if not isinstance(message, Message):
        raise WireError("the upload is of another kind", "a message", code="decode")
    return message


def _array_bytes(contents: Mapping[str, bytes]) -> int:
    """Return the bytes that all arrays would have, from their lists of chunks."""
    return sum(len(contents[chunk]) for content in contents.values() for chunk in chunk_ids(content))
