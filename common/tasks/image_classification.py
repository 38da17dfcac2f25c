"""Image classification with our own small convolutional network or any checkpoint of `transformers`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tsugiki.common.adapters.base import require_heads
from tsugiki.common.data.columns import Column
from tsugiki.common.data.pixels import Pixels, fit, read_pixels
from tsugiki.common.errors import ModelError
from tsugiki.common.settings import HeadedSettings
from tsugiki.common.tasks.base import TASKS, Base, Batch, Encoded, Tail, Task, TinyCase
from tsugiki.common.tasks.classes import class_loss, class_metrics, named_classes

if TYPE_CHECKING:
    import torch

    from tsugiki.common.data.shard import Shard
    from tsugiki.common.tasks.base import Generation

MODEL_TYPE = "tsugiki-cnn"
"""`config.model_type` of our own network."""


class ImageClassificationSettings(HeadedSettings):
    """Any number of classes; accuracy, macro-F1 and loss."""

    name: Literal["image-classification"] = Field(default="image-classification", description="The task.")
    num_labels: int = Field(
        default=10, ge=2, le=10_000, description="Number of classes, if the files name them by plain numbers."
    )


@TASKS.register("image-classification")
class ImageClassification(Task):
    """`AutoModelForImageClassification` with cross-entropy; `SmallCnn` is one such model.

    A checkpoint of `transformers` gets a new `classifier`, which is trained and exchanged. `SmallCnn` has no separate
    head: its last layer is a part of the base, and carries the adapter.
    """

    name = "image-classification"
    base_kind = "vision"
    Settings = ImageClassificationSettings
    row_losses = True
    adjusts_logits = True

    @property
    def monitor(self) -> str:
        """Accuracy."""
        return "accuracy"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The image, and its class."""
        return (Column("image", "image"), Column("label", "label"))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes by name, in order."""
        return self.settings.labels or tuple(str(label) for label in range(self.settings.num_labels))

    @property
    def pipeline_tag(self) -> str | None:
        """The model hub's name for this task."""
        return "image-classification"

    def load(self, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
        """Load the base. Except for our own network, its head is new unless the checkpoint has one of the same shape.

        Raises:
            ModelError: `model-classes`, our own network has another number of classes; `head-missing`, the model has no
                module `classifier`; `model-load`, the model's image format is not given.
        """
        from transformers import AutoConfig, AutoModelForImageClassification

        small_cnn()
        safe: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, **how}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type == MODEL_TYPE:
            if config.num_labels != len(self.labels):
                raise ModelError(
                    f"the model tells {config.num_labels} classes apart",
                    f"{len(self.labels)}, as in the run's task.labels or task.num_labels",
                    "set task.num_labels, or train the base on as many classes",
                    code="model-classes",
                )
            network = AutoModelForImageClassification.from_pretrained(folder, **safe)
            return Base(network, network, None, pixels=read_pixels(folder, config.channels, config.image_size))
        pixels = read_pixels(folder, getattr(config, "num_channels", 3))
        network = AutoModelForImageClassification.from_pretrained(
            folder,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: index for index, label in enumerate(self.labels)},
            ignore_mismatched_sizes=True,
            **safe,
        )
        require_heads(network, ("classifier",))
        _keep_statistics(network)
        return Base(network, network, None, ("classifier",), pixels)

    def encode(self, shard: Shard, base: Base) -> Encoded:
        """Convert all images to the model's size and channels; they stay bytes."""
        want: Pixels = base.pixels
        labels = shard.columns.get("label")
        targets = None if labels is None else np.asarray(labels, np.int64)
        return Encoded({}, targets, fit(shard.columns["image"], want))

    def batch(self, encoded: Encoded, rows: Sequence[int], base: Base) -> Batch:
        """Return `pixel_values` of shape (rows, channels, height, width), normalised, and `labels` of (rows,)."""
        import torch

        if encoded.images is None:
            raise TypeError("rows of another task")
        want: Pixels = base.pixels
        numbers = torch.from_numpy(encoded.images[list(rows)]).permute(0, 3, 1, 2).contiguous().float()
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (want.mean, want.std))
        batch = {"pixel_values": ((numbers * want.scale - mean) / std).to(base.transformer.dtype)}
        if encoded.targets is not None:
            batch["labels"] = torch.from_numpy(encoded.targets[list(rows)])
        return batch

    def loss(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy, computed in float32."""
        return class_loss(self.logits(network, batch), batch)

    def logits(self, network: Any, batch: Batch) -> torch.Tensor:
        """Return the logits of a batch, shape (rows, classes), float32."""
        logits: torch.Tensor = network(pixel_values=batch["pixel_values"]).logits.float()
        return logits

    def tail(self, base: Base, encoded: Encoded) -> Tail | None:
        """Return the last layer of our own network if it contains all trained parameters, else None."""
        import torch
        from torch.nn.functional import cross_entropy

        inner = getattr(base.network, "base_model", base.network)
        cnn = getattr(inner, "model", inner)
        trained = [name for name, value in cnn.named_parameters() if value.requires_grad]
        if not isinstance(cnn, small_cnn()[1]) or not all(name.startswith("fc.") for name in trained):
            return None
        device = next(cnn.parameters()).device
        parts = []
        with torch.no_grad():
            for start in range(0, len(encoded), 1024):
                rows = range(start, min(start + 1024, len(encoded)))
                pixels = self.batch(encoded, rows, base)["pixel_values"]
                parts.append(cnn.features(pixels.to(device)))
        return Tail(cnn.fc, torch.cat(parts), lambda logits, labels: cross_entropy(logits, labels, reduction="none"))

    def evaluate(self, base: Base, encoded: Encoded, batch_size: int) -> dict[str, float]:
        """Return accuracy, macro_f1 (over the classes that occur or are predicted) and loss."""
        return class_metrics(self._logits(base, encoded, batch_size), encoded.targets)

    @property
    def prediction_columns(self) -> tuple[Column, ...]:
        """The image."""
        return self.columns[:1]

    def predict(self, base: Base, shard: Shard, generation: Generation) -> list[dict[str, Any]]:
        """Return each row's `label`, and its `probability`."""
        return named_classes(self._logits(base, self.encode(shard, base), 64), self.labels)

    def _logits(self, base: Base, encoded: Encoded, batch_size: int) -> torch.Tensor:
        """Return the logits of all rows, shape (rows, classes)."""
        import torch

        device = next(base.network.parameters()).device
        logits = torch.empty(len(encoded), len(self.labels))
        for start in range(0, len(encoded), batch_size):
            rows = range(start, min(start + batch_size, len(encoded)))
            pixels = self.batch(encoded, rows, base)["pixel_values"].to(device)
            with torch.no_grad():
                logits[start : rows.stop] = base.network(pixel_values=pixels).logits.float().cpu()
        return logits

    @classmethod
    def test_case(cls) -> TinyCase:
        """Two classes that differ in their bright half."""
        images = np.random.default_rng(0).integers(0, 100, (24, 12, 12)).astype(np.uint8)
        images[::2, :, :6] += 150
        images[1::2, :, 6:] += 150
        return TinyCase({"num_labels": 2}, {"image": images, "label": [1, 0] * 12}, MODEL_TYPE)


@cache
def small_cnn() -> tuple[Any, Any]:
    """Return the classes `SmallCnnConfig` and `SmallCnn`, registered with the Auto classes of `transformers`.

    They are made by the first call, because importing this module must not import `transformers`.
    """
    from torch import nn
    from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

    class SmallCnnConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not typed
        """Channels and side of the images; `num_labels` is a setting of every configuration."""

        model_type = MODEL_TYPE

        def __init__(self, channels: int = 1, image_size: int = 28, **settings: Any) -> None:
            self.channels = channels
            self.image_size = image_size
            super().__init__(**settings)

    class SmallCnn(PreTrainedModel):  # type: ignore[misc]
        """Two convolutions, and a fully connected layer on their 1,600 features (of images of 28 x 28)."""

        config_class = SmallCnnConfig
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            side = ((config.image_size - 2) // 2 - 2) // 2
            self.conv1 = nn.Conv2d(config.channels, 32, 3)
            self.conv2 = nn.Conv2d(32, 64, 3)
            self.fc = nn.Linear(64 * side * side, config.num_labels)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()

        def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            """Return the features that the last layer reads.

            Args:
                pixel_values: of shape (rows, channels, image_size, image_size).

            Returns:
                Shape (rows, 1600) for images of 28 x 28.
            """
            hidden = nn.functional.max_pool2d(nn.functional.relu(self.conv1(pixel_values)), 2)
            hidden = nn.functional.max_pool2d(nn.functional.relu(self.conv2(hidden)), 2)
            return hidden.flatten(1)

        def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
            """Return the `logits`, shape (rows, num_labels)."""
            return ImageClassifierOutputWithNoAttention(logits=self.fc(self.features(pixel_values)))

    AutoConfig.register(MODEL_TYPE, SmallCnnConfig)
    AutoModelForImageClassification.register(SmallCnnConfig, SmallCnn)
    return SmallCnnConfig, SmallCnn


def _keep_statistics(network: Any) -> None:
    """Keep batch norms in eval mode for good: their running statistics belong to the base and are not exchanged."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.train = types.MethodType(_stay, module)  # type: ignore[method-assign]


def _stay(module: Any, mode: bool = True) -> Any:
    return module
