"""What crosses the network, and what is done with bytes that nobody vouches for."""

import dataclasses
import hashlib
import io
import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tsugiki.common.errors import SpecError, WireError
from tsugiki.common.wire.arrays import (
    ARRAY_KEY,
    decode,
    decode_numbers,
    encode,
    encode_numbers,
    packed,
    packed_blocks,
)
from tsugiki.common.wire.spec import BLOCK, AdapterSpec, TensorSpec, l2_norm, pack, sha256, unpack

SHAPES = {"a.weight": (2, 3), "b.bias": (4,), "classifier.weight": (1, 2)}
TENSORS = tuple(TensorSpec(name, shape, "head" if "class" in name else "adapter") for name, shape in SHAPES.items())
SPEC = AdapterSpec("sequence-classification", "lora", '{"rank": 2}', "f" * 64, "float32", TENSORS)
HALF = dataclasses.replace(SPEC, wire_dtype="float16")
SIZE = 12

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = arrays(np.float32, SIZE, elements=finite)
each_type = pytest.mark.parametrize("spec", [SPEC, HALF], ids=["float32", "float16"])


def tensors(start=0.0):
    """Return named tensors that count up through the whole vector."""
    return unpack(np.arange(start, start + SIZE, dtype=np.float32), SPEC)


def received(data=None, *, dtype="float32", shape=(SIZE,), stype="numpy.ndarray", key=ARRAY_KEY):
    """Return a record as a site might have sent it."""
    good = npy(np.zeros(SIZE, np.float32))
    return ArrayRecord({key: Array(dtype, shape, stype, good if data is None else data)})


def npy(array, **options):
    """Return an array in NumPy's format."""
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def with_header(header, body=b"\0" * 48):
    """Return bytes in NumPy's format 1.0 with this text as the header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def code(record, spec=SPEC):
    """Return the code with which a record is refused."""
    with pytest.raises(WireError) as caught:
        decode(record, spec)
    assert caught.value.exit_status == 8
    return caught.value.code


def test_sizes():
    """Catches: heads counted as adapter parameters; bytes that forget the wire type."""
    assert (SPEC.size, SPEC.parameters("adapter"), SPEC.parameters("head")) == (12, 10, 2)
    assert (SPEC.size_bytes, HALF.size_bytes) == (48, 24)
    assert TensorSpec("scalar", (), "adapter").size == 1


def test_the_hash_covers_every_field():
    """Catches: two sides with different ranks, bases or tensor orders that take each other for equal."""
    other = {
        "task": "sentence-embedding",
        "method": "houlsby",
        "settings": '{"rank": 3}',
        "base_fingerprint": "e" * 64,
        "wire_dtype": "float16",
        "tensors": TENSORS[::-1],
    }
    assert set(other) == {field.name for field in dataclasses.fields(AdapterSpec)}
    hashes = {dataclasses.replace(SPEC, **{name: value}).sha256 for name, value in other.items()}
    for change in ({"name": "x"}, {"shape": (3, 2)}, {"part": "head"}):
        hashes.add(dataclasses.replace(SPEC, tensors=(dataclasses.replace(TENSORS[0], **change), *TENSORS[1:])).sha256)
    assert len(hashes | {SPEC.sha256}) == len(other) + 4
    assert dataclasses.replace(SPEC).sha256 == SPEC.sha256


@given(vectors)
def test_pack_undoes_unpack(vector):
    """Catches: another order of tensors, a transposed tensor."""
    assert pack(unpack(vector, SPEC), SPEC).tobytes() == vector.tobytes()


def test_the_order_is_the_specs():
    """Catches: the order of the dictionary, which differs between models and machines."""
    packed = pack(dict(reversed(tensors().items())), SPEC)
    assert packed.dtype == np.float32
    assert packed.tolist() == list(range(SIZE))


def test_packing_copies_and_unpacking_does_not():
    """Catches: an update that changes while the model trains on."""
    named = tensors()
    packed = pack(named, SPEC)
    named["b.bias"][:] = 99.0
    assert 99.0 not in packed
    unpack(packed, SPEC)["b.bias"][0] = 99.0
    assert packed[6] == 99.0
    one = dataclasses.replace(SPEC, tensors=TENSORS[1:2])
    assert not np.shares_memory(pack({"b.bias": named["b.bias"]}, one), named["b.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.bias": None}, "'b.bias' is missing"),
        ({"c": np.zeros(1, np.float32)}, "'c' is not part of the spec"),
        ({"b.bias": np.zeros((4, 1), np.float32)}, r"'b.bias' has shape \(4, 1\). Expected \(4,\)"),
        ({"a.weight": np.zeros((3, 2), np.float32)}, r"'a.weight' has shape \(3, 2\). Expected \(2, 3\)"),
    ],
)
def test_pack_refuses_other_tensors(change, message):
    """Catches: a transposed or missing tensor packed into the others' places."""
    named = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(SpecError, match=message):
        pack(named, SPEC)


