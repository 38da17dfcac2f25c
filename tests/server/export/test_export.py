"""Exports: what is written, what is refused, and that only what works gets its place."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.support.exports import settings_of, to_fuse
from tests.support.federation import model_folder, run_tiny, tiny_config
from tests.support.tiny import PUBLIC_NAME, tiny_cnn, tiny_llama, tiny_sentence_transformer, tiny_vit, write_case
from tsugiki.common.adapters.bitfit import BitfitSettings
from tsugiki.common.adapters.fusion import FusionSettings
from tsugiki.common.adapters.houlsby import HoulsbySettings
from tsugiki.common.adapters.ia3 import Ia3Settings
from tsugiki.common.adapters.layernorm import LayerNormSettings
from tsugiki.common.adapters.lora import Lora, LoraSettings
from tsugiki.common.adapters.vera import VeraSettings
from tsugiki.common.adapters.virtual_tokens import PrefixSettings, PromptSettings, PTuningSettings
from tsugiki.common.config import files as config_file
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ExportError, StorageError
from tsugiki.common.model.exported import open_exported, read_exported
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Generation
from tsugiki.common.wire.spec import sha256, unpack
from tsugiki.server.export import check as export_check
from tsugiki.server.export import probe as export_probe
from tsugiki.server.export.export import export
from tsugiki.server.export.finished import choose, read_config

MENU = {
    "houlsby": HoulsbySettings(bottleneck=4),
    "dora": LoraSettings(rank=2, use_dora=True),
    "ia3": Ia3Settings(),
    "vera": VeraSettings(rank=8),
    "layernorm": LayerNormSettings(),
    "bitfit": BitfitSettings(),
    "prompt": PromptSettings(num_virtual_tokens=4),
    "p-tuning": PTuningSettings(num_virtual_tokens=4),
    "prefix": PrefixSettings(num_virtual_tokens=4),
}
"""Adapters of the kinds of run that are not plain LoRA, by the first part of their names."""

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors on several threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from the name of a kind of run to the folder of a finished one, run once."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny_sentence_transformer(folder / "base")
    pairs = folder / "pairs.csv"
    pairs.write_text("anchor,positive\n" + "".join(f"the {word} clause,a clause on {word}\n" for word in WORDS * 2))
    embedding = {
        "model": {"name": str(base)},
        "task": {"name": "sentence-embedding"},
        "evaluation": {"data": ""},
        "simulation": {"data": str(pairs)},
    }
    titles = folder / "titles.txt"
    titles.write_text("".join(f"the {word} clause\n" for word in WORDS * 2))
    causal = {
        "model": {"name": str(tiny_llama(folder / "llama"))},
        "task": {"name": "causal-lm"},
        "evaluation": {"data": ""},
        "simulation": {"data": str(titles)},
    }
    answers = folder / "answers.jsonl"
    line = '{{"prompt": "the {0} clause", "chosen": "good {0}", "rejected": "bad {0}"}}\n'
    answers.write_text("".join(line.format(word) for word in WORDS * 2))
    preference = {**causal, "simulation": {"data": str(answers)}}
    by_loss = {"monitor": "eval_loss"}  # moves in every round, so that the best adapter is not the first one
    labelled = folder / "labelled.csv"
    rows = [f"the {word} clause,a {second},{label}\n" for word in WORDS for label, second in enumerate(WORDS[:3])]
    labelled.write_text("sentence1,sentence2,label\n" + "".join(rows))
    softmax = {
        **embedding,
        "task": {"name": "sentence-embedding", "loss": "softmax-nli"},
        "simulation": {"data": str(labelled)},
    }
    kinds = {
        "softmax": softmax,
        "lora": {"adapter": {"target_modules": ["value", "query", "key", "dense"]}, "evaluation": by_loss},
        "houlsby": {"evaluation": by_loss},
        "houlsby-16": {"evaluation": by_loss, "model": {"dtype": "bfloat16"}},
        "layernorm-16": {"evaluation": by_loss, "model": {"dtype": "bfloat16"}},
        "embedding": embedding,
        "causal": causal,
        "reward": {**preference, "task": {"name": "preference"}},
        "dpo": {**preference, "task": {"name": "preference", "objective": "dpo"}},
    }
    kinds |= {f"{method}-embedding": embedding for method in ("dora", "vera", "bitfit", "prompt")}
    kinds |= {method: {"evaluation": by_loss} for method in ("dora", "ia3", "layernorm", "p-tuning", "fusion")}
    kinds |= {"prefix-causal": causal, **pooled_kinds(folder, base)}
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "the {word} clause"}}\n' for word in WORDS * 2))
    tiny = TASKS.get("rlhf").test_case()
    judged = {"name": "rlhf", **settings_of(tiny, Path(causal["model"]["name"]))}
    kinds["rlhf"] = {**causal, "task": judged, "simulation": {"data": str(prompts)}}
    kinds |= {f"{method}-softmax": softmax for method in ("dora", "bitfit", "prompt")}
    images = {
        "task": {"name": "image-classification", "num_labels": 2},
        "evaluation": {"data": ""},
        "simulation": {"data": str(write_case(folder, TASKS.get("image-classification").test_case().rows))},
    }
    kinds["cnn"] = {**images, "model": {"name": str(tiny_cnn(folder / "cnn"))}}
    kinds["vit"] = {**images, "model": {"name": str(tiny_vit(folder / "vit"))}}
    done = {}

    def run(kind):
        if kind not in done:
            config = tiny_config(folder, run={"name": kind}, **kinds[kind])
            if kind == "fusion":
                settings = FusionSettings(adapters=to_fuse(folder / "fused", Path(model_folder())))
                config = config.model_copy(update={"adapter": settings})
            elif settings := MENU.get(kind.partition("-")[0] if kind != "p-tuning" else kind):
                config = config.model_copy(update={"adapter": settings})
            done[kind] = run_tiny(config).folder
        return done[kind]

    return run


def pooled_kinds(folder, base):
    """Return the kinds of run whose classifier pools by itself, on an embedder; `pair` leaves it to "auto"."""
    task = {"name": "sequence-classification", "max_length": 16, "labels": ["0", "1"]}
    unjudged = {"model": {"name": str(base)}, "evaluation": {"data": ""}}  # so the last adapter is the best one
    names = ("mean", "first", "houlsby-mean", "dora-mean", "vera-mean", "bitfit-mean")
    kinds = {name: {**unjudged, "task": task | {"pooling": name.rpartition("-")[2]}} for name in names}
    kinds["sixteen-mean"] = {**kinds["mean"], "model": {"name": str(base), "dtype": "bfloat16"}}
    rows = [f"the {word},a good {word},{number % 2}\n" for number, word in enumerate(WORDS * 2)]
    (folder / "agree.csv").write_text("text,text_pair,label\n" + "".join(rows))
    kinds["pair"] = {
        "model": {"name": str(base)},
        "task": {"name": "sequence-classification", "pair": True, "max_length": 24},
        "evaluation": {"data": ""},
        "simulation": {"data": str(folder / "agree.csv")},
    }
    return kinds


@pytest.fixture
def copied(runs, tmp_path):
    """A function like `runs`, to folders that a test may change."""
    return lambda kind: shutil.copytree(runs(kind), tmp_path / "run")


@pytest.fixture
def unproved(monkeypatch):
    """Exports without their proof: a fresh process takes seconds."""
    monkeypatch.setattr("tsugiki.server.export.export.prove", lambda *_: None)


@pytest.fixture
def proved_here(monkeypatch):
    """Exports that are proved in this process."""

    def run_probe(job_file, folder, environment):
        job = {**json.loads(job_file.read_text()), "alone": False}
        job_file.write_text(json.dumps(job))
        code, cached = Path(job["code"]), list(Path(environment["HF_HUB_CACHE"]).glob("models--*/snapshots/*"))
        for base in cached:  # this process has read its own environment already
            code.write_text(code.read_text().replace(PUBLIC_NAME, str(base)))
            monkeypatch.setattr("tsugiki.common.model.exported.find_in_hub", {PUBLIC_NAME: base}.get)
        monkeypatch.chdir(folder)
        export_probe.main(str(job_file))
        monkeypatch.chdir("/")

    monkeypatch.setattr(export_check, "run_probe", run_probe)


def names_in(graft):
    """Return the names of what is trained."""
    return {tensor.name for tensor in graft.spec.tensors}


def files(folder):
    """Return the content of every file by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(folder, section, **settings):
    """Change the settings in a run's folder."""
    config = config_file.read(folder / "config.toml").model_dump(mode="json")
    config[section] |= settings
    (folder / "config.toml").write_text(config_file.to_toml(config_file.parse(config)))


