"""Exports that say what they are: read, checked, and put on their base again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.exports import BASE_NAME, export_tiny
from tests.support.tiny import tiny_bert, tiny_llama
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.errors import ModelError
from tsugiki.common.model.exported import (
    EXPORTED_FILE,
    find_export,
    is_hub_id,
    load_exported,
    open_exported,
    read_exported,
    share_frozen,
)

CLASSES = {"name": "sequence-classification", "max_length": 16}
REWARD = {"name": "preference", "max_length": 16}
METHODS = {
    "lora": {"rank": 2},
    "dora": {"method": "lora", "rank": 2, "use_dora": True},
    "ffa": {"method": "lora", "rank": 2, "freeze_a": "yes"},
    "vera": {"rank": 4},
    "layernorm": {},
    "houlsby": {"bottleneck": 3, "train_layer_norm": True},
    "bitfit": {},
    "prompt": {"num_virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of a tiny BERT, another one, and a tiny Llama. Read only."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "bert": tiny_bert(folder / "bert"),
        "other": tiny_bert(folder / "other", seed=8),
        "llama": tiny_llama(folder / "llama"),
    }


def exported(base, folder, name="lora", task=None, seed=1):
    """Save an adapter that was moved from its first values; return its graft."""
    return export_tiny(folder, base, task or CLASSES, {"method": name, **METHODS[name]}, seed)


def logits(transformer):
    """Return what a transformer with a head makes of a few words."""
    with torch.no_grad():
        return transformer(input_ids=torch.tensor([[2, 9, 15, 3]])).logits


def refused(folder, base, **changes):
    """Return the error of an export that cannot be opened."""
    if changes:
        body = json.loads((folder / EXPORTED_FILE).read_text())
        (folder / EXPORTED_FILE).write_text(json.dumps(body | changes))
    with pytest.raises(ModelError) as caught:
        open_exported(folder, str(base))
    return caught.value


@pytest.mark.parametrize("name", METHODS)
def test_what_is_opened_answers_as_what_was_exported(bases, tmp_path, name):
    """Catches: tensors left at chance; a head of another draw; a switch that does not lead back to the base."""
    graft = exported(bases["bert"], tmp_path, name)
    on = logits(graft.base.transformer)
    with graft.adapter_disabled():
        off = logits(graft.base.transformer)
    assert not torch.allclose(on, off, atol=1e-3)
    torch.manual_seed(123)
    again = open_exported(tmp_path, str(bases["bert"]))
    assert not again.base.transformer.training
    torch.testing.assert_close(logits(again.base.transformer), on, rtol=0, atol=1e-6)
    with again.adapter_disabled():
        torch.testing.assert_close(logits(again.base.transformer), off, rtol=0, atol=1e-6)
    assert again.spec == graft.spec


def test_what_an_export_says(bases, tmp_path):
    """Catches: a file that lacks something, or names a folder of this machine."""
    graft = exported(bases["bert"], tmp_path)
    text = (tmp_path / EXPORTED_FILE).read_text()
    said = json.loads(text)
    assert (said["format"], said["heads"], said["dtype"]) == (1, ["classifier"], "float32")
    assert (said["task"]["name"], said["adapter"]["method"]) == ("sequence-classification", "lora")
    assert (said["base_name"], said["base_fingerprint"]) == (BASE_NAME, graft.spec.base_fingerprint)
    assert str(bases["bert"].parent) not in text
    found = read_exported(tmp_path)
    took = graft.task.settings.model_copy(update={"pooling": "model", "train_pooler": False})
    assert found.make_task().settings == took
    assert found.make_method(tmp_path).settings == graft.method.settings
    assert found.spec_sha256 == graft.spec.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"more": 1},
        {"task": {"name": "unknown"}},
        {"task": {}},
        {"adapter": {"method": "lora", "rank": 0}},
        {"adapter": {"method": "pissa"}},
        {"base_name": "/home/operator/base"},
        {"base_name": "../base"},
        {"base_fingerprint": "ab"},
        {"heads": "classifier"},
        {"spec_sha256": "0" * 64},
        {"adapter": {"method": "lora", "rank": 2, "alpha": 8.0}},
    ],
)
def test_a_damaged_manifest_is_refused(bases, tmp_path, changes):
    """Catches: raw errors of pydantic; settings other than the run's believed; a folder of this machine opened."""
    exported(bases["bert"], tmp_path)
    assert refused(tmp_path, bases["bert"], **changes).code == "adapter-invalid"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe"])
def test_an_unreadable_manifest_is_refused(bases, tmp_path, content):
    """Catches: raw errors of JSON or the system; an export without a manifest loaded by guesses."""
    exported(bases["bert"], tmp_path)
    (tmp_path / EXPORTED_FILE).unlink()
    if content is not None:
        (tmp_path / EXPORTED_FILE).write_bytes(content)
    assert refused(tmp_path, bases["bert"]).code == "adapter-invalid"