@pytest.mark.parametrize("shape", [(SIZE - 1,), (SIZE + 1,), (SIZE, 1), (1, SIZE), ()])
def test_unpack_refuses_another_length(shape):
    """Catches: a vector that fills only some tensors, or one that broadcasts."""
    with pytest.raises(SpecError, match=r"Expected \(12,\)"):
        unpack(np.zeros(shape, np.float32), SPEC)


@given(vectors)
def test_float32_is_exact(vector):
    """Catches: any rounding or reordering on the way, -0.0 and subnormal numbers included."""
    assert decode(encode(vector, SPEC), SPEC).tobytes() == vector.tobytes()


@given(arrays(np.float32, SIZE, elements=st.floats(-6e4, 6e4, width=32)))
def test_float16_rounds_once(vector):
    """Catches: a second rounding; a vector that stays float16 behind the door."""
    back = decode(encode(vector, HALF), HALF)
    assert back.dtype == np.float32
    assert np.array_equal(back, vector.astype(np.float16))


@each_type
def test_one_array_as_small_as_it_can_be(spec):
    """Catches: an object for each tensor, each of which would be a round trip; overhead that grows with the size."""
    record = encode(np.ones(SIZE, np.float32), spec)
    assert list(record) == [ARRAY_KEY]
    assert len(record[ARRAY_KEY].data) == spec.size_bytes + 128


@given(vectors)
def test_a_packed_vector_travels_without_a_copy(vector):
    """Catches: a copy of the adapter for each round; a packed vector that travels as other bytes than a plain one."""
    found = packed(vector)
    assert found.tobytes() == vector.tobytes()
    data = encode(found, SPEC)[ARRAY_KEY].data
    assert data is found.base
    assert data == encode(vector, SPEC)[ARRAY_KEY].data


def test_packed_blocks_are_put_one_after_the_other():
    """Catches: a block at another place, a last block that is left out."""
    size = 2 * BLOCK + 7
    whole = np.random.default_rng(4).normal(size=size)
    assert np.array_equal(packed_blocks(size, lambda part: whole[part]), whole.astype(np.float32))


def test_a_part_of_a_packed_vector_is_not_taken_for_all_of_it():
    """Catches: the bytes of the whole in place of a slice's, or of a vector in bytes that have no header."""
    whole = packed(np.arange(SIZE + 4, dtype=np.float32))
    bare = np.frombuffer(np.arange(SIZE, dtype=np.float32).tobytes(), np.float32)
    for vector in (whole[4:], whole[:SIZE], bare):
        assert np.array_equal(decode(encode(vector, SPEC), SPEC), vector)


def test_half_precision_of_a_packed_vector():
    """Catches: float32 bytes under the name of float16."""
    vector = packed(np.linspace(-1, 1, SIZE, dtype=np.float32))
    assert np.array_equal(decode(encode(vector, HALF), HALF), vector.astype(np.float16))


@each_type
def test_what_was_decoded_can_be_written_to(spec):
    """Catches: a read-only view into the message."""
    vector = decode(encode(np.ones(SIZE, np.float32), spec), spec)
    vector += 1
    assert vector.flags.owndata