def set_best(folder, vector, graft):
    """Make a vector the best adapter of a run."""
    save_file(unpack(vector, graft.spec), folder / "best" / "adapter.safetensors")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"best_sha256": sha256(vector)}))


def graft_of(folder):
    """Return the graft that an export of this run uses."""
    config = config_file.read(folder / "config.toml")
    on_cpu = config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
    agreed = json.loads((folder / "spec.json").read_text())["constants"] if config.task.models else None
    return load_graft(on_cpu, config.model.name, config.run.seed, agreed=agreed)


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
PEFT = {"README.md", "tsugiki.json", "adapter_config.json", "adapter_model.safetensors"}
OWN = {"README.md", "tsugiki.json", "tsugiki_adapter.safetensors"}
FUSED = {f"adapters/{number}/{name}" for number in range(2) for name in OWN - {"README.md"}}
HEAD = {"3_Dense/config.json", "3_Dense/model.safetensors"}
MODULES = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("lora", PEFT | TOKENIZER),
        ("embedding", PEFT | TOKENIZER | MODULES | {"2_Normalize/config.json"}),
        ("softmax", PEFT | TOKENIZER | MODULES | {"2_Normalize/config.json"}),
        ("mean", PEFT | TOKENIZER | MODULES | HEAD | {"2_Dropout/config.json"}),
        ("pair", PEFT | TOKENIZER | MODULES | HEAD | {"2_Dropout/config.json"}),
        ("dora-mean", PEFT | HEAD | {"1_Pooling/config.json"}),
        ("houlsby-mean", OWN),
        ("causal", PEFT | TOKENIZER),
        ("reward", PEFT | TOKENIZER),
        ("dpo", PEFT | TOKENIZER),
        ("rlhf", PEFT | TOKENIZER),
        ("houlsby", OWN | TOKENIZER),
        ("dora-embedding", PEFT),
        ("vera-embedding", PEFT),
        ("prompt-embedding", OWN),
        ("prefix-causal", OWN | TOKENIZER),
        ("vit", PEFT),
        ("cnn", PEFT),
    ],
)
def test_a_fresh_process_finds_the_outputs_of_the_run(copied, caplog, kind, expected):
    """Catches: an export that does not load by its base's public name, one with a local path, a forgotten file."""
    run = copied(kind)
    before = set(run.iterdir())
    target = export(run)
    assert target == run / "adapter"
    assert "changes nothing" not in caplog.text
    assert set(run.iterdir()) == before | {target}
    graft = graft_of(run)
    vector = unpack(choose(run, read_config(run), graft, "best").vector, graft.spec)
    again = open_exported(target, config_file.read(run / "config.toml").model.name)
    for name, values in unpack(again.read(), again.spec).items():
        assert np.array_equal(values, vector[name]), name
    left = set(vector) - {one.name for one in again.spec.tensors}
    assert ["nli_head" in name for name in left] == [True] * (kind == "softmax")
    found = files(target)
    assert set(found) == expected
    base = config_file.read(run / "config.toml").model.name
    assert not [name for name, content in found.items() if base.encode() in content]
    assert [name for name, content in found.items() if PUBLIC_NAME.encode() in content]
    assert len({os.stat(path).st_mode for path in target.iterdir() if path.is_file()}) == 1


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of layer norms
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dora", PEFT | TOKENIZER),
        ("layernorm", PEFT | TOKENIZER),
        ("p-tuning", OWN | TOKENIZER),
        ("bitfit-embedding", OWN),
        ("ia3", PEFT | TOKENIZER),
        ("dora-softmax", PEFT),
        ("bitfit-softmax", OWN),
        ("prompt-softmax", OWN),
        ("vera-mean", PEFT | HEAD | {"1_Pooling/config.json"}),
        ("sixteen-mean", PEFT | HEAD | {"1_Pooling/config.json"}),
        ("fusion", OWN | TOKENIZER | FUSED),
    ],
)
def test_the_rest_of_the_menu_is_exported(runs, tmp_path, proved_here, kind, expected):
    """Catches: a method whose files lack something, or are said to load in a way that loses it."""
    target = export(runs(kind), tmp_path / "out")
    assert set(files(target)) == expected
    assert not [name for name, content in files(target).items() if str(runs(kind).parent).encode() in content]


