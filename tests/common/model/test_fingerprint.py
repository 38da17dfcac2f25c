"""The fingerprint of a base: what changes it, and what does not."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.support.tiny import tiny_bert, tiny_sentence_transformer, tiny_vit
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.fingerprint import fingerprint
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny BERT without a head. Read only."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def identity(folder, task="sequence-classification"):
    """Return the fingerprint of a folder, loaded for a task."""
    task = TASKS.get(task)(TASKS.get(task).Settings())
    return fingerprint(folder, task.load(folder, torch.float32))


def test_a_head_does_not_change_the_fingerprint(bert, tmp_path):
    """Catches: random heads in the hash; the prefix of a model with a head taken for other tensors."""
    with_head = tmp_path / "with-head"
    network = AutoModelForSequenceClassification.from_pretrained(bert)
    network.save_pretrained(with_head)
    AutoTokenizer.from_pretrained(bert).save_pretrained(with_head)
    assert {name.split(".")[0] for name in load_file(with_head / WEIGHTS)} == {"bert", "classifier"}
    assert identity(with_head) == identity(bert)


def test_the_fingerprint_is_the_bases_not_the_tasks(tmp_path):
    """Catches: a hash over what a task loaded, so that two tasks on one base disagree."""
    folder = tiny_sentence_transformer(tmp_path)
    assert identity(folder, "sentence-embedding") == identity(folder, "sequence-classification")


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"])
def test_one_bit_changes_the_fingerprint(bert, tmp_path, name):
    """Catches: a hash over names, shapes or a sample of the numbers."""
    folder = shutil.copytree(bert, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert identity(folder) != identity(bert)


def test_tensors_under_older_names_belong_to_the_fingerprint(tmp_path):
    """Catches: a ViT of whose blocks nothing is hashed, because transformers renames them while it loads them."""
    folder = tiny_vit(tmp_path / "vit")
    tensors = load_file(folder / WEIGHTS)
    name = "encoder.layer.1.attention.attention.value.weight"
    other = shutil.copytree(folder, tmp_path / "other")
    save_file({**tensors, name: tensors[name] + 1}, other / WEIGHTS, {"format": "pt"})
    with_head = shutil.copytree(folder, tmp_path / "with-head")
    prefixed = {f"vit.{name}": value for name, value in tensors.items()}
    save_file({**prefixed, "classifier.weight": torch.ones(2, 16)}, with_head / WEIGHTS, {"format": "pt"})
    found = [identity(each, "image-classification") for each in (folder, other, with_head)]
    assert found[0] != found[1]
    assert found[0] == found[2]


def test_swapped_tensors_change_the_fingerprint(bert, tmp_path):
    """Catches: a sum of hashes, or bytes without their names."""
    folder = shutil.copytree(bert, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    first, second = (f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert identity(folder) != identity(bert)


def test_shards_do_not_change_the_fingerprint(bert, tmp_path):
    """Catches: only the first file read; the order of files in the hash."""
    AutoModel.from_pretrained(bert).save_pretrained(tmp_path, max_shard_size="30KB")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert identity(tmp_path) == identity(bert)


def test_what_is_not_loaded_does_not_change_the_fingerprint(bert, tmp_path):
    """Catches: another file of weights in the folder hashed in the place of the one that is loaded."""
    folder = shutil.copytree(bert, tmp_path / "model")
    tensors = {name: torch.zeros_like(value) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / "variant.safetensors", {"format": "pt"})
    assert identity(folder) == identity(bert)


def test_bfloat16_checkpoints(bert, tmp_path):
    """Catches: NumPy asked for a type that it does not have; one hash for two precisions of a base."""
    AutoModel.from_pretrained(bert, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    found = identity(tmp_path)
    assert len(found) == 64
    assert found != identity(bert)
    base = {"model": {"name": str(tmp_path)}, "train": {"device": "cpu"}}
    assert load_graft(parse(base), str(tmp_path), 1).spec.base_fingerprint == found


def test_equal_bytes_of_another_type_are_another_base(bert, tmp_path):
    """Catches: a hash over bytes alone."""
    found = set()
    for dtype in (torch.float16, torch.bfloat16):
        folder = shutil.copytree(bert, tmp_path / str(dtype))
        zeros = {name: torch.zeros_like(value, dtype=dtype) for name, value in load_file(folder / WEIGHTS).items()}
        save_file(zeros, folder / WEIGHTS, {"format": "pt"})
        found.add(identity(folder))
    assert len(found) == 2


def test_a_checkpoint_of_something_else(bert, tmp_path):
    """Catches: the hash of nothing, which all foreign checkpoints would share."""
    folder = shutil.copytree(bert, tmp_path / "model")
    base = TASKS.get("sequence-classification")(TASKS.get("sequence-classification").Settings()).load(
        folder, torch.float32
    )
    save_file({"unrelated": torch.zeros(2)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        fingerprint(folder, base)
    assert caught.value.code == "model-invalid"


def test_a_head_on_a_bare_transformer_does_not_change_the_fingerprint(tmp_path):
    """Catches: a loss's own head missed in the checkpoint, whose other tensors then count as the base's."""
    folder = tiny_sentence_transformer(tmp_path)
    save_file({**load_file(folder / WEIGHTS), "cls.bias": torch.ones(2)}, folder / WEIGHTS, {"format": "pt"})
    task = TASKS.get("sentence-embedding")
    headed = task(task.Settings(loss="softmax-nli")).load(folder, torch.float32)
    assert headed.heads
    assert fingerprint(folder, headed) == identity(folder, "sentence-embedding")