@pytest.mark.parametrize(
    ("spec", "value"),
    [(SPEC, math.nan), (SPEC, math.inf), (SPEC, -math.inf), (HALF, math.nan), (HALF, 65520.0), (HALF, -1e30)],
)
@pytest.mark.parametrize("position", [0, 5, SIZE - 1])
def test_what_is_not_finite_does_not_leave(spec, value, position):
    """Catches: an overflow of float16 that becomes Inf on the way; a warning in place of the error."""
    vector = np.zeros(SIZE, np.float32)
    vector[position] = value
    with pytest.raises(WireError, match=f"not finite in {spec.wire_dtype}") as caught:
        encode(vector, spec)
    assert caught.value.code == "non-finite"


@each_type
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, SIZE - 1])
def test_what_is_not_finite_does_not_come_in(spec, value, position):
    """Catches: a check of the first element or of the mean only."""
    vector = np.zeros(SIZE, spec.wire_dtype)
    vector[position] = value
    assert code(received(npy(vector), dtype=spec.wire_dtype), spec) == "non-finite"


@pytest.mark.parametrize("shape", [(8,), (), (1, SIZE), (SIZE, 1), (4, 3), (SIZE + 1,), (10**13,), (-1,)])
def test_a_declared_shape(shape):
    """Catches: shapes that NumPy broadcasts or reshapes."""
    assert code(received(shape=shape)) == "shape"


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "complex64", "<U1", ">f4", "<f4", "object", ""])
def test_a_declared_type(dtype):
    """Catches: types that cast to float32."""
    assert code(received(dtype=dtype)) == "dtype"
    assert code(received(stype="torch.tensor")) == "dtype"


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "complex64", "U1", ">f4", "V4", "O"])
def test_a_type_inside_the_bytes(dtype):
    """Catches: trust in the declaration beside the bytes; a big-endian array read as numbers without sense."""
    header = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': (12,), }}"
    assert code(received(with_header(header))) == "dtype"


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (11,), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (12,), }",
    ],
)
def test_a_shape_inside_the_bytes(header):
    """Catches: np.load, which allocates what the header asks for before it reads."""
    tracemalloc.start()
    try:
        assert code(received(with_header(header))) == "shape"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keys", [[], ["adapter2"], ["\u0430dapter"], [ARRAY_KEY, "extra"]])
def test_keys(keys):
    """Catches: the first array taken, whatever its name (one of these starts with a Cyrillic letter)."""
    good = received()[ARRAY_KEY]
    assert code(ArrayRecord(dict.fromkeys(keys, good))) == "keys"


@pytest.mark.parametrize("count", [0, 1, 47, 48, 48 + 257, 10**6])
def test_a_number_of_bytes_that_cannot_be_right(count):
    """Catches: a look into bytes that are too few or far too many."""
    assert code(received(b"\x93NUMPY\x01\x00".ljust(count, b"\0")[:count])) == "size"


@pytest.mark.parametrize("change", [lambda data: data + b"\0", lambda data: data[:-1], lambda data: data + data[:100]])
def test_trailing_or_missing_bytes(change):
    """Catches: a tail that nobody looks at; a short array filled from what lies behind it in memory."""
    assert code(received(change(npy(np.zeros(SIZE, np.float32))))) == "size"


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 176,
        b"PK\x03\x04".ljust(176, b"\0"),
        bytes(range(176)),
        pickle.dumps("x" * 140).ljust(176, b"\0"),
        b"\x93NUMPY\x01\x00\xff\xff".ljust(176, b" "),
        b"\x93NUMPY\x02\x00" + npy(np.zeros(SIZE, np.float32))[8:],
        b"\x93NUMPY\x03\x00" + npy(np.zeros(SIZE, np.float32))[8:],
        with_header("{'descr': '<f4'"),
        with_header("{'descr': '<f4', 'shape': (12,), }"),
        with_header("{'descr': '<f4', 'fortran_order': 0, 'shape': (12,), }"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (12L,), }"),
        with_header("__import__('os').abort()"),
        with_header("[" * 100),
        with_header("\0"),
    ],
)
def test_bytes_that_are_no_array(data):
    """Catches: an exception of another kind, which would end the round instead of costing one site its reply."""
    assert code(received(data)) == "decode"


