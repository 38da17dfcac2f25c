"""From the objects of an uploaded message back to the message, within bounds.

Flower cuts arrays into chunks and lists, in the array's own object, which chunk comes when. The list is the sender's: a
few kilobytes of it can name one chunk so often that gigabytes come out. So the sum is made before anything is inflated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tsugiki.common.errors import WireError

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
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    try:
        size = _array_bytes(contents)
        message = inflate_object_from_contents(object_id, dict(contents)) if size <= most_bytes else None
    except Exception as error:
        raise WireError("an upload that is no message", "one of Flower's", code="decode") from error
    if size > most_bytes:
        raise WireError(f"arrays of {size} bytes in a message", f"at most {most_bytes}", code="size")
    if not isinstance(message, Message):
        raise WireError("an upload of another kind", "a message", code="decode")
    return message


def _array_bytes(contents: Mapping[str, bytes]) -> int:
    """Return the bytes that all arrays would have, from their lists of chunks."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_body,
        get_object_head_values_from_object_content,
    )

    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            chosen = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[index]]) for index in chosen)
    return total
