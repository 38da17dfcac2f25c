"""AdapterFusion: the attention, what stays frozen, what is refused, and an export that stands alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.support.architectures import make, outputs, stir
from tests.support.exports import export_tiny, to_fuse
from tests.support.tiny import tiny_bert, tiny_sentence_transformer
from tsugiki.common.adapters.fusion import Fusion, FusionSettings
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model import load as model
from tsugiki.common.model.exported import EXPORTED_FILE, load_exported, open_exported
from tsugiki.common.model.load import load_graft

CLASSES = {"name": "sequence-classification"}


@pytest.fixture(autouse=True)
def no_graft_is_left():
    """Every test starts without a loaded base."""
    model.grafts.clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny BERT that embeds sentences, too. Read only."""
    return tiny_sentence_transformer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two exports on it. Read only."""
    return to_fuse(tmp_path_factory.mktemp("adapters"), base)


def fused(base, adapters, seed=1, task=None):
    """Return a graft with an attention over adapters."""
    adapter = {"method": "fusion", "adapters": tuple(map(str, adapters))}
    sections = {"task": task or CLASSES, "adapter": adapter, "train": {"device": "cpu"}}
    return load_graft(parse({"model": {"name": str(base)}, **sections}), str(base), seed)


def refused(base, adapters):
    """Return the code of what cannot be fused."""
    with pytest.raises(ModelError) as caught:
        fused(base, adapters)
    return caught.value.code


def place(graft, number=1):
    """Return the last of a block's places."""
    return graft.base.transformer.base_model.encoder.layer[number].output.dropout


