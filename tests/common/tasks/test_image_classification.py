"""Classification of images, by our own network and by a foreign one."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from torch import nn
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTModel

from tests.support.tiny import tiny_cnn, tiny_vit
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.errors import ConfigError, ModelError
from tsugiki.common.model.load import load_graft
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.tasks.image_classification import (
    MODEL_TYPE,
    ImageClassification,
    ImageClassificationSettings,
    _keep_statistics,
    small_cnn,
)
from tsugiki.common.tasks.rows import TokenRows


def make(**settings):
    """Return the task."""
    return ImageClassification(ImageClassificationSettings(**settings))


def rows(count=6, size=12, channels=()):
    """Return a shard of random images of two classes."""
    images = np.random.default_rng(3).integers(0, 256, (count, size, size, *channels)).astype(np.uint8)
    return Shard({"image": images, "label": [row % 2 for row in range(count)]})


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """The folder of a tiny network of ours. Read only."""
    return tiny_cnn(tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a tiny ViT. Read only."""
    return tiny_vit(tmp_path_factory.mktemp("vit"))


# The network


def test_the_network_is_as_described(tmp_path):
    """Catches: padding, another order of layers, another number of features than LoRA of rank 8 is counted on."""
    configuration, network_class = small_cnn()
    network = network_class(configuration()).eval()
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    assert shapes["conv1.weight"] == (32, 1, 3, 3)
    assert shapes["conv2.weight"] == (64, 32, 3, 3)
    assert network.fc.in_features == 1600
    pixels = torch.rand(3, 1, 28, 28)
    hidden = nn.functional.conv2d(pixels, network.conv1.weight, network.conv1.bias).relu()
    hidden = nn.functional.max_pool2d(hidden, 2)
    hidden = nn.functional.conv2d(hidden, network.conv2.weight, network.conv2.bias).relu()
    features = nn.functional.max_pool2d(hidden, 2).reshape(3, -1)
    with torch.no_grad():
        assert torch.allclose(network.features(pixels), features, atol=1e-6)
        assert torch.allclose(network(pixels).logits, network.fc(features), atol=1e-6)
    assert network.fc.out_features == configuration().num_labels == 2


def test_saved_and_loaded_it_is_the_same(cnn):
    """Catches: weights drawn anew on loading, a format other than safetensors, a configuration that forgets."""
    network = AutoModelForImageClassification.from_pretrained(cnn)
    assert type(network) is small_cnn()[1]
    stored = load_file(cnn / "model.safetensors")
    assert stored.keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(value, stored[name]) for name, value in network.named_parameters())
    assert json.loads((cnn / "config.json").read_text())["model_type"] == MODEL_TYPE
    assert (network.config.channels, network.config.image_size, network.config.num_labels) == (1, 12, 2)


def test_fresh_weights_follow_the_seed(tmp_path):
    """Catches: transformers' small normal initialisation, with which this network learns slowly; zeros."""
    configuration, network_class = small_cnn()
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(network_class(configuration()).conv2.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    bound = 1 / np.sqrt(32 * 9)
    assert 0.9 * bound < weights[0].abs().max() <= bound


def test_making_the_classes_again_changes_nothing():
    """Catches: a second registration, which transformers refuses, or a class unequal to itself."""
    assert small_cnn() is small_cnn()


def test_only_the_last_layer_carries_the_adapter(cnn):
    """Catches: a last layer that is exchanged in full; LoRA on convolutions; a base that says it has a head."""
    base = make(num_labels=2).load(cnn, torch.float32)
    assert (base.heads, base.tokenizer) == ((), None)
    config = parse({"task": {"name": "image-classification", "num_labels": 2}, "adapter": {"rank": 2}})
    graft = load_graft(config, str(cnn), 1)
    names = [tensor.name for tensor in graft.spec.tensors]
    assert [name.rsplit(".fc.", 1)[-1] for name in names] == ["lora_A.default.weight", "lora_B.default.weight"]
    assert graft.spec.size == 2 * (64 + 2)
    assert graft.spec.parameters("head") == 0


@pytest.mark.parametrize("count", [3, 10])
def test_a_network_of_other_classes_is_refused(cnn, count):
    """Catches: a last layer drawn anew and frozen, which no adapter of low rank makes good; classes left out."""
    with pytest.raises(ModelError) as caught:
        make(num_labels=count).load(cnn, torch.float32)
    assert caught.value.code == "model-classes"


# Foreign checkpoints


def test_a_foreign_checkpoint_gets_a_new_head(vit):
    """Catches: a backbone drawn anew, a head of two classes, names of classes lost."""
    base = make(labels=["cat", "dog", "bird"]).load(vit, torch.float32)
    assert isinstance(base.network, ViTForImageClassification)
    assert base.heads == ("classifier",)
    assert base.network.classifier.out_features == 3
    assert base.network.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    plain = ViTModel.from_pretrained(vit, add_pooling_layer=False).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in base.network.vit.state_dict().items())


