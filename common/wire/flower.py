"""The private parts of Flower that both sides need. Unlike its public names, they may change in any release.

The other files that use private parts are named in tests/test_architecture.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

MOST_CALL_BYTES = 2**26
"""Most bytes of one gRPC call. Flower cuts objects that are larger than 5 MB."""
CALL_OPTIONS = (
    ("grpc.max_send_message_length", MOST_CALL_BYTES),
    ("grpc.max_receive_message_length", MOST_CALL_BYTES),
    ("grpc.per_message_decompression", 0),  # a few compressed bytes may stand for gigabytes
)
"""gRPC's options of servers and clients."""


def identify_process(run_id: int = 1, node_id: int = 1, task_id: int = 1) -> None:
    """Give this process the identity that Flower reads when a Message is made outside Flower's own processes."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = task_id


def set_message_id(message: Message, message_id: str) -> None:
    """Set the id of a message, as Flower's own grids do: its metadata has no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def inflate_object(object_id: str, contents: Mapping[str, bytes]) -> object:
    """Return the Flower object with this id, made from the bytes of all its objects. Flower may raise any exception."""
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    inflated: object = inflate_object_from_contents(object_id, dict(contents))
    return inflated


def objects_of(content: RecordDict) -> dict[str, bytes]:
    """Return the bytes of all objects that a message's content consists of, by id; `inflate_object` reads them."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return {object_id: one.deflate() for object_id, one in get_all_nested_objects(content).items()}


def chunk_ids(content: bytes) -> list[str]:
    """Return the ids of an array's chunks, in order and with repetitions; empty if the object is not an array."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_body,
        get_object_head_values_from_object_content,
    )

    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind != Array.__qualname__:
        return []
    chosen = json.loads(get_object_body(content, Array))["arraychunk_ids"]
    return [children[index] for index in chosen]
