"""The values of an export as the start of a run: read as they were exported, or refused with the setting."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.exports import export_tiny
from tests.support.tiny import tiny_bert, tiny_llama, tiny_sentence_transformer
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.exported import EXPORTED_FILE, write_exported
from tsugiki.common.model.load import grafts, load_graft
from tsugiki.common.model.start import about_start, start_values, started
from tsugiki.common.tasks.pooling import HEAD, HEAD_FILE
from tsugiki.common.wire.spec import sha256

CLASSES = {"name": "sequence-classification", "max_length": 16}
SAME_SEED = 1
METHODS = {
    "lora": {"method": "lora", "rank": 2},
    "ffa": {"method": "lora", "rank": 2, "freeze_a": "yes"},
    "vera": {"method": "vera", "rank": 4},
    "houlsby": {"method": "houlsby", "bottleneck": 3, "train_layer_norm": True},
    "bitfit": {"method": "bitfit"},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny BERT. Read only."""
    return tiny_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _fresh():
    """Load each graft anew: `export_tiny` stirs the one that is kept."""
    yield
    grafts.clear()


def exported(base, folder, task=None, **adapter):
    """Write an export and return the values in it."""
    return export_tiny(folder, base, task or CLASSES, adapter or METHODS["lora"]).read()


def run_of(base, task=None, seed=SAME_SEED, start_from="", **adapter):
    """Return the settings of a run on the base, and its graft."""
    grafts.clear()
    sections = {"task": task or CLASSES, "adapter": {**(adapter or METHODS["lora"]), "start_from": str(start_from)}}
    config = parse({"model": {"name": str(base)}, "run": {"seed": seed}, "train": {"device": "cpu"}, **sections})
    return config, load_graft(config, str(base), seed)


def refused(graft, folder):
    """Return the error of an export that a run cannot start from, after checking that the graft is as it was."""
    constants = {name: value.clone() for name, value in graft.method.constants(graft.base.transformer).items()}
    with pytest.raises(ModelError) as caught:
        start_values(graft, str(folder))
    assert np.array_equal(graft.read(), graft.initial)
    after = graft.method.constants(graft.base.transformer)
    assert all(torch.equal(after[name], value) for name, value in constants.items())
    return caught.value


@pytest.mark.parametrize("name", METHODS)
def test_a_run_starts_from_the_values_that_were_exported(base, tmp_path, name):
    """Catches: a head or a tensor left at its initial value; tensors in another order; a graft that stays changed."""
    values = exported(base, tmp_path, **METHODS[name])
    config, graft = run_of(base, start_from=tmp_path, **METHODS[name])
    assert not np.array_equal(values, graft.initial)
    resolved, start = started(config, graft)
    assert np.array_equal(start, values)
    assert resolved.adapter.start_sha256 == sha256(values)
    assert np.array_equal(graft.read(), graft.initial)
    assert started(resolved, graft)[0] == resolved


def test_a_pooled_classifier_starts_with_its_head(tmp_path):
    """Catches: a head that stays at chance because the export has it in a file of its own."""
    base = tiny_sentence_transformer(tmp_path / "base")
    graft = export_tiny(tmp_path / "june", base, CLASSES, METHODS["lora"])
    assert graft.base.constants == {"pooling": "mean"}
    tensors = load_file(tmp_path / "june" / "adapter_model.safetensors")
    apart = {name: tensors.pop(name) for name in list(tensors) if f".{HEAD}." in name}
    assert len(apart) == 2
    (tmp_path / "june" / HEAD_FILE).parent.mkdir()
    own_names = {f"linear.{name.rsplit('.', 1)[1]}": value for name, value in apart.items()}
    save_file(own_names, tmp_path / "june" / HEAD_FILE)
    save_file(tensors, tmp_path / "june" / "adapter_model.safetensors", metadata={"format": "pt"})
    write_exported(tmp_path / "june", graft, "float32", "tsugiki-tests/base", head_apart=True)
    values = graft.read()
    _, fresh = run_of(base)
    assert np.array_equal(start_values(fresh, str(tmp_path / "june")), values)