def test_an_export_without_one_tensor_leaves_nothing(runs, tmp_path, monkeypatch):
    """Catches: a proof that compares nothing: peft loads a directory with a tensor too few without a word."""
    save = Lora.save

    def forgetful(self, transformer, folder, base_name):
        save(self, transformer, folder, base_name)
        tensors = load_file(folder / "adapter_model.safetensors")
        del tensors[next(name for name in sorted(tensors) if "lora_B" in name)]
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    monkeypatch.setattr(Lora, "save", forgetful)
    with pytest.raises(ExportError, match=r"differ from the run's by up to \d\.\de-0\d") as caught:
        export(runs("lora"), tmp_path / "out")
    assert caught.value.code == "proof-failed"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind",
    [
        *("lora", "embedding", "softmax", "causal", "dora-embedding", "vera-embedding", "bitfit-softmax", "vit", "cnn"),
        *("mean", "first", "pair", "dora-mean", "bitfit-mean"),
    ],
)
def test_a_merged_model_needs_no_adapter_and_spares_the_graft(runs, tmp_path, proved_here, kind):
    """Catches: a model that still wants peft or its base, and a graft that was merged itself."""
    graft = graft_of(runs(kind))
    target = export(runs(kind), tmp_path / "out", merged=True)
    names = set(files(target))
    assert "model.safetensors" in names
    assert not [name for name in names if "adapter" in name]
    assert not [name for name in load_file(target / "model.safetensors") if "lora" in name]
    assert (kind == "vit") == ("preprocessor_config.json" in names)
    assert export_check.expect(graft).effect > 1e-4


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of layer norms
@pytest.mark.parametrize(("kind", "merged"), [("houlsby-16", False), ("layernorm-16", False), ("layernorm-16", True)])
def test_what_was_trained_on_sixteen_bits_is_exported(runs, tmp_path, proved_here, caplog, kind, merged):
    """Catches: an export whose loader rounds the float32 head, and so computes another function than the run."""
    export(runs(kind), tmp_path / "out", merged=merged)
    assert "changes nothing" not in caplog.text