def test_another_base_is_refused(bases, tmp_path):
    """Catches: an adapter on a base of the same shapes that it was not trained on."""
    exported(bases["bert"], tmp_path)
    assert refused(tmp_path, bases["other"]).code == "adapter-other-base"


@pytest.mark.parametrize("name", ["lora", "houlsby"])
def test_a_class_of_model_without_the_head_is_refused(bases, tmp_path, name):
    """Catches: a score that peft drops on a language model; a reward that is then read from nothing."""
    graft = exported(bases["llama"], tmp_path, name, REWARD)
    whole = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with pytest.raises(ModelError, match="LlamaForCausalLM has no module 'score'") as caught:
        load_exported(tmp_path, whole, fingerprint=graft.spec.base_fingerprint)
    assert caught.value.code == "head-missing"
    fitting = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    loaded = load_exported(tmp_path, fitting, fingerprint=graft.spec.base_fingerprint)
    torch.testing.assert_close(logits(loaded), logits(graft.base.transformer), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "houlsby"])
@pytest.mark.parametrize("fault", ["missing-head", "missing", "extra", "shape", "gone", "not-safetensors"])
def test_other_tensors_are_refused(bases, tmp_path, name, fault):
    """Catches: loads that are not strict: a head or half an adapter at chance, tensors that fit nothing dropped."""
    exported(bases["bert"], tmp_path, name)
    path = tmp_path / ADAPTERS.get(name).tensors_file
    tensors = load_file(path)
    head = next(key for key in tensors if key.endswith("classifier.weight"))
    other = next(key for key in sorted(tensors) if "classifier" not in key)
    if fault in ("missing-head", "missing"):
        del tensors[head if fault == "missing-head" else other]
    elif fault == "extra":
        tensors[other.replace("layer.0", "layer.7")] = torch.zeros(2)
    elif fault == "shape":
        tensors[head] = torch.zeros(1)
    save_file(tensors, path)
    if fault == "gone":
        path.unlink()
    elif fault == "not-safetensors":
        path.write_bytes(b"no tensors")
    assert refused(tmp_path, bases["bert"]).code == "adapter-invalid"


def test_the_base_is_found_by_the_name_in_the_export(bases, tmp_path, monkeypatch):
    """Catches: a source that has to be given, or is taken from elsewhere."""
    exported(bases["bert"], tmp_path)
    asked = []
    monkeypatch.setattr(
        "tsugiki.common.model.exported.find_in_hub", lambda source: asked.append(source) or bases["bert"]
    )
    open_exported(tmp_path)
    assert asked == [BASE_NAME]


def places(transformer):
    """Return where the memory of each frozen parameter begins."""
    return {value.data_ptr() for value in transformer.parameters() if not value.requires_grad}


@pytest.mark.parametrize("first", METHODS)
def test_two_adapters_share_one_base_and_nothing_else(bases, tmp_path, first):
    """Catches: a second base in memory; a trained bias, norm or head of one adapter in the other's outputs."""
    wanted = {}
    for name in (first, "bitfit", "layernorm"):
        graft = exported(bases["bert"], tmp_path / name, name, seed=len(name))
        wanted[name] = logits(graft.base.transformer)
    one = open_exported(tmp_path / first, str(bases["bert"]))
    for name in ("bitfit", "layernorm"):
        two = open_exported(tmp_path / name, str(bases["bert"]), beside=one.base.transformer)
        new = [v for v in two.base.transformer.parameters() if v.data_ptr() not in places(one.base.transformer)]
        own = sum(value.numel() for value in new if value.requires_grad)
        assert own == two.spec.size
        loose = sum(value.numel() for value in new if not value.requires_grad)  # a head's first values, and what the
        assert loose <= one.spec.size + 2 * 33  # first adapter trains of the base
        for graft, label in ((one, first), (two, name), (one, first)):
            torch.testing.assert_close(logits(graft.base.transformer), wanted[label], rtol=0, atol=1e-6)


def test_tied_weights_stay_tied(bases):
    """Catches: an output layer that keeps the second base's embeddings in memory, or alone."""
    one, two = (AutoModelForCausalLM.from_pretrained(bases["llama"]) for _ in range(2))
    share_frozen(two, one.requires_grad_(False))
    assert two.lm_head.weight is two.model.embed_tokens.weight
    assert two.lm_head.weight.data_ptr() == one.lm_head.weight.data_ptr()
    assert not {value.data_ptr() for value in two.parameters()} - {value.data_ptr() for value in one.parameters()}


