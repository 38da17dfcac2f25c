"""What every adapter method of our own promises, on a tiny BERT."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.support.architectures import make, outputs, stir, trained
from tests.support.exports import load_alone, save_alone, to_fuse
from tests.support.tiny import tiny_bert
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.own_base import TENSORS_FILE, OwnMethod
from tsugiki.common.errors import ExportError, ModelError
from tsugiki.common.model.exported import EXPORTED_FILE, read_exported

SETTINGS = {
    "houlsby": {"bottleneck": 3},
    "houlsby-norms": {"bottleneck": 3, "placement": "pfeiffer", "train_layer_norm": True, "activation": "relu"},
    "bitfit": {},
    "prompt": {"num_virtual_tokens": 3},
    "p-tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix": {"num_virtual_tokens": 3},
    "fusion": {},
}

each_kind = pytest.mark.parametrize("kind", SETTINGS)


@cache
def adapters():
    """Return exports to fuse that fit the width and the blocks of the model of these tests."""
    folder = Path(tempfile.mkdtemp(prefix="tsugiki-test-fused-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return to_fuse(folder, tiny_bert(folder / "base", hidden=16))


def attach(model, heads=("classifier",), kind="houlsby"):
    """Return the method and the model with its adapter."""
    method = ADAPTERS.get(kind.partition("-")[0] if kind not in ADAPTERS.names() else kind)
    more = {"adapters": adapters()} if kind == "fusion" else {}
    method = method(method.Settings(**SETTINGS[kind], **more))
    return method, method.attach(model, heads)


def test_every_method_of_our_own_is_tested():
    """Catches: a method that no test here runs."""
    found = {name for name in ADAPTERS.names() if issubclass(ADAPTERS.get(name), OwnMethod)}
    assert found == set(SETTINGS) - {"houlsby-norms"}


@each_kind
@pytest.mark.parametrize("heads", [("classifier",), ()])
def test_save_and_load(kind, heads, tmp_path):
    """Catches: a saved part that is not loaded, or set to chance; what a load needs beside the plain base."""
    auto = {} if heads else {"auto": AutoModel}
    method, model = attach(make(**auto), heads, kind)
    save_alone(method, stir(model), tmp_path / "out" / "adapter")
    torch.manual_seed(123)
    loaded = load_alone(make(**auto).train(), tmp_path / "out" / "adapter")
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model.eval()))
    with method.disabled(loaded), method.disabled(model):
        assert torch.equal(outputs(loaded), outputs(model))


@each_kind
def test_what_is_kept_of_the_base_is_neither_exchanged_nor_stored(kind):
    """Catches: the base's own values among the parameters or in a checkpoint; trained layers that own buffers."""
    _, model = attach(make(), kind=kind)
    assert not any("base_values" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    owners = {name.rpartition(".")[0] for name in trained(model)}
    assert not [name for name in owners if dict(model.get_submodule(name).named_buffers(recurse=False))]


def test_what_is_written(tmp_path):
    """Catches: a second file that says the same; settings other than the method's; tensors of the base in it."""
    method, model = attach(make(), kind="houlsby-norms")
    save_alone(method, model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [EXPORTED_FILE, TENSORS_FILE]
    assert read_exported(tmp_path).make_method(tmp_path).settings == method.settings
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / TENSORS_FILE).items()}
    assert shapes == {name: value.shape for name, value in trained(model).items()}


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_load_refuses_other_tensors(tmp_path, fault):
    """Catches: a load that is not strict, or that broadcasts."""
    method, model = attach(make())
    save_alone(method, model, tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    name = "bert.encoder.layer.1.output.dropout.bottleneck.up.bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = "bert.encoder.layer.2.output.dropout.bottleneck.up.bias"
        tensors[name] = torch.zeros(16)
    else:
        tensors[name] = torch.zeros(1)
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(ModelError, match=name) as caught:
        load_alone(make(), tmp_path)
    assert caught.value.code == "adapter-invalid"


@pytest.mark.parametrize(
    "fault", ["no-folder", "no-tensors", "not-safetensors", "other-format", "other-method", "extra-key"]
)
def test_load_refuses_unreadable_files(tmp_path, fault):
    """Catches: raw errors of JSON, pydantic or safetensors; a newer format read as this one; a touched base."""
    folder = tmp_path / "adapter"
    method, model = attach(make())
    save_alone(method, model, folder)
    manifest = json.loads((folder / EXPORTED_FILE).read_text())
    changes = {"other-format": {"format": 2}, "other-method": {"adapter": {"method": "lora"}}, "extra-key": {"x": 1}}
    (folder / EXPORTED_FILE).write_text(json.dumps(manifest | changes.get(fault, {})))
    if fault == "no-tensors":
        (folder / TENSORS_FILE).unlink()
    elif fault == "not-safetensors":
        (folder / TENSORS_FILE).write_bytes(b"PK\x03\x04 no tensors")
    elif fault == "no-folder":
        shutil.rmtree(folder)
    base = make()
    with pytest.raises(ModelError) as caught:
        load_alone(base, folder)
    assert caught.value.code == "adapter-invalid"
    assert not any("bottleneck" in name for name in dict(base.named_modules()))


def test_load_needs_the_head(tmp_path):
    """Catches: a classification export on a bare base, whose head would silently be dropped."""
    method, model = attach(make())
    save_alone(method, model, tmp_path)
    with pytest.raises(ModelError, match="classifier") as caught:
        load_alone(make(auto=AutoModel), tmp_path)
    assert caught.value.code == "head-missing"


def test_attach_twice():
    """Catches: bottlenecks replaced by fresh ones, their hook run twice."""
    method, model = attach(make())
    with pytest.raises(ModelError) as caught:
        method.attach(model, ())
    assert caught.value.code == "adapter-attached"
    assert "classifier.weight" in trained(model)


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "bitfit"])
def test_cannot_be_merged(kind):
    """Catches: an export that claims to be merged."""
    method, model = attach(make(), kind=kind)
    with pytest.raises(ExportError, match="load_adapter") as caught:
        method.merge(model)
    assert caught.value.code == "merge-unsupported"


def test_disabled_restores_when_the_block_raises():
    """Catches: a context manager without `finally`."""
    method, model = attach(make(), (), "houlsby-norms")
    with_adapter = outputs(stir(model))
    with pytest.raises(RuntimeError, match="inside"), method.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(outputs(model), with_adapter)
