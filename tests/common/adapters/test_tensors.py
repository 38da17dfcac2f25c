"""The tensors of a saved adapter."""

import hashlib
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from tsugiki.common.adapters.tensors import MANIFEST_LIMIT_BYTES, fill, read_manifest, read_tensors, tensors_sha256
from tsugiki.common.errors import ModelError


def test_all_tensors_are_set_by_name(tmp_path):
    """Catches: the order of a file in the place of names; another tensor in the place of the one that is there."""
    wanted = {name: torch.zeros(2, requires_grad=True) for name in "ab"}
    save_file({"b": torch.full((2,), 2.0), "a": torch.ones(2)}, tmp_path / "x.safetensors")
    before = dict(wanted)
    fill(wanted, read_tensors(tmp_path / "x.safetensors"))
    assert [wanted[name].tolist() for name in "ab"] == [[1, 1], [2, 2]]
    assert all(wanted[name] is before[name] for name in "ab")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"a": torch.ones(2)}, "has nothing for the tensor 'b'"),
        ({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, "has shape .* for the tensor 'c'"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, r"has shape \(1,\) for the tensor 'b'"),
    ],
)
def test_nothing_is_set_unless_all_fits(found, words):
    """Catches: a load that is not strict, or broadcasts; half of an adapter set before the error."""
    wanted = {name: torch.zeros(2) for name in "ab"}
    with pytest.raises(ModelError, match=words) as caught:
        fill(wanted, found)
    assert caught.value.code == "adapter-invalid"
    assert not any(tensor.any() for tensor in wanted.values())


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no tensors"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    """Catches: errors of the library or the system, without a code."""
    if content is not None:
        (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.safetensors") as caught:
        read_tensors(tmp_path / "x.safetensors")
    assert caught.value.code == "adapter-invalid"


def test_only_a_small_regular_file_is_read(tmp_path):
    """Catches: a link that leads to a file of this machine; a device that never ends; memory without a bound."""
    (tmp_path / "good").write_bytes(b"{}")
    assert read_manifest(tmp_path / "good") == b"{}"
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "endless").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MANIFEST_LIMIT_BYTES + 1)
    for name in ("gone", "link", "endless", "pipe", "folder", "large"):
        with pytest.raises(OSError, match=name):
            read_manifest(tmp_path / name)


def test_tensors_behind_a_link_are_not_read(tmp_path):
    """Catches: tensors of this machine loaded, and exported again, as if they came with an adapter."""
    save_file({"a": torch.zeros(1)}, tmp_path / "private.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "private.safetensors")
    assert list(read_tensors(tmp_path / "private.safetensors")) == ["a"]
    with pytest.raises(ModelError) as caught:
        read_tensors(tmp_path / "link.safetensors")
    assert caught.value.code == "adapter-invalid"


def test_the_hash_is_of_names_and_numbers():
    """Catches: a hash that depends on the order of tensors or their type, or leaves out names, numbers or the start."""
    pair = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], requires_grad=True)}
    found = tensors_sha256(pair)
    assert found == hashlib.sha256(b"a" + struct.pack("<2f", 1, 2) + b"b" + struct.pack("<f", 3)).hexdigest()
    assert found == tensors_sha256({"b": pair["b"].double(), "a": pair["a"].bfloat16()})
    others = [{"a": pair["a"], "c": pair["b"]}, {"a": pair["a"], "b": pair["b"] + 1}, {"a": pair["a"]}]
    assert found not in {*map(tensors_sha256, others), tensors_sha256(pair, start=b"{}")}
