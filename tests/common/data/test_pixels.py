"""Images become what a model reads, as its preprocessor_config.json says."""

import json

import numpy as np
import pytest
from PIL import Image

from tsugiki.common.data.pixels import PREPROCESSING, Pixels, fit, read_pixels
from tsugiki.common.errors import ModelError

GREY = np.random.default_rng(1).integers(0, 256, (3, 8, 10)).astype(np.uint8)
COLOURED = np.random.default_rng(2).integers(0, 256, (3, 8, 10, 3)).astype(np.uint8)


def want(size=(8, 10), channels=1, **others):
    """Return a wish for images."""
    return Pixels(size, channels, (0.5,) * channels, (0.5,) * channels, **others)


def test_images_that_fit_are_not_copied():
    """Catches: a second copy of 60,000 images, three of them for a model that reads colours."""
    for images, channels in ((GREY, 1), (GREY, 3), (COLOURED, 3)):
        fitted = fit(images, want(channels=channels))
        assert fitted.shape == (3, 8, 10, channels)
        assert np.shares_memory(fitted, images)
        for channel in range(channels):
            assert np.array_equal(fitted[..., channel], images[..., channel] if images.ndim == 4 else images)
    assert fit(GREY[:0], want()).shape == (0, 8, 10, 1)


def test_colours_become_their_luma():
    """Catches: the mean of the channels, or the red one, in the place of ITU-R 601."""
    pure = np.zeros((3, 8, 10, 3), np.uint8)
    for channel in range(3):
        pure[channel, ..., channel] = 255
    levels = fit(pure, want()).reshape(3, -1)
    assert [set(level.tolist()) for level in levels] == [{76}, {150}, {29}]  # 255 * (0.299, 0.587, 0.114)


def test_mixed_images_come_to_one_shape_in_their_order():
    """Catches: height and width exchanged, rows lost, a grey image in a shard of colours refused."""
    images = [COLOURED[0], GREY[1], COLOURED[2, :4], GREY[0, :, :5]]
    for channels in (1, 3):
        fitted = fit(images, want(channels=channels))
        assert fitted.shape == (4, 8, 10, channels)
        assert np.array_equal(fitted[1, ..., 0], GREY[1])
        expected = Image.fromarray(images[3]).resize((10, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(fitted[3, ..., 0], np.asarray(expected))
    assert np.array_equal(fitted[0], COLOURED[0])


def test_the_filter_is_the_models(tmp_path):
    """Catches: one filter for all models: other pixels than those that it was trained on."""
    nearest, bicubic = (fit(GREY, want((16, 16), resample=number)) for number in (0, 3))
    assert set(nearest.ravel()) <= set(GREY.ravel())
    assert not np.array_equal(nearest, bicubic)


def test_proportions_are_kept_where_the_model_crops():
    """Catches: a square squeezed from a wide image; the left part in the place of the middle."""
    wide = np.zeros((1, 32, 96), np.uint8)
    wide[:, :, 32:64] = 200  # a bright square in the middle
    stretched, cut, closer = (fit(wide, want((16, 16), bleed=bleed))[0, ..., 0] for bleed in (None, 0.0, 0.25))
    assert stretched[:, 0].max() == 0
    assert cut.min() > 150
    assert cut[:, 1:-1].min() == 200
    assert closer.min() == 200
    narrow = np.zeros((1, 96, 32), np.uint8)
    narrow[:, 40:56] = 200
    assert fit(narrow, want((16, 16), bleed=0.0))[0, :, 8, 0].tolist().count(200) < 10
    assert fit(narrow, want((16, 16), bleed=0.25))[0, :, 8, 0].tolist().count(200) > 12


def pixels(folder, channels=3, image_size=0, **said):
    """Return what is read of a preprocessor_config.json."""
    (folder / PREPROCESSING).write_text(json.dumps(said))
    return read_pixels(folder, channels, image_size)


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("said", "size", "bleed"),
    [
        ({"size": SQUARE}, (32, 32), None),  # ViT
        ({"size": {"height": 24, "width": 32}}, (24, 32), None),
        ({"size": 32}, (32, 32), None),  # ViT of old
        ({"size": {"shortest_edge": 32}, "crop_pct": 0.875}, (32, 32), 0.0625),  # ConvNeXT
        ({"size": {"shortest_edge": 32}}, (32, 32), 0.0),
        ({"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": SQUARE}, (32, 32), 0.25),  # ResNet
        ({"size": 64, "do_center_crop": True, "crop_size": 32}, (32, 32), 0.25),
        ({"size": SQUARE, "do_center_crop": False, "crop_size": {"height": 16, "width": 16}}, (32, 32), None),
        ({"size": SQUARE, "do_center_crop": None, "crop_size": None, "crop_pct": None}, (32, 32), None),
    ],
)
def test_sizes_in_all_their_forms(tmp_path, said, size, bleed):
    """Catches: height for width, the edge before cropping taken for the size, a crop that is switched off."""
    read = pixels(tmp_path, **said, image_mean=MEAN, image_std=STD)
    assert (read.size, read.bleed) == (size, bleed)
    assert (read.mean, read.std, read.channels) == (tuple(MEAN), tuple(STD), 3)


def test_scales(tmp_path):
    """Catches: bytes divided by 255 twice, or normalised where the model wants them as they are."""
    assert pixels(tmp_path, size=SQUARE) == Pixels((32, 32), 3, (0.5,) * 3, (0.5,) * 3, 1 / 255, 2, None)
    assert pixels(tmp_path, size=SQUARE, rescale_factor=0.5, resample=3).scale == 0.5
    assert pixels(tmp_path, size=SQUARE, resample=3).resample == 3
    raw = pixels(tmp_path, size=SQUARE, do_rescale=False, do_normalize=False, image_mean=MEAN, image_std=STD)
    assert (raw.scale, raw.mean, raw.std) == (1.0, (0.0,) * 3, (1.0,) * 3)


def test_a_model_of_ours_may_come_without(tmp_path):
    """Catches: the file ignored where it is there; a guessed size for a foreign model."""
    assert read_pixels(tmp_path, 1, 28) == Pixels((28, 28), 1, (0.5,), (0.5,))
    assert pixels(tmp_path, 1, 28, size=32, image_mean=[0.1], image_std=[0.3]).size == (32, 32)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"size": {"longest_edge": 32}}',
        '{"size": {"height": 32}}',
        '{"size": -32}',
        '{"size": 100000000}',
        '{"size": {"height": 32, "width": 1000000000}}',
        '{"size": "32x32"}',
        '{"size": 32, "image_mean": [0.5], "image_std": [0.5]}',
        '{"size": 32, "image_std": [0.5, 0, 0.5]}',
        '{"size": 32, "image_mean": [NaN, 0.5, 0.5]}',
        '{"size": 32, "resample": 17}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_says_nothing_of_use_is_coded(tmp_path, content):
    """Catches: a guess, or a KeyError, in the place of a refusal; gigabytes for one image."""
    if content is not None:
        (tmp_path / PREPROCESSING).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        read_pixels(tmp_path, 3)
    assert caught.value.code == "model-load"
    assert "3 channels" in str(caught.value)
