"""Model cards: what they say, what they keep to themselves, and code that does what it says."""

import ast
import json
import runpy
import shutil
import tomllib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tests.support.tiny import PUBLIC_NAME, tiny_bert, tiny_cnn, tiny_llama, tiny_vit
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Generation
from tsugiki.common.tasks.decoding.templates import encode_prompts
from tsugiki.server.export import check as export_check
from tsugiki.server.export import probe as export_probe
from tsugiki.server.export.card import Export, _auto_class, card, loading_code
from tsugiki.server.export.export import _write

LINES = (
    {"round": 0, "eval": {"accuracy": 0.5, "loss": 0.7}},
    {"round": 1, "voided": True, "accepted": {"clinic-c": {}}},
    {"round": 1, "accepted": {"clinic-a": {}, "clinic-b": {}}, "eval": {"accuracy": 0.75, "loss": 0.6}},
    {"round": 2, "accepted": {"clinic-a": {}}, "eval": {"accuracy": 0.625, "loss": 0.65}},
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base."""
    torch.set_num_threads(1)
    return tiny_bert(tmp_path_factory.mktemp("base"))


def made(base, kind="peft", lines=LINES, has_effect=True, base_name=PUBLIC_NAME, **sections):
    """Return graft, configuration and export of a run on the tiny base."""
    raw = {
        "run": {"output_dir": "/home/operator/runs"},
        "model": {"name": str(base), "public_name": PUBLIC_NAME},
        "train": {"threads": 1, "device": "cpu"},
        "evaluation": {"data": "/home/operator/dev.csv"},
        "simulation": {"data": "/home/operator/train.csv"},
        "adapter": {"method": "lora", "rank": 2},
        **sections,
    }
    config = parse(raw)
    graft = load_graft(config, str(base), 1)
    code = loading_code(graft, config, kind, base)
    return graft, config, Export(kind, code, base_name, base, 1, lines, has_effect)


def parts(text):
    """Return front matter and page of a card."""
    from huggingface_hub import ModelCard

    loaded = ModelCard(text)
    return loaded.data.to_dict(), loaded.text


def test_a_card_has_the_sites_means_and_names_no_site(base):
    """Catches: "not evaluated" for an adapter that sites evaluated; a site's name beside its own figure."""
    measured = [
        {site: {"accuracy": value, "rows": 4} for site, value in (("clinic-a", first), ("clinic-b", second))}
        for first, second in ((0.5, 0.25), (0.75, 0.5))
    ]
    lines = [{"round": number, "sites_eval": found} for number, found in enumerate(measured)]
    text = parts(card(*made(base, lines=lines)))[1]
    assert "weighted means over 2 sites" in text
    assert "The worst site has accuracy 0.5000." in text
    assert "| sites_accuracy | 0.3750 | 0.6250 |" in text
    assert "clinic" not in text
    assert "operator's held-out" not in text


def test_a_card_says_how_the_adapter_came_about(base):
    """Catches: another round's metrics, sites of voided rounds counted, front matter that the hub cannot read."""
    graft, config, export = made(base)
    data, page = parts(card(graft, config, export))
    assert data == {
        "base_model": PUBLIC_NAME,
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["tsugiki", "federated-learning", "lora"],
    }
    adapter, head = graft.spec.parameters("adapter"), graft.spec.parameters("head")
    for line in (
        "| accuracy | 0.5000 | 0.7500 |",
        "| sites | 2 |",
        "| rounds | 2; this is the adapter after round 1 |",
        f"| parameters of the adapter | {adapter:,} |",
        f"| parameters of the head | {head:,} |",
        "| privacy | none |",
    ):
        assert line in page.splitlines()
    assert export.code in page
    assert "changes nothing" not in page


def test_a_card_names_no_site_and_no_path(base):
    """Catches: names of sites, folders and files of the operator on a page that is made to be published."""
    text = card(*made(base))
    assert "clinic" not in text
    assert "/home/operator" not in text
    assert str(base) not in text
    settings = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    assert settings["adapter"]["rank"] == 2
    assert "data" not in settings["evaluation"]


@pytest.mark.parametrize(
    ("sections", "kind", "library", "tag"),
    [
        ({}, "merged", "transformers", "text-classification"),
        ({"adapter": {"method": "houlsby"}}, "tsugiki", "tsugiki", "text-classification"),
        ({"task": {"name": "sentence-embedding"}}, "peft", "sentence-transformers", "sentence-similarity"),
        ({"task": {"name": "sentence-embedding"}}, "merged", "sentence-transformers", "sentence-similarity"),
    ],
)
def test_the_hub_is_told_which_library_loads_it(base, sections, kind, library, tag):
    """Catches: a card by which the hub offers code that cannot work."""
    data, _ = parts(card(*made(base, kind, **sections)))
    assert (data["library_name"], data["pipeline_tag"]) == (library, tag)


def test_the_code_says_how_a_model_wants_its_images(tmp_path):
    """Catches: texts asked of a model of images; our own network called one that others know; its numbers left out."""
    images = {"task": {"name": "image-classification", "num_labels": 2}}
    for make, library, numbers in (
        (tiny_cnn, "tsugiki", "(1, 1, 12, 12)"),
        (tiny_vit, "peft", "tensor([0.4, 0.5, 0.6])"),
    ):
        base = make(tmp_path / library)
        graft, config, export = made(base, model={"name": str(base), "public_name": PUBLIC_NAME}, **images)
        data, _ = parts(card(graft, config, export))
        assert (data["library_name"], data["pipeline_tag"]) == (library, "image-classification")
        assert numbers in export.code
        assert ("tsugiki.load_adapter(folder)" in export.code) == (library == "tsugiki")
        assert "okenizer" not in export.code


def test_a_card_without_evaluation_effect_or_base_says_so(base):
    """Catches: a crash, or an invented number, where there is nothing to tell."""
    data, page = parts(card(*made(base, "merged", lines=(), has_effect=False, base_name="")))
    assert "base_model" not in data
    assert "not evaluated" in page
    assert "The adapter changes nothing" in page


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_the_code_loads_named_classes_and_pairs(base, tmp_path, monkeypatch, kind):
    """Catches: code that forgets names of classes or the second text, or leaves the head at random."""
    task = {"name": "sequence-classification", "labels": ["it's no", "maybe", "yes"], "pair": True, "max_length": 24}
    graft, config, export = made(base, kind, task=task)
    config = config.model_copy(update={"model": config.model.model_copy(update={"public_name": str(base)})})
    rng = np.random.default_rng(5)
    graft.write(graft.initial + rng.normal(0, 0.1, graft.spec.size).astype(np.float32))
    expected = export_check.expect(graft)
    _write(graft, tmp_path, export, "float32")
    (tmp_path / "load.py").write_text(loading_code(graft, config, kind, base))
    monkeypatch.chdir(tmp_path)
    loaded = runpy.run_path("load.py")
    assert loaded["model"].config.id2label == {0: "it's no", 1: "maybe", 2: "yes"}
    assert loaded["logits"].shape == (1, 3)
    assert expected.effect > 1e-3
    found = export_probe.outputs(loaded["model"], loaded["tokenizer"], pair=True, max_length=24)
    assert np.abs(found - expected.outputs).max() < 1e-6


@pytest.mark.parametrize("method", ["lora", "dora", "merged"])
@pytest.mark.parametrize("pair", [False, True])
def test_the_code_of_a_pooled_classifier_names_classes(base, tmp_path, monkeypatch, method, pair):
    """Catches: logits in place of names; a head at random; pairs read as two texts; an import of this program."""
    task = {"name": "sequence-classification", "labels": ["it's no", "mäßig", "yes"], "pair": pair, "max_length": 24}
    adapter = {"method": "lora", "rank": 2, "use_dora": method == "dora"}
    kind = "merged" if method == "merged" else "peft"
    graft, config, export = made(base, kind, task=task | {"pooling": "mean"}, adapter=adapter)
    assert "tsugiki" not in export.code.replace(PUBLIC_NAME, "")
    library = {"lora": "sentence-transformers", "dora": "peft", "merged": "sentence-transformers"}[method]
    data, page = parts(card(graft, config, export))
    assert (data["library_name"], data["pipeline_tag"]) == (library, "text-classification")
    assert "| pooling | mean |" in page.splitlines()
    rng = np.random.default_rng(5)
    graft.write(graft.initial + rng.normal(0, 0.1, graft.spec.size).astype(np.float32))
    expected = export_check.expect(graft)
    public = shutil.copytree(base, tmp_path / "public")
    folder = tmp_path / "export"
    folder.mkdir()
    _write(graft, folder, export, "float32")
    if kind == "peft":  # this process has read its environment, so the hub's name is a folder's here
        said = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": str(public)}))
    monkeypatch.chdir(folder)
    (tmp_path / "load.py").write_text(export.code.replace(PUBLIC_NAME, str(public)))
    loaded = runpy.run_path(str(tmp_path / "load.py"))
    rows = {"text": ["One text."], "text_pair": ["The other one."]} if pair else {"text": ["One text.", "Another one."]}
    answers = graft.task.predict(graft.base, Shard(rows), Generation())
    assert loaded["labels"] == [answer["label"] for answer in answers]
    assert expected.effect > 1e-3
    found = export_probe.outputs(loaded["model"], None, pair=pair)
    assert np.abs(found - expected.outputs).max() < 1e-6


def test_the_code_gives_decoders_their_pad_token(base, tmp_path):
    """Catches: a loaded decoder that cannot tell where a text ends, as its base's own configuration does not."""
    folder = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    _, _, export = made(folder)
    assert "    pad_token_id=0,\n" in export.code
    assert "pad_token_id" not in made(base)[2].code


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_the_code_loads_a_language_model_with_its_output_layer(tmp_path, method):
    """Catches: `AutoModel`, which has no logits; a pad token or labels that the base does not have."""
    folder = tiny_llama(tmp_path / "base")
    kind = "peft" if method == "lora" else "tsugiki"
    graft, config, export = made(folder, kind, task={"name": "causal-lm"}, adapter={"method": method})
    loading = f'model = AutoModelForCausalLM.from_pretrained(\n    "{PUBLIC_NAME}",\n    dtype="float32",\n)'
    assert (loading if method == "lora" else "model = tsugiki.load_adapter(folder)") in export.code
    assert parts(card(graft, config, export))[0]["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_asks_in_the_adapters_own_template(tmp_path, chat):
    """Catches: a reward or an answer to a bare text, where all that was trained stood in a template."""
    folder = tiny_llama(tmp_path / "base", bos=not chat)
    if chat:
        template = "{% for one in messages %}user: {{ one['content'] }}{{ eos_token }}{% endfor %}"
        (folder / "chat_template.jinja").write_text(template)
    graft, _, export = made(folder, task={"name": "preference"})
    last = export.code.splitlines()[-1]
    calls = [one for one in ast.walk(ast.parse(last)) if isinstance(one, ast.Call)]
    (call,) = (one for one in calls if isinstance(one.func, ast.Name) and one.func.id == "tokenizer")
    how = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg != "return_tensors"}
    asked = graft.base.tokenizer(ast.literal_eval(call.args[0]), **how)
    shard = Shard({"prompt": ["One prompt."]})
    assert asked["input_ids"] == encode_prompts(shard, graft.base.tokenizer, graft.task.settings.template)[0]
    assert ("Instruction" in last) != chat


def test_language_models_under_older_names_have_an_auto_class_too():
    """Catches: GPT2LMHeadModel loaded as `AutoModel`."""
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    assert _auto_class(gpt2) == "AutoModelForCausalLM"
    assert _auto_class(gpt2.transformer) == "AutoModel"