def test_the_attention_is_the_papers(base, adapters):
    """Catches: a softmax over tokens or width; queries and keys mixed up; a residual that is lost or counted twice."""
    graft = fused(base, adapters)
    stir(graft.base.transformer)
    fusion, h = place(graft).fusion, torch.randn(2, 3, 32)
    q, k, v = (getattr(fusion, part).weight.T for part in ("query", "key", "value"))
    made = [part.up(part.activation(part.down(h))) for part in fusion.bottlenecks]
    expected = torch.empty_like(h)
    for row in range(2):
        for token in range(3):
            z = [one[row, token] for one in made]
            scores = torch.stack([(h[row, token] @ q) @ (one @ k) for one in z])
            weights = scores.exp() / scores.exp().sum()
            expected[row, token] = h[row, token] + sum(w * (one @ v) for w, one in zip(weights, z, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(place(graft)(h), expected, rtol=1e-4, atol=1e-5)
    assert weights.max() > 0.55  # of these two adapters the choice shows


def test_at_first_the_adapters_weigh_alike(base, adapters):
    """Catches: a value matrix that is not the identity, with which the adapters would begin as noise."""
    graft = fused(base, adapters)
    fusion, h = place(graft).fusion, torch.randn(2, 3, 32)
    assert torch.equal(fusion.value.weight, torch.eye(32))
    assert 0.01 < fusion.query.weight.std() < 0.03
    assert 0.01 < fusion.key.weight.std() < 0.03
    with torch.no_grad():
        fusion.query.weight.zero_()
        mean = sum(bottleneck(h) for bottleneck in fusion.bottlenecks) / 2
        torch.testing.assert_close(place(graft)(h), h + mean)


@pytest.mark.parametrize(("placement", "count"), [("houlsby", 2), ("pfeiffer", 1)])
def test_the_adapters_are_as_exported_and_frozen(base, tmp_path, placement, count):
    """Catches: adapters at chance, mixed up or trained; a place that is left out."""
    folders = to_fuse(tmp_path, base, placement=placement)
    graft = fused(base, folders)
    parameters = dict(graft.base.transformer.named_parameters())
    for number, folder in enumerate(folders):
        saved = load_file(f"{folder}/tsugiki_adapter.safetensors")
        for name, value in saved.items():
            if ".bottleneck." in name:
                found = parameters[name.replace(".bottleneck.", f".fusion.bottlenecks.{number}.")]
                assert torch.equal(found, value)
                assert not found.requires_grad
    assert sum(".fusion.bottlenecks." in name for name in parameters) == 2 * sum(".bottleneck." in key for key in saved)
    adapter = [tensor.name for tensor in graft.spec.tensors if tensor.part == "adapter"]
    assert len(adapter) == 2 * 3 * count  # blocks, matrices, places
    assert graft.spec.parameters("adapter") == len(adapter) * 32 * 32


def test_adapters_of_other_tasks_are_fused(base, tmp_path):
    """Catches: names that only fit the class of model that an adapter was trained in; another task's head expected."""
    adapter = {"method": "houlsby", "bottleneck": 3}
    export_tiny(tmp_path / "vectors", base, {"name": "sentence-embedding"}, adapter, 1)
    classes = {**CLASSES, "pooling": "model"}  # another class of model than an embedder's
    export_tiny(tmp_path / "classes", base, classes, adapter, 2)
    for task in (classes, {"name": "sentence-embedding"}):
        graft = fused(base, [tmp_path / "vectors", tmp_path / "classes"], task=task)
        kept = [bottleneck.up.bias for bottleneck in place(graft, 0).fusion.bottlenecks]
        for value, kind, prefix in zip(kept, ("vectors", "classes"), ("", "bert."), strict=True):
            saved = load_file(tmp_path / kind / "tsugiki_adapter.safetensors")
            assert torch.equal(value, saved[f"{prefix}encoder.layer.0.output.dropout.bottleneck.up.bias"])


def test_the_spec_tells_adapters_apart_and_not_their_folders(base, adapters, tmp_path):
    """Catches: a site with another adapter, order or nonlinearity that trains along; paths that make a site another."""
    first = fused(base, adapters).spec
    moved = [shutil.copytree(folder, tmp_path / f"moved-{number}") for number, folder in enumerate(adapters)]
    assert fused(base, moved).spec == first
    relu = {"method": "houlsby", "bottleneck": 4, "activation": "relu"}
    export_tiny(tmp_path / "relu", base, CLASSES, relu)
    shutil.copy(f"{adapters[1]}/tsugiki_adapter.safetensors", tmp_path / "relu")
    export_tiny(tmp_path / "third", base, CLASSES, {"method": "houlsby", "bottleneck": 4}, 9)
    others = (
        adapters[::-1],
        (adapters[0], tmp_path / "relu"),
        (adapters[0], tmp_path / "third"),
        (*adapters, tmp_path / "third"),
    )
    assert len({first.sha256, *(fused(base, other).spec.sha256 for other in others)}) == 5


def test_what_cannot_be_fused_is_refused(base, adapters, tmp_path):
    """Catches: an attention over one; bottlenecks in other places, or beside other layer norms, than they learned."""
    export_tiny(tmp_path / "lora", base, CLASSES, {"method": "lora", "rank": 2})
    pfeiffer = to_fuse(tmp_path / "pfeiffer", base, placement="pfeiffer")
    norms = to_fuse(tmp_path / "norms", base, train_layer_norm=True)
    for named in ((), adapters[:1], (adapters[0], tmp_path / "lora"), (adapters[0], pfeiffer[1]), norms):
        assert refused(base, named) == "adapter-fusion"
    assert refused(base, (adapters[0], tmp_path)) == "adapter-invalid"
    assert refused(base, (adapters[0], tmp_path / "gone")) == "adapter-missing"
    damaged = shutil.copytree(adapters[1], tmp_path / "damaged")
    (damaged / EXPORTED_FILE).unlink()
    assert refused(base, (adapters[0], damaged)) == "adapter-invalid"


def test_adapters_of_another_base_are_refused(adapters, tmp_path):
    """Catches: adapters whose shapes fit a base that they do not know."""
    assert refused(tiny_bert(tmp_path, seed=8), adapters) == "adapter-other-base"


def test_nothing_is_changed_by_adapters_that_do_not_fit(adapters):
    """Catches: half of the places filled before the error."""
    whole = make(auto=AutoModel)  # narrower
    names, before = [name for name, _ in whole.named_modules()], outputs(whole)
    with pytest.raises(ModelError) as caught:
        Fusion(FusionSettings(adapters=adapters)).attach(whole, ())
    assert caught.value.code == "adapter-invalid"
    assert [name for name, _ in whole.named_modules()] == names
    assert torch.equal(outputs(whole), before)


def test_an_export_stands_alone(base, tmp_path):
    """Catches: an export that wants the folders of the machine that made it, or names them."""
    to_fuse(tmp_path / "there", base)
    adapter = {"method": "fusion", "adapters": tuple(str(tmp_path / "there" / str(number)) for number in range(2))}
    graft = export_tiny(tmp_path / "export", base, CLASSES, adapter)
    wanted = outputs(graft.base.transformer)
    shutil.rmtree(tmp_path / "there")
    export = (tmp_path / "export").rename(tmp_path / "moved")
    for path in export.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    found = open_exported(export, str(base))
    assert found.spec == graft.spec
    torch.testing.assert_close(outputs(found.base.transformer), wanted, rtol=0, atol=1e-6)
    transformer = graft.task.load(base, torch.float32).transformer
    loaded = load_exported(export, transformer, fingerprint=graft.spec.base_fingerprint)
    torch.testing.assert_close(outputs(loaded), wanted, rtol=0, atol=1e-6)


def test_an_export_reaches_for_nothing_outside(base, adapters, tmp_path):
    """Catches: a path in a file from elsewhere that is followed on this machine."""
    export_tiny(tmp_path / "export", base, CLASSES, {"method": "fusion", "adapters": adapters})
    said = json.loads((tmp_path / "export" / EXPORTED_FILE).read_text())
    said["adapter"]["adapters"] = list(adapters)
    (tmp_path / "export" / EXPORTED_FILE).write_text(json.dumps(said))
    shutil.rmtree(tmp_path / "export" / "adapters")
    with pytest.raises(ModelError) as caught:
        open_exported(tmp_path / "export", str(base))
    assert caught.value.code == "adapter-missing"


def test_an_export_carries_nothing_away(base, tmp_path):
    """Catches: a file of this machine, to which an adapter from elsewhere has a link, copied into an export."""
    adapters = to_fuse(tmp_path / "there", base)
    (tmp_path / "secret").write_text("the private key of this machine")
    (tmp_path / "there" / "0" / "adapter_config.json").symlink_to(tmp_path / "secret")
    (tmp_path / "there" / "0" / "more.txt").write_text("more")
    export_tiny(tmp_path / "export", base, CLASSES, {"method": "fusion", "adapters": adapters})
    written = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    assert len(written) == 3 * 2
    assert not [path for path in written if b"private key" in path.read_bytes()]


@pytest.mark.parametrize("link", ["adapters", "adapters/1"])
def test_links_out_of_an_export_are_refused(base, adapters, tmp_path, link):
    """Catches: an export from elsewhere that reads, and hands on, an adapter of this machine."""
    export_tiny(tmp_path / "export", base, CLASSES, {"method": "fusion", "adapters": adapters})
    (tmp_path / "export" / link).rename(tmp_path / "private")
    (tmp_path / "export" / link).symlink_to(tmp_path / "private")
    with pytest.raises(ModelError) as caught:
        open_exported(tmp_path / "export", str(base))
    assert caught.value.code == "adapter-invalid"


def test_adapters_are_compared_with_their_own_spec(base, adapters, tmp_path):
    """Catches: a nonlinearity other than the one that an adapter was trained with, which no shape shows."""
    moved = shutil.copytree(adapters[1], tmp_path / "moved")
    said = json.loads((moved / EXPORTED_FILE).read_text())
    said["adapter"]["activation"] = "relu"
    (moved / EXPORTED_FILE).write_text(json.dumps(said))
    assert refused(base, (adapters[0], moved)) == "adapter-invalid"


def test_an_embedder_whose_head_stayed_behind_is_fused(base, adapters, tmp_path):
    """Catches: a spec with the head of a loss, which its export does not have."""
    from tsugiki.common.model.exported import write_exported

    task = {"name": "sentence-embedding", "loss": "softmax-nli"}
    graft = export_tiny(tmp_path / "headless", base, task, {"method": "houlsby", "bottleneck": 4})
    bare = graft.method.without_heads(graft.base.transformer)
    graft.method.save(bare, tmp_path / "headless", "tsugiki-tests/base")
    write_exported(tmp_path / "headless", graft, "float32", "tsugiki-tests/base", headless=True)
    assert fused(base, (adapters[0], tmp_path / "headless")).spec.parameters("adapter")


def test_each_adapter_is_read_once(base, adapters, tmp_path, monkeypatch):
    """Catches: files that change between what is compared, what is used and what is exported."""
    from tsugiki.common.adapters import fusion

    read, asked = fusion.read_tensors, []
    monkeypatch.setattr(fusion, "read_tensors", lambda path: asked.append(path) or read(path))
    export_tiny(tmp_path / "export", base, CLASSES, {"method": "fusion", "adapters": adapters})
    assert len(asked) == len(adapters)