@pytest.mark.parametrize(
    ("task", "adapter", "setting"),
    [
        ({}, {"rank": 3}, "adapter.rank is 2 in the export"),
        ({}, {"alpha": 4.0}, "adapter.alpha is 16.0 in the export"),
        ({}, {"target_modules": ["key"]}, "adapter.target_modules is [] in the export"),
        ({}, {"freeze_a": "yes"}, "adapter.freeze_a is no in the export"),
        ({"labels": ["no", "yes"]}, {}, "task.labels is ('0', '1') in the export"),
        ({"train_pooler": True}, {}, "task.train_pooler is false in the export"),
    ],
)
def test_another_shape_or_task_is_refused_with_the_setting(base, tmp_path, task, adapter, setting):
    """Catches: a refusal that names a tensor instead of a setting; an adapter of another scale taken as it is."""
    exported(base, tmp_path, {**CLASSES, "train_pooler": False})
    _, graft = run_of(base, {**CLASSES, "train_pooler": False, **task}, **METHODS["lora"] | adapter)
    error = refused(graft, tmp_path)
    assert error.code == "adapter-differs"
    assert setting in error.problem
    assert error.hint.startswith(f"set {setting.split()[0]} ")


def test_another_task_or_method_is_refused(tmp_path):
    """Catches: a classifier's adapter under a language model, whose tensors have the same names."""
    base = tiny_llama(tmp_path / "llama")
    exported(base, tmp_path / "june")
    _, graft = run_of(base, {"name": "causal-lm", "max_length": 16})
    assert "task.name is sequence-classification in the export" in refused(graft, tmp_path / "june").problem
    _, graft = run_of(base, **METHODS["houlsby"])
    assert "adapter.method is lora in the export" in refused(graft, tmp_path / "june").problem


def test_what_shapes_only_the_training_may_change(base, tmp_path):
    """Catches: an adapter that can go on only with the dropout, the bytes and the loss of its first run."""
    values = exported(base, tmp_path)
    task = {**CLASSES, "max_length": 32}
    adapter = {**METHODS["lora"], "dropout": 0.1, "freeze_a": "no", "target_modules": ["query", "value"]}
    _, graft = run_of(base, task, **adapter, wire_dtype="float16")
    start = start_values(graft, str(tmp_path))
    assert np.array_equal(start, values.astype(np.float16).astype(np.float32))
    assert not np.array_equal(start, values)


@pytest.mark.parametrize("name", ["ffa", "vera"])
def test_frozen_numbers_of_another_seed_are_refused(base, tmp_path, name):
    """Catches: sites that train B beside an A that is not the export's, because frozen numbers do not travel."""
    exported(base, tmp_path, **METHODS[name])
    _, graft = run_of(base, seed=SAME_SEED + 1, **METHODS[name])
    error = refused(graft, tmp_path)
    assert (error.code, "run.seed" in error.problem) == ("adapter-differs", True)


def test_an_export_from_elsewhere_passes_the_checks_of_every_export(base, tmp_path):
    """Catches: a start that is read without them: another base, a link, a spec of another run, no export, NaN."""
    exported(base, tmp_path / "june")
    _, graft = run_of(tiny_bert(tmp_path / "other", seed=8))
    assert refused(graft, tmp_path / "june").code == "adapter-other-base"
    _, graft = run_of(base)
    assert refused(graft, tmp_path / "nowhere").code == "adapter-missing"
    assert refused(graft, base).code == "adapter-invalid"
    about = tmp_path / "june" / EXPORTED_FILE
    said = json.loads(about.read_text())
    about.write_text(json.dumps({**said, "spec_sha256": "1" * 64}))
    assert refused(graft, tmp_path / "june").code == "adapter-invalid"
    about.write_text(json.dumps(said))
    file = tmp_path / "june" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, file)
    assert "not finite" in refused(graft, tmp_path / "june").problem
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert refused(graft, tmp_path / "june").code == "adapter-invalid"


def test_a_hash_that_was_agreed_on_is_compared(base, tmp_path):
    """Catches: a run that starts from whatever lies in the folder now."""
    values = exported(base, tmp_path / "june" / "adapter")
    config, graft = run_of(base, start_from=tmp_path / "june" / "adapter")
    with pytest.raises(ModelError) as caught:
        started(changed(config, {"adapter.start_sha256": "0" * 64}), graft)
    assert caught.value.code == "adapter-differs"
    resolved, _ = started(config, graft)
    assert about_start(resolved) == {"start_from": "june/adapter", "start_sha256": sha256(values)}
    assert about_start(run_of(base)[0]) == {}