@pytest.mark.parametrize("kind", ["softmax", "bitfit-softmax"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_embedder_leaves_the_head_of_its_loss_behind(runs, tmp_path, unproved, kind, merged):
    """Catches: a tensor that no embedder knows, which loaders report as unexpected; a head cut off the graft itself."""
    graft = graft_of(runs(kind))
    assert graft.spec.parameters("head") == 3 * 32 * 3
    target = export(runs(kind), tmp_path / "out", merged=merged)
    written = files(target)
    tensors = next(name for name in written if name.endswith(".safetensors"))
    assert not [name for name in load_file(tmp_path / "out" / tensors) if "nli_head" in name]
    assert not [name for name, content in written.items() if name.endswith(".json") and b"nli_head" in content]
    if not merged:
        assert open_exported(target, read_config(runs(kind)).model.name).spec.parameters("head") == 0
    assert graft.base.transformer.nli_head is not None
    assert graft.read().any()


@pytest.mark.parametrize("merged", [False, True])
def test_a_classifier_that_pools_is_loaded_by_sentence_transformers(runs, tmp_path, merged):
    """Catches: a folder that only this program can read; a head that is saved twice, or left at its first values."""
    target = export(runs("mean"), tmp_path / "out", merged=merged)
    tensors = load_file(target / ("model.safetensors" if merged else "adapter_model.safetensors"))
    assert not [name for name in tensors if "classifier" in name]
    graft = graft_of(runs("mean"))
    graft.write(choose(runs("mean"), read_config(runs("mean")), graft, "best").vector)
    trained = unpack(graft.read(), graft.spec)
    head = load_file(target / "3_Dense" / "model.safetensors")
    assert set(head) == {"linear.weight", "linear.bias"}
    for name, values in head.items():
        assert any(np.array_equal(values, other) for key, other in trained.items() if "classifier" in key), name
    if merged:
        from sentence_transformers import SentenceTransformer

        loaded = SentenceTransformer(str(target), device="cpu")
        texts = ["the good clause", "a bad clause number 9 of the party"]
        shard = Shard({"text": texts})
        answers = [answer["label"] for answer in graft.task.predict(graft.base, shard, Generation())]
        assert [str(number) for number in loaded.encode(texts).argmax(axis=1)] == answers
        assert loaded[0].model.config.id2label == {0: "0", 1: "1"}


def test_what_auto_took_is_written_down(runs, tmp_path, unproved):
    """Catches: an export or a record that says "auto", so that nobody knows what the head reads."""
    run = runs("pair")
    assert read_config(run).task.pooling == "auto"
    spec = json.loads((run / "spec.json").read_text())
    assert spec["constants"] == {"pooling": "mean"}
    assert spec["settings"]["pooling"] == "mean"
    assert json.loads((run / "summary.json").read_text())["agreed"] == {"pooling": "mean"}
    target = export(run, tmp_path / "out")
    said = read_exported(target)
    assert said.task["pooling"] == "mean"
    assert said.head_file == "3_Dense/model.safetensors"
    assert "| pooling | mean |" in (target / "README.md").read_text()
    plain = json.loads((runs("lora") / "spec.json").read_text())["constants"]
    assert plain == {"pooling": "model", "train_pooler": "false"}


@pytest.mark.parametrize("kind", ["houlsby", "prefix-causal"])
def test_what_stands_between_layers_is_not_merged(runs, tmp_path, kind):
    """Catches: half an export left where merging is impossible."""
    with pytest.raises(ExportError) as caught:
        export(runs(kind), tmp_path / "out", merged=True)
    assert caught.value.code == "merge-unsupported"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model",
    [
        {"public_name": ""},
        {"name": "package:tiny/model", "public_name": ""},
        {"name": "base", "public_name": ""},
        {"public_name": "/home/operator/base"},
        {"public_name": "a/b/c"},
    ],
)
def test_a_base_without_a_public_name_is_refused(copied, tmp_path, monkeypatch, model):
    """Catches: a path of this machine named as the base, also one that looks like a hub id."""
    run = copied("lora")
    change(run, "model", **model)
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=r"model\.public_name") as caught:
        export(run)
    assert caught.value.code == "no-public-name"
    assert not (run / "adapter").exists()


