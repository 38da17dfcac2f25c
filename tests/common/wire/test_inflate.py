"""From objects to a message, with objects that a hostile sender might make."""

import json
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id

from tsugiki.common.errors import WireError
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.inflate import inflate


def objects(size=1000):
    """Return (id, {id: content}) of a message with an array."""
    identify_process()
    array = ArrayRecord({"x": Array(np.arange(size, dtype=np.float32))})
    message = Message(RecordDict({"r": ConfigRecord({"a": 1}), "arrays": array}), 5, "train")
    return message.object_id, {key: one.deflate() for key, one in get_all_nested_objects(message).items()}


def refusal(object_id, contents, most_bytes=1_000_000):
    """Return the code with which objects are refused."""
    with pytest.raises(WireError) as caught:
        inflate(object_id, contents, most_bytes)
    return caught.value.code


def test_a_message_comes_out_as_it_went_in():
    """Catches: a size that counts headers and refuses a whole adapter; contents used up on the way."""
    object_id, contents = objects()
    for _ in range(2):
        message = inflate(object_id, contents, 4000 + 256)  # and the headers of array and chunk
        assert message.content["arrays"]["x"].numpy().tolist() == list(range(1000))
    assert refusal(object_id, contents, 4000) == "size"


def test_a_chunk_named_again_and_again_is_not_put_together():
    """Catches: a reply of 300 kB that becomes gigabytes in the server's memory before anybody looks at it."""
    object_id, contents = objects(25_000)
    (array_id,) = [key for key, content in contents.items() if content.startswith(b"Array ")]
    head, body = contents[array_id].split(b"\x00", 1)
    meta = json.loads(body)
    meta["arraychunk_ids"] = [0] * 50_000
    bigger = json.dumps(meta).encode()
    words = head.split(b" ")
    forged = b" ".join([words[0], words[1], str(len(bigger)).encode()]) + b"\x00" + bigger
    old, new = array_id.encode(), get_object_id(forged).encode()
    swapped = {key: content.replace(old, new) for key, content in contents.items()}
    swapped[get_object_id(forged)] = forged
    tracemalloc.start()
    try:
        assert refusal(object_id, swapped) == "size"
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"Message  0\x00", b"Array x 3\x00{{{", b"Nothing  1\x00a", b"\xff" * 40]
)
def test_what_is_no_message_is_refused(content):
    """Catches: Flower's own exceptions, of any kind, that end the server or the node."""
    object_id, contents = objects()
    assert refusal(object_id, dict.fromkeys(contents, content)) == "decode"
    assert refusal(object_id, {}) == "decode"


def test_another_object_than_a_message_is_refused():
    """Catches: an array in the place of a reply."""
    _, contents = objects()
    (array_id,) = [key for key, content in contents.items() if content.startswith(b"Array ")]
    assert refusal(array_id, contents) == "decode"
