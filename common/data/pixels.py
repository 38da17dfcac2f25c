"""From images, as `common/data/images.py` reads them, to what a model reads: one size, its channels, its scale."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from tsugiki.common.data.images import Images
from tsugiki.common.errors import ModelError

PREPROCESSING = "preprocessor_config.json"


@dataclass(frozen=True)
class Pixels:
    """How a model wants its images.

    Args:
        size: height and width.
        channels: 1, where colours become their luma (ITU-R 601); or 3, where grey is repeated.
        mean: of each channel, subtracted after bytes were multiplied by `scale`.
        std: of each channel, divided by after that.
        scale: factor on bytes of 0 to 255.
        resample: Pillow's number of the filter that resizes; 2 is bilinear.
        bleed: None: images are stretched to the size. Else they keep their proportions: this share is cut off each
            side, and what is over after that off both ends of the longer side.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    resample: int = 2
    bleed: float | None = None


def fit(images: Images, want: Pixels) -> npt.NDArray[np.uint8]:
    """Return images as bytes of shape (rows, height, width, channels); a view where there is nothing to do."""
    if isinstance(images, np.ndarray) and images.shape[1:3] == want.size:
        if images.ndim == 4 and want.channels == 3:
            return images
        if images.ndim == 3:
            return np.broadcast_to(images[..., None], (*images.shape, want.channels))
    fitted = np.empty((len(images), *want.size, want.channels), np.uint8)
    for row, image in enumerate(images):
        fitted[row] = _fit_one(image, want).reshape(fitted.shape[1:])
    return fitted


def _fit_one(image: npt.NDArray[np.uint8], want: Pixels) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps

    size = (want.size[1], want.size[0])
    method = Image.Resampling(want.resample)
    picture = Image.fromarray(image).convert("L" if want.channels == 1 else "RGB")
    if want.bleed is None:
        return np.asarray(picture.resize(size, method))
    return np.asarray(ImageOps.fit(picture, size, method, want.bleed))


class _Sides(BaseModel):
    """A size: both sides, or the shorter one."""

    height: int = Field(default=0, ge=8, le=2048)
    width: int = Field(default=0, ge=8, le=2048)
    shortest_edge: int = Field(default=0, ge=8, le=2048)


class _Preprocessing(BaseModel):
    """What is read of a `preprocessor_config.json`; where nothing is said, what `transformers` does."""

    model_config = ConfigDict(allow_inf_nan=False)

    size: _Sides | int
    crop_size: _Sides | int | None = None
    do_center_crop: bool | None = False
    crop_pct: float | None = Field(default=None, gt=0.5, le=1)
    do_rescale: bool | None = True
    rescale_factor: float = Field(default=1 / 255, gt=0)
    do_normalize: bool | None = True
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    resample: int = Field(default=2, ge=0, le=5)


def read_pixels(folder: Path, channels: int, image_size: int = 0) -> Pixels:
    """Return how a model wants its images, from its `preprocessor_config.json`.

    Args:
        folder: the model's.
        channels: that it reads.
        image_size: side of the images where there is no such file; 0: there has to be one.

    Raises:
        ModelError: `model-load`, there is none, or it is not for such images.
    """
    file = folder / PREPROCESSING
    try:
        content = json.dumps({"size": image_size}) if image_size and not file.exists() else file.read_text("utf-8")
        return _pixels(_Preprocessing.model_validate_json(content), channels)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{PREPROCESSING} of the model in {folder.name!r} does not say how it wants images of {channels} channels",
            "size, image_mean and image_std",
            "fetch the model again, or choose another",
            code="model-load",
        ) from error


def _pixels(said: _Preprocessing, channels: int) -> Pixels:
    crop = _both(said.crop_size) if said.do_center_crop and said.crop_size is not None else None
    edge = said.size.shortest_edge if isinstance(said.size, _Sides) else said.size if crop else 0
    size = crop or ((edge, edge) if edge else _both(said.size))
    bleed = None
    if edge:
        kept = min(1.0, min(crop) / edge) if crop else said.crop_pct or 1.0
        bleed = (1 - kept) / 2
    mean = said.image_mean or [0.5] * channels
    std = said.image_std or [0.5] * channels
    if not said.do_normalize:
        mean = [0.0] * channels
        std = [1.0] * channels
    if channels not in (1, 3) or {len(mean), len(std)} != {channels} or min(std) <= 0:
        raise ValueError("channels")
    if not 8 <= min(size) <= max(size) <= 2048:
        raise ValueError("size")
    scale = said.rescale_factor if said.do_rescale else 1.0
    return Pixels(size, channels, tuple(mean), tuple(std), scale, said.resample, bleed)


def _both(size: _Sides | int) -> tuple[int, int]:
    return (size.height, size.width) if isinstance(size, _Sides) else (size, size)