def test_pixels_are_prepared_as_the_checkpoint_says(vit):
    """Catches: mean and standard deviation of another model, channels exchanged, bytes not scaled, labels moved."""
    task = make(num_labels=2)
    base = task.load(vit, torch.float32)
    shard = rows(size=16, channels=(3,))
    encoded = task.encode(shard, base)
    batch = task.batch(encoded, [4, 1], base)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    image = shard.columns["image"][4].astype(np.float64) / 255
    expected = (image - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    assert np.allclose(batch["pixel_values"][0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert batch["labels"].tolist() == [0, 1]
    assert encoded.images.dtype == np.uint8


def test_grey_images_and_other_sizes_are_brought_to_the_model(vit):
    """Catches: a batch of one channel, or of the file's size, for a model that reads three channels of 16 x 16."""
    task = make(num_labels=2)
    base = task.load(vit, torch.float32)
    batch = task.batch(task.encode(rows(size=20), base), range(6), base)
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    assert task.loss(base.network, batch).isfinite()
    assert base.pixels.resample == 3


def test_a_checkpoint_that_does_not_say_is_refused(vit, tmp_path):
    """Catches: ImageNet's mean for a model of X-rays."""
    tiny_vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        make(num_labels=2).load(tmp_path, torch.float32)
    assert caught.value.code == "model-load"


def test_a_foreign_checkpoint_trains_with_lora(vit):
    """Catches: peft's classes for tokens, which pass input_ids to a model of images; a head that is not exchanged."""
    config = parse({"task": {"name": "image-classification", "num_labels": 2}, "adapter": {"rank": 2}})
    graft = load_graft(config, str(vit), 1)
    task = graft.task
    batch = task.batch(task.encode(rows(size=16, channels=(3,)), graft.base), range(6), graft.base)
    task.loss(graft.base.network, batch).backward()
    assert graft.spec.parameters("head") == 2 * 16 + 2
    assert graft.spec.parameters("adapter") == 2 * 2 * 2 * (16 + 16)
    touched = [value.grad is not None for value in graft.parameters]
    assert all(touched)


def test_statistics_of_the_base_stay():
    """Catches: running means of batch norms that drift at every site and are never exchanged."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    _keep_statistics(network)
    network.train()
    network(torch.rand(4, 1, 8, 8))
    assert network[2].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# The task


def test_settings_name_the_classes():
    """Catches: ten classes where names are given, one class, the same name twice."""
    assert make().labels == tuple("0123456789")
    assert make(num_labels=3).labels == ("0", "1", "2")
    assert make(labels=["cat", "dog"]).labels == ("cat", "dog")
    for labels in (["cat"], ["cat", "cat"]):
        with pytest.raises(ConfigError):
            parse({"task": {"name": "image-classification", "labels": labels}})
    with pytest.raises(ConfigError):
        parse({"task": {"name": "image-classification", "num_labels": 1}})


def test_metrics_are_those_of_scikit_learn(cnn):
    """Catches: rows of the last batch lost, a mean of batches of unequal size, logits of another row."""
    task = make(num_labels=2)
    base = task.load(cnn, torch.float32)
    base.network.eval()
    shard = rows(count=11)
    encoded = task.encode(shard, base)
    with torch.no_grad():
        metrics = task.evaluate(base, encoded, 4)
        logits = base.network((torch.from_numpy(shard.columns["image"]).float()[:, None] / 255 - 0.5) / 0.5).logits
    predicted, labels = logits.argmax(dim=1), torch.tensor(shard.columns["label"])
    assert metrics["accuracy"] == pytest.approx((predicted == labels).float().mean().item())
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    assert set(metrics) == {"accuracy", "macro_f1", "loss"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_the_loss_in_whole(cnn, dtype):
    """Catches: pixels of another type than the weights; a loss rounded to eight bits."""
    task = make(num_labels=2)
    base = task.load(cnn, dtype)
    batch = task.batch(task.encode(rows(), base), range(6), base)
    assert batch["pixel_values"].dtype == dtype
    assert task.loss(base.network, batch).dtype == torch.float32


def test_many_images_are_not_copied_by_encoding(cnn):
    """Catches: floats of all images at once, four times the bytes, before a batch needs them."""
    task = make(num_labels=2)
    base = task.load(cnn, torch.float32)
    shard = rows(count=40)
    encoded = task.encode(shard, base)
    assert np.shares_memory(encoded.images, shard.columns["image"])
    assert len(encoded) == 40


def test_rows_of_another_task_are_refused(cnn):
    """Catches: an AttributeError of None deep inside torch."""
    task = make(num_labels=2)
    with pytest.raises(TypeError):
        task.batch(Encoded({"input_ids": TokenRows.of([[1]])}), [0], task.load(cnn, torch.float32))


@pytest.mark.data
def test_lora_on_the_last_layer_learns_digits(real_data, tmp_path):
    """Catches: pixels and labels that do not belong together, which a made-up case would not show."""
    task = make()
    shards = [
        read(real_data / "mnist" / f"{part}-images-idx3-ubyte.gz", task.columns, DataFormat(), labels=task.labels)
        for part in ("train", "t10k")
    ]
    graft = load_graft(
        parse({"task": {"name": "image-classification"}, "adapter": {"rank": 8}}),
        str(tiny_cnn(tmp_path, size=28, classes=10)),
        1,
    )
    train, test = (task.encode(shard.take(range(1000)), graft.base) for shard in shards)
    optimizer = torch.optim.AdamW(graft.parameters, lr=1e-2)
    for start in range(0, 1000, 20):
        loss = task.loss(graft.base.network, task.batch(train, range(start, start + 20), graft.base))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(graft.base, test, 100)["accuracy"] > 0.5  # 0.1 by chance
