"""From the objects of an uploaded message back to the message, within bounds.

Flower cuts arrays into chunks and lists, in the array's own object, which chunk comes when. The list is the sender's: a
few kilobytes of it can name one chunk so often that gigabytes come out. So the sum is made before anything is inflated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tsugiki.common.errors import WireError
from tsugiki.common.wire.flower import chunk_ids, inflate_object

if TYPE_CHECKING:
    from flwr.app import Message


def inflate(object_id: str, contents: Mapping[str, bytes], most_bytes: int) -> Message:
    """Return the message whose objects these are.

    Args:
        object_id: of the message itself.
        contents: all its objects.
        most_bytes: what its arrays may have in all.

    Raises:
        WireError: `size`; or `decode`, for whatever a malformed object makes Flower raise.
    """
    from flwr.app import Message

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