def test_what_differs_or_is_trained_is_not_shared(bases):
    """Catches: names believed without a look at the numbers; a tensor that another adapter goes on to change."""
    one, two = (AutoModel.from_pretrained(bases["bert"]).requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        one.encoder.layer[0].output.dense.weight[0, 0] += 1
    one.encoder.layer[1].output.dense.bias.requires_grad_(True)
    share_frozen(two, one)
    there = {value.data_ptr() for value in one.parameters()}
    own = [name for name, value in two.named_parameters() if value.data_ptr() not in there]
    assert own == ["encoder.layer.0.output.dense.weight", "encoder.layer.1.output.dense.bias"]


def test_a_link_is_no_manifest(bases, tmp_path):
    """Catches: a file of this machine read because an export from elsewhere has a link to it."""
    exported(bases["bert"], tmp_path)
    (tmp_path / EXPORTED_FILE).rename(tmp_path / "moved")
    (tmp_path / EXPORTED_FILE).symlink_to(tmp_path / "moved")
    assert refused(tmp_path, bases["bert"]).code == "adapter-invalid"


@pytest.mark.parametrize(
    ("name", "right"),
    [("_team/model", True), ("org/_model", True), ("model", True), ("../base", False), ("a/b/c", False), ("", False)],
)
def test_a_public_name_is_what_the_hub_takes(bases, tmp_path, name, right):
    """Catches: a name that one side takes for valid and the other does not; a path of this machine."""
    assert is_hub_id(name) is right
    exported(bases["bert"], tmp_path)
    said = json.loads((tmp_path / EXPORTED_FILE).read_text())
    (tmp_path / EXPORTED_FILE).write_text(json.dumps(said | {"base_name": name}))
    if right:
        assert read_exported(tmp_path).base_name == name
    else:
        assert refused(tmp_path, bases["bert"]).code == "adapter-invalid"


def test_a_base_by_its_name_is_no_folder_of_this_machine(bases, tmp_path, monkeypatch):
    """Catches: an export from elsewhere that opens a folder here, because its base has the name of one."""
    exported(bases["bert"], tmp_path / "export")
    shutil.copytree(bases["bert"], tmp_path / "runs" / "private")
    monkeypatch.chdir(tmp_path)
    said = json.loads((tmp_path / "export" / EXPORTED_FILE).read_text())
    (tmp_path / "export" / EXPORTED_FILE).write_text(json.dumps(said | {"base_name": "runs/private"}))
    with pytest.raises(ModelError, match="--model") as caught:
        open_exported(tmp_path / "export")
    assert caught.value.code == "model-not-found"
    assert open_exported(tmp_path / "export", "runs/private").spec.sha256 == said["spec_sha256"]


@pytest.mark.parametrize("heads", [["classifier", "bert.embeddings.LayerNorm"], [], ["bert.embeddings.LayerNorm"]])
def test_heads_that_are_not_the_tasks_are_refused(bases, tmp_path, heads):
    """Catches: modules of the base replaced by an export whose fingerprint says that the base is the same."""
    exported(bases["bert"], tmp_path, "bitfit")
    path = tmp_path / ADAPTERS.get("bitfit").tensors_file
    tensors = {key: value for key, value in load_file(path).items() if "classifier" not in key or "classifier" in heads}
    if "bert.embeddings.LayerNorm" in heads:
        tensors["bert.embeddings.LayerNorm.weight"] = torch.full((32,), 9.0)
    save_file(tensors, path)
    said = read_exported(tmp_path).model_copy(update={"heads": tuple(heads)})
    spec = said.spec_of(said.make_method(tmp_path), {name: tuple(value.shape) for name, value in tensors.items()})
    said.model_copy(update={"spec_sha256": spec.sha256}).write(tmp_path)
    error = refused(tmp_path, bases["bert"])
    assert error.code == "adapter-invalid"
    assert "the heads of its task" in str(error)


@pytest.mark.parametrize("name", ["houlsby", "bitfit", "prompt"])
def test_a_spec_needs_no_base(bases, tmp_path, name):
    """Catches: a spec of saved tensors that is another than that of the adapter on its base."""
    graft = exported(bases["bert"], tmp_path, name)
    said, method = read_exported(tmp_path), graft.method
    tensors = load_file(tmp_path / method.tensors_file)
    assert said.spec_of(method, {key: tuple(value.shape) for key, value in tensors.items()}) == graft.spec


def test_what_is_no_export_is_told_so(bases, tmp_path, monkeypatch):
    """Catches: a run's folder, the likeliest mistake, sent to save_pretrained; a name looked for in the hub."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    exported(bases["bert"], tmp_path / "runs" / "tone" / "adapter")
    monkeypatch.chdir(tmp_path)
    assert find_export("runs/tone/adapter", "task.reward_adapter") == tmp_path / "runs" / "tone" / "adapter"
    codes = {"runs/tone": "adapter-invalid", "runs/reward": "adapter-missing", "": "adapter-missing"}
    for name, code in {**codes, "x" * 5000: "adapter-missing"}.items():
        with pytest.raises(ModelError, match=r"task\.reward_adapter names .*RUN/adapter") as caught:
            find_export(name, "task.reward_adapter")
        assert caught.value.code == code
