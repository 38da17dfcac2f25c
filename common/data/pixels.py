"""Convert images, as `common/data/images.py` reads them, to the size, channels and scale of a model."""

from __future__ import annotations

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
    """The image format that a model reads.

    Args:
        size: height and width.
        channels: 1 (colours become their luma, ITU-R 601) or 3 (grey is repeated).
        mean: of each channel; subtracted after bytes are multiplied by `scale`.
        std: of each channel; the result is divided by it.
        scale: factor on bytes of 0 to 255.
        resample: Pillow's number of the resampling filter; 2 is bilinear.
        bleed: share that is cut off at each side; after that, images are cropped to the proportions of `size`. None:
            images are stretched to `size`.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    resample: int = 2
    bleed: float | None = None


def fit(images: Images, want: Pixels) -> npt.NDArray[np.uint8]:
    """Return images as bytes of shape (rows, height, width, channels); a view if they fit already."""
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
    """The fields of a `preprocessor_config.json` that are read, with the defaults of `transformers`."""

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
    """Return the image format of a model, from its `preprocessor_config.json`.

    Args:
        folder: the model's.
        channels: number of channels that the model reads.
        image_size: side of the images if the file is missing; 0: the file is required.

    Raises:
        ModelError: `model-load`, the file is missing, or does not describe such images.
    """
    file = folder / PREPROCESSING
    try:
        if image_size and not file.exists():
            return _pixels(_Preprocessing(size=image_size), channels)
        return _pixels(_Preprocessing.model_validate_json(file.read_text("utf-8")), channels)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{PREPROCESSING} of the model in {folder.name!r} does not say how it wants images of {channels} channels",
            "size, image_mean and image_std",
            "fetch the model again, or choose another",
            code="model-load",
        ) from error


def _pixels(said: _Preprocessing, channels: int) -> Pixels:
    size, bleed = _size_and_bleed(said)
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


def _size_and_bleed(said: _Preprocessing) -> tuple[tuple[int, int], float | None]:
    """Return the fields `size` and `bleed` of `Pixels`."""
    crop = None
    if said.do_center_crop and said.crop_size is not None:
        crop = _both(said.crop_size)
    # `edge` is the length to which the shorter side is resized; 0: images are stretched to `size`.
    edge = 0
    if isinstance(said.size, _Sides):
        edge = said.size.shortest_edge
    elif crop:
        edge = said.size
    if crop:
        size = crop
    elif edge:
        size = (edge, edge)
    else:
        size = _both(said.size)
    bleed = None
    if edge:
        # transformers resizes and then crops; here the share that its crop removes is cut off first.
        kept = said.crop_pct or 1.0
        if crop:
            kept = min(1.0, min(crop) / edge)
        bleed = (1 - kept) / 2
    return size, bleed


def _both(size: _Sides | int) -> tuple[int, int]:
    return (size.height, size.width) if isinstance(size, _Sides) else (size, size)