def test_a_policy_is_exported_without_its_reward(copied, unproved):
    """Catches: a finished run that depends for ever on a folder that somebody may move or make anew."""
    run = copied("rlhf")
    change(run, "task", reward_adapter="/gone/reward")
    target = export(run)
    said = read_exported(target)
    assert said.task["reward_adapter"] == ""
    assert said.spec_sha256 == json.loads((run / "spec.json").read_text())["sha256"]
    assert "pipeline_tag: text-generation" in (target / "README.md").read_text()


def test_every_name_that_the_hub_takes_is_exported(copied, unproved):
    """Catches: a finished run that ends in a traceback of pydantic, which has another rule for names."""
    run = copied("lora")
    change(run, "model", public_name="_team/_model")
    assert read_exported(export(run)).base_name == "_team/_model"


def test_a_run_in_four_bits_is_exported_on_the_whole_base(copied, unproved):
    """Catches: an export that needs a GPU, or weights that were merged into packed ones."""
    run = copied("lora")
    change(run, "model", quantization="nf4", gradient_checkpointing=True)
    assert (export(run) / "adapter_model.safetensors").is_file()
    assert (export(run, merged=True) / "model.safetensors").is_file()


def test_a_merged_model_needs_no_public_name(copied, unproved):
    """Catches: a refusal where no base is named, and a card with the path of the base."""
    run = copied("lora")
    name = config_file.read(run / "config.toml").model.name
    change(run, "model", public_name="")
    for content in files(export(run, merged=True)).values():
        assert name.encode() not in content