@given(st.binary(min_size=0, max_size=SIZE * 4 + 300))
def test_any_bytes_at_all(data):
    """Catches: whatever the list above forgot."""
    assert code(received(data)) in ("size", "decode", "dtype", "shape")


@given(st.integers(0, 127), st.integers(0, 255))
def test_any_byte_of_the_header(position, value):
    """Catches: one byte that turns the header into something that is believed."""
    data = bytearray(npy(np.zeros(SIZE, np.float32)))
    data[position] = value
    try:
        vector = decode(received(bytes(data)), SPEC)
    except WireError:
        return
    assert np.array_equal(vector, np.zeros(SIZE, np.float32))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Return what unpickling runs."""
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_opened(tmp_path):
    """Catches: allow_pickle=True."""
    target = tmp_path / "ran"
    data = npy(np.array([Payload(target)], dtype=object), allow_pickle=True)
    big = dataclasses.replace(SPEC, tensors=(TensorSpec("a", ((len(data) - 128) // 4,), "adapter"),))
    assert code(received(data, shape=(big.size,)), big) in ("dtype", "size", "decode")
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target))).close()  # noqa: S301  (the trap itself works)
    assert target.exists()


def test_errors_hold_no_value():
    """Catches: an error that repeats what came in, or an element of somebody's update."""
    vector = np.full(SIZE, 1234.5, np.float32)
    vector[3] = np.nan
    with pytest.raises(WireError) as caught:
        decode(received(npy(vector)), SPEC)
    assert "1234" not in str(caught.value)


@given(vectors)
def test_norm(vector):
    """Catches: squares summed in float32, which overflow at 1e20 and lose small elements."""
    exact = math.sqrt(math.fsum(float(value) ** 2 for value in vector))
    assert l2_norm(vector) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("value", "norm"), [(0.0, 0.0), (1e30, 1e30 * math.sqrt(12)), (1e-30, 1e-30 * math.sqrt(12))])
def test_norm_at_the_ends(value, norm):
    """Catches: Inf for large elements, 0 for small ones."""
    assert l2_norm(np.full(SIZE, value, np.float32)) == pytest.approx(norm, rel=1e-6)


def test_the_hash_of_a_vector():
    """Catches: a hash of the machine's byte order, of strides, or of a rounded text."""
    vector = np.arange(SIZE, dtype=np.float32)
    expected = hashlib.sha256(b"".join(np.float32(n).tobytes() for n in range(SIZE))).hexdigest()
    assert sha256(vector) == sha256(vector.astype(">f4")) == expected
    assert sha256(np.arange(2 * SIZE, dtype=np.float32)[::2]) == sha256(2 * vector)
    vector[5] = np.nextafter(vector[5], np.float32(9))
    assert sha256(vector) != expected


def test_the_spec_is_plain_data():
    """Catches: a field that JSON cannot carry, such as a NumPy integer in a shape."""
    body = json.loads(json.dumps(dataclasses.asdict(SPEC)))
    assert body["tensors"][0] == {"name": "a.weight", "shape": [2, 3], "part": "adapter"}


@given(arrays(np.float64, SIZE, elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_wide_numbers_come_back_as_they_are(numbers):
    """Catches: float64 rounded to the adapter's type on its way."""
    assert np.array_equal(decode_numbers(encode_numbers(numbers), SIZE), numbers)


def test_wide_numbers_are_checked_as_adapters_are():
    """Catches: NaN or infinity that enters the server's sums, or leaves a site; another size or type."""
    spoilt = np.zeros(SIZE)
    spoilt[1] = np.inf
    with pytest.raises(WireError) as caught:
        encode_numbers(spoilt)
    assert caught.value.code == "non-finite"
    sent = {"non-finite": spoilt, "shape": np.zeros(SIZE + 1), "dtype": np.zeros(SIZE, np.float32)}
    for code, numbers in sent.items():
        with pytest.raises(WireError) as caught:
            decode_numbers(ArrayRecord({ARRAY_KEY: Array(numbers)}), SIZE)
        assert caught.value.code == code