def test_best_and_last_are_told_apart(copied, tmp_path, unproved):
    """Catches: the wrong adapter exported, values that never reach the model."""
    run = copied("lora")
    graft = graft_of(run)
    last = unpack(graft_vector(run, graft), graft.spec)
    set_best(run, graft_vector(run, graft) * 2, graft)
    graft.write(graft.initial)
    for which, factor in (("best", 2), ("last", 1)):
        found = load_file(export(run, tmp_path / which, which=which) / "adapter_model.safetensors")
        names = [name for name in last if "lora_" in name]
        assert names
        for name in names:
            exported = found[name.replace(".default", "")]
            assert np.array_equal(exported, last[name] * factor)


def graft_vector(run, graft):
    """Return the adapter of a run's last checkpoint."""
    from tsugiki.server.run import checkpoint

    config = config_file.read(run / "config.toml")
    return checkpoint.load(run / "checkpoint", config.fixed, graft.spec.sha256).vector


def test_an_export_has_the_same_bytes_each_time(runs, tmp_path, unproved):
    """Catches: dates, and peft's sets, whose order follows from the process's hash seed."""
    first = files(export(runs("lora"), tmp_path / "first"))
    assert files(export(runs("lora"), tmp_path / "second")) == first
    assert json.loads(first["adapter_config.json"])["target_modules"] == ["dense", "key", "query", "value"]


def test_an_adapter_without_effect_is_exported_and_called_so(copied, caplog, proved_here):
    """Catches: a run whose best adapter is its first one that cannot be exported, or passes for a trained one."""
    run = copied("embedding")
    graft = graft_of(run)
    set_best(run, graft.initial, graft)
    target = export(run, merged=True)
    assert "changes nothing" in caplog.text
    assert "The adapter changes nothing" in (target / "README.md").read_text()


def test_a_target_with_something_in_it_is_left_alone(runs, tmp_path, unproved):
    """Catches: an export over someone's files, and an empty folder that is refused."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(StorageError) as caught:
            export(runs("lora"), target)
        assert caught.value.code == "export-exists"
    assert files(tmp_path) == {"full/mine.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert (export(runs("lora"), tmp_path / "empty") / "adapter_config.json").is_file()


def damage_best(run):
    """Change one number."""
    path = run / "best" / "adapter.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).flat[0] += 1
    save_file(tensors, path)


DAMAGES = {
    "run-missing": lambda run: (run / "config.toml").unlink(),
    "run-unfinished": lambda run: (run / "spec.json").unlink(),
    "run-corrupt": damage_best,
    "spec-mismatch": lambda run: change(run, "adapter", alpha=8.0),
}


@pytest.mark.parametrize("code", DAMAGES)
def test_a_damaged_run_is_refused(copied, unproved, code):
    """Catches: an export of numbers that the run did not end with, or on a base that it was not trained on."""
    run = copied("lora")
    DAMAGES[code](run)
    with pytest.raises((StorageError, ExportError)) as caught:
        export(run)
    assert caught.value.code == code
    assert not (run / "adapter").exists()


def test_a_full_disk_is_a_storage_error(runs, tmp_path, monkeypatch):
    """Catches: an exception of safetensors' own at the end of a run, and half an export."""
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Lora, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        export(runs("lora"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
