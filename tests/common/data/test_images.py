"""Files and folders of images: what is read, in which order, and that nothing large, broken or foreign is."""

import gzip
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tsugiki.common.data import images
from tsugiki.common.data.columns import Column
from tsugiki.common.data.images import odd, write_idx
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.errors import DataError
from tsugiki.common.settings import DataFormat

COLUMNS = (Column("image", "image"), Column("label", "label"))
LABELS = ("0", "1", "2")
PRIVATE = "Patient Jane hf_abc"
GREY = np.random.default_rng(1).integers(0, 256, (5, 4, 6)).astype(np.uint8)
COLOURED = np.random.default_rng(2).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
NUMBERS = [2, 0, 1, 1, 0]


def shard(path, labels=LABELS, **options):
    """Read images."""
    return read(path, COLUMNS, DataFormat(), labels=labels, **options)


def refusal(path, **options):
    """Return the error of images that must be refused, having checked that nothing private is in it or behind it."""
    with pytest.raises(DataError) as caught:
        shard(path, **options)
    error = caught.value
    while error is not None:
        assert PRIVATE not in str(error) + repr(error)
        error = error.__context__
    return caught.value


def packed(folder, name="train", pictures=GREY, numbers=NUMBERS):
    """Write idx files, compress them, and return the path of the pictures."""
    written = folder / write_idx(folder, name, pictures, numbers)
    beside = folder / f"{name}-labels-idx1-ubyte"
    for file in (written, beside):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return Path(f"{written}.gz")


def save(path, picture, mode=None, **options):
    """Save a picture, an array or one of Pillow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    (picture.convert(mode) if mode else picture).save(path, **options)


def classes(folder, pictures=GREY, numbers=NUMBERS):
    """Write a folder of pictures: each into its class, named by its row."""
    for row, (picture, number) in enumerate(zip(pictures, numbers, strict=True)):
        save(folder / LABELS[number] / f"{PRIVATE} {row}.png", picture)
    return folder


# idx files


@pytest.mark.parametrize("pictures", [GREY, COLOURED])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_give_their_pictures_and_labels(tmp_path, pictures, compressed):
    """Catches: rows and columns exchanged, big-endian sizes taken for little, labels of other rows, colours lost."""
    if compressed:
        path = packed(tmp_path, pictures=pictures)
    else:
        path = tmp_path / write_idx(tmp_path, "train", pictures, NUMBERS)
    found = shard(path)
    assert np.array_equal(found.columns["image"], pictures)
    assert found.columns["image"].dtype == np.uint8
    assert found.columns["label"] == NUMBERS
    assert {type(label) for label in found.columns["label"]} == {int}
    assert (len(found), found.notes) == (5, ())


def test_the_names_under_which_mnist_is_published(tmp_path):
    """Catches: labels looked for under the pictures' own name, a point in the name, one of two files unpacked."""
    path = tmp_path / write_idx(tmp_path, "t10k", GREY, NUMBERS)
    path = path.rename(tmp_path / "t10k-images.idx3-ubyte")
    (tmp_path / "t10k-labels-idx1-ubyte").rename(tmp_path / "t10k-labels.idx1-ubyte")
    assert shard(path).columns["label"] == NUMBERS
    labels = tmp_path / "t10k-labels.idx1-ubyte"
    labels.with_name(f"{labels.name}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert shard(path).columns["label"] == NUMBERS


def test_labels_are_the_tasks_classes(tmp_path):
    """Catches: a label beyond the classes trained on, or names taken in the order of the file."""
    path = tmp_path / write_idx(tmp_path, "train", GREY, NUMBERS)
    assert shard(path, labels=("cat", "dog", "bird")).columns["label"] == NUMBERS
    assert shard(path, labels=("2", "1", "0")).columns["label"] == [0, 2, 1, 1, 2]
    error = refusal(path, labels=("0", "1"))
    assert error.code == "shard-label-range"
    assert "1 of 5 pictures" in str(error)


def spoiled(change):
    """Return what writes idx files whose pictures are changed as bytes."""

    def write(folder):
        path = folder / write_idx(folder, "train", GREY, NUMBERS)
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


def header(*numbers):
    """Return what replaces the header of the pictures."""
    return lambda content: struct.pack(f">{len(numbers)}I", *numbers) + content[16:]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:10],
        lambda content: b"",
        header(0x00000803, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        header(0x00000803, 5, 0, 0),
        header(0x00000801, 5, 4, 6),
        header(0x00000D03, 5, 4, 6),
        header(0x03080000, 5, 4, 6),
        lambda content: PRIVATE.encode() + content,
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path, change):
    """Catches: memory taken as a header says, floats or signed numbers read as bytes, a tail cut off in silence."""
    assert refusal(spoiled(change)(tmp_path)).code == "shard-format"


@pytest.mark.parametrize(
    "content",  # named, since gzip writes the time, and all processes have to collect the same tests
    [
        pytest.param(gzip.compress(struct.pack(">4I", 0x803, 5, 4, 6) + bytes(119)), id="a pixel short"),
        pytest.param(gzip.compress(struct.pack(">4I", 0x803, 5, 4, 6) + bytes(120))[:-9], id="cut off"),
        pytest.param(gzip.compress(struct.pack(">4I", 0x803, 5, 4, 6) + bytes(120))[:-8] + bytes(8), id="checksum"),
        pytest.param(gzip.compress(struct.pack(">4I", 0x803, 2**20, 1000, 1000) + bytes(120)), id="terabytes"),
        pytest.param(gzip.compress(struct.pack(">4I", 0x803, 5, 4, 6) + bytes(50_000_000)), id="bomb"),
        pytest.param(PRIVATE.encode(), id="text"),
        pytest.param(b"\x1f\x8b\x08\x00" + PRIVATE.encode(), id="text behind a header"),
        pytest.param(b"", id="empty"),
    ],
)
def test_gzip_is_opened_as_far_as_its_header_says(tmp_path, content, monkeypatch):
    """Catches: a bomb inflated, terabytes taken for a header, a wrong checksum, a decoder's error chained to ours."""
    taken = []
    monkeypatch.setattr(images.np, "empty", lambda size, kind, own=np.empty: taken.append(size) or own(size, kind))
    path = packed(tmp_path)
    path.write_bytes(content)
    assert refusal(path).code == "shard-format"
    assert sum(taken) <= 120


def test_more_than_the_memory_for_images_is_refused(tmp_path, monkeypatch):
    """Catches: a bound on single pictures only."""
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert refusal(tmp_path / write_idx(tmp_path, "train", GREY, NUMBERS)).code == "shard-too-large"
    assert refusal(packed(tmp_path, "test")).code == "shard-too-large"
    assert refusal(classes(tmp_path / "folder")).code == "shard-too-large"


def test_labels_that_do_not_belong_are_refused(tmp_path):
    """Catches: labels missing, as many as there are not, or read from outside the site's folder."""
    path = tmp_path / "site" / "train-images-idx3-ubyte"
    path.parent.mkdir()
    write_idx(path.parent, "train", GREY, NUMBERS)
    beside = path.with_name("train-labels-idx1-ubyte")
    beside.write_bytes(struct.pack(">2I", 0x801, 4) + bytes(4))
    assert refusal(path).code == "shard-format"
    content = struct.pack(">2I", 0x801, 5) + bytes(5)
    beside.unlink()
    assert refusal(path).code == "shard-missing"
    (tmp_path / "labels").write_bytes(content)
    beside.symlink_to(tmp_path / "labels")
    assert refusal(path).code == "shard-outside"
    assert len(shard(path, inside=tmp_path)) == 5


# Folders


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    """Catches: the order in which a file system lists, another on each machine; classes numbered by their order."""
    pictures = [GREY[row] for row in (0, 1, 2, 3, 4)]
    found = shard(classes(tmp_path / "train", pictures))
    assert found.columns["label"] == [0, 0, 1, 1, 2]
    assert np.array_equal(found.columns["image"], GREY[[1, 4, 2, 3, 0]])
    named = tmp_path / "named"
    for name, row in (("dog", 0), ("cat", 1)):
        save(named / name / "a.png", GREY[row])
    found = shard(named, labels=("dog", "cat"))
    assert (found.columns["label"], found.notes) == ([1, 0], ())
    assert shard(named, labels=("dog", "cat", "1", "0")).columns["label"] == [1, 0]


def test_endings_and_hidden_files(tmp_path):
    """Catches: JPEG or an ending in capitals left out; what a desktop leaves in folders taken for a picture."""
    folder = classes(tmp_path / "train")
    save(folder / "0" / "x.JPG", GREY[0], quality=95)
    save(folder / "0" / "y.jpeg", COLOURED[0])
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "0" / ".DS_Store").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / "labels.txt").write_text("0\n1\n2\n")
    found = shard(folder)
    assert len(found) == 7
    assert found.columns["label"] == [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: (folder / "1" / f"{PRIVATE}.txt").write_text(PRIVATE), "shard-format"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").mkdir(), "shard-format"),
        (lambda folder: save(folder / f"{PRIVATE}.png", GREY[0]), "shard-format"),
        (lambda folder: save(folder / PRIVATE / "a.png", GREY[0]), "shard-label-range"),
        (lambda folder: (folder / PRIVATE).mkdir(), "shard-label-range"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").symlink_to("/etc/hostname"), "shard-outside"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").symlink_to(folder / "1" / f"{PRIVATE}.png"), "shard-outside"),
        (lambda folder: (folder / "3").symlink_to(folder.parent.parent), "shard-outside"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").symlink_to("nowhere"), "shard-outside"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").write_text(PRIVATE), "shard-image-broken"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").write_bytes(b""), "shard-image-broken"),
        (lambda folder: cut(folder / "1" / f"{PRIVATE} 2.png"), "shard-image-broken"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").write_bytes(other("GIF")), "shard-image-broken"),
        (lambda folder: (folder / "1" / f"{PRIVATE}.png").write_bytes(other("TIFF")), "shard-image-broken"),
        (lambda folder: save(folder / "1" / f"{PRIVATE}.png", Image.new("I;16", (6, 4))), "shard-image-mode"),
    ],
)
def test_what_does_not_belong_into_a_folder_is_refused(tmp_path, spoil, code):
    """Catches: rows lost in silence, links followed out of the site's folder, formats that nobody asked for."""
    folder = classes(tmp_path / "site" / "train")
    spoil(folder)
    assert refusal(folder).code == code


def cut(path):
    """Cut a file off."""
    path.write_bytes(path.read_bytes()[:-30])


def other(kind):
    """Return a picture as bytes of another format."""
    buffer = io.BytesIO()
    Image.fromarray(GREY[0]).save(buffer, kind)
    return buffer.getvalue()


def test_links_inside_the_folder_are_followed(tmp_path):
    """Catches: every link refused, as data sets made of links have them."""
    folder = classes(tmp_path / "train")
    (folder / "1" / "again.png").symlink_to(folder / "2" / f"{PRIVATE} 0.png")
    assert len(shard(folder)) == 6


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    """Catches: a class without rows because its folder is another user's."""
    folder = classes(tmp_path / "train")
    listing = images.os.scandir

    def scandir(path):
        if str(getattr(path, "path", path)).endswith("/1"):
            raise PermissionError(13, "denied", PRIVATE)
        return listing(path)

    monkeypatch.setattr(images.os, "scandir", scandir)
    assert refusal(folder).code == "shard-missing"


@pytest.mark.parametrize("folder", ["empty", "empty classes"])
def test_a_folder_without_pictures_is_empty(tmp_path, folder):
    """Catches: an exception about nothing to stack; a missing class taken for an error."""
    (tmp_path / folder).mkdir()
    if folder == "empty classes":
        (tmp_path / folder / "1").mkdir()
    assert refusal(tmp_path / folder).code == "shard-empty"


def png_header(width, height):
    """Return a PNG of a few bytes that says it is large."""
    body = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunks = b""
    for kind, content in ((b"IHDR", body), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("size", [(8000, 8000), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_not_decoded(tmp_path, size):
    """Catches: gigabytes taken for a file of 100 bytes; Pillow's own bound, or its warning, in the place of ours."""
    folder = classes(tmp_path / "train")
    (folder / "1" / f"{PRIVATE}.png").write_bytes(png_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(folder).code in ("shard-too-large", "shard-image-broken" if max(size) > 10**9 else "")


def test_large_pictures_are_shrunk_as_they_are_read(tmp_path, monkeypatch):
    """Catches: photographs kept whole; proportions lost; pictures of the usual sizes touched."""
    monkeypatch.setattr(images, "KEPT_SIDE", 32)
    wide = np.kron(np.array([[0, 250], [250, 0]], np.uint8), np.ones((60, 90), np.uint8))
    save(tmp_path / "train" / "0" / "a.png", wide)
    save(tmp_path / "train" / "0" / "b.jpg", wide, quality=95)
    for picture in shard(tmp_path / "train").columns["image"]:
        assert picture.shape == (32, 48)
        corners = picture[4, 4], picture[4, -4], picture[-4, 4], picture[-4, -4]
        assert [int(corner) > 125 for corner in corners] == [False, True, True, False]
    small = wide[:32]
    save(tmp_path / "other" / "0" / "a.png", small)
    assert np.array_equal(shard(tmp_path / "other").columns["image"], small[None])


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("1", (4, 6)), ("L", (4, 6)), ("LA", (4, 6)), ("P", (4, 6, 3)), ("RGB", (4, 6, 3)), ("RGBA", (4, 6, 3))],
)
def test_modes_become_grey_or_coloured(tmp_path, mode, shape):
    """Catches: numbers of a palette, or of two levels, taken for brightness; transparency as a channel."""
    picture = COLOURED[0] if len(shape) == 3 else 255 * (GREY[0] > 125).astype(np.uint8)
    save(tmp_path / "train" / "0" / "a.png", picture, mode)
    (found,) = shard(tmp_path / "train").columns["image"]
    assert (found.shape, found.dtype) == (shape, np.uint8)
    expected = np.asarray(Image.fromarray(picture).convert("P").convert("RGB")) if mode == "P" else picture
    assert np.array_equal(found, expected)


def test_a_palette_with_transparent_colours_is_read(tmp_path):
    """Catches: Pillow's warning about such a palette as an error, or the colours behind it lost."""
    picture = Image.fromarray(COLOURED[0]).convert("P")
    save(tmp_path / "train" / "0" / "a.png", picture, transparency=bytes(range(256)))
    assert shard(tmp_path / "train").columns["image"].shape == (1, 4, 6, 3)


def test_photographs_are_turned_upright(tmp_path):
    """Catches: EXIF's orientation ignored: half of a phone's pictures lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture = np.zeros((16, 24), np.uint8)
    picture[:, :8] = 255
    save(tmp_path / "train" / "0" / "a.jpg", picture, exif=exif, quality=95)
    (found,) = shard(tmp_path / "train").columns["image"]
    assert found.shape == (24, 16)
    assert found[2].mean() > 200
    assert found[-2].mean() < 50


# Shards of images


def test_mixed_sizes_stay_apart_and_are_counted(tmp_path):
    """Catches: an array of objects; a shard of several sizes that says nothing; the count of the whole on a part."""
    folder = classes(tmp_path / "train")
    save(folder / "1" / "x.png", GREY[0][:3])
    save(folder / "2" / "x.png", COLOURED[0])
    found = shard(folder)
    assert isinstance(found.columns["image"], list)
    assert found.notes == ("shard-images-mixed:2",)
    assert odd(found.columns["image"]) == 2
    assert found.take([0, 1]).notes == ("shard-one-class",)
    assert found.take([2, 4]).notes == ("shard-one-class", "shard-images-mixed:1")
    assert odd([]) == odd(GREY) == 0


def test_take_of_one_array_is_one_array():
    """Catches: 60,000 arrays in the place of one; a view that a later change of the whole reaches."""
    whole = Shard({"image": GREY.copy(), "label": NUMBERS})
    for rows in ([3, 0], np.array([3, 0]), range(3, -1, -3)):
        part = whole.take(rows)
        assert np.array_equal(part.columns["image"], GREY[[3, 0]])
        assert part.columns["label"] == [1, 2]
    whole.columns["image"][:] = 0
    assert part.columns["image"].any()
    assert len(whole.take([])) == 0
    assert "image" not in repr(whole)


def test_too_few_images(tmp_path):
    """Catches: data.min_rows forgotten for images."""
    path = tmp_path / write_idx(tmp_path, "train", GREY, NUMBERS)
    assert refusal(path, min_rows=6).code == "shard-too-small"
    assert len(shard(path, min_rows=5)) == 5


@pytest.mark.parametrize("name", ["train.csv", "train-labels-idx1-ubyte", "train-images-idx2-ubyte", "x.png"])
def test_other_files_hold_no_images(tmp_path, name):
    """Catches: a table of texts, or a single picture, given to a task that reads images: an exception of a decoder."""
    (tmp_path / name).write_text(f"image,label\n{PRIVATE},1\n")
    assert refusal(tmp_path / name).code == "shard-format"
    assert refusal(tmp_path / "missing-images-idx3-ubyte").code == "shard-missing"


def test_a_folder_is_no_table(tmp_path):
    """Catches: a folder let through to the readers of files."""
    with pytest.raises(DataError) as caught:
        read(classes(tmp_path / "train"), (Column("text", "text"),), DataFormat())
    assert caught.value.code == "shard-missing"


def test_a_folder_outside_is_refused(tmp_path):
    """Catches: the rule about relative paths not kept for folders."""
    folder = classes(tmp_path / "train")
    (tmp_path / "site").mkdir()
    assert refusal(tmp_path / "site" / ".." / "train", inside=tmp_path / "site").code == "shard-outside"
    assert len(shard(folder, inside=tmp_path)) == 5


def test_images_have_no_columns(tmp_path):
    """Catches: a mapping, or a column to split by, that is ignored in silence."""
    path = tmp_path / write_idx(tmp_path, "train", GREY, NUMBERS)
    assert refusal(path, extra_columns=("writer",)).code == "shard-columns"
    with pytest.raises(DataError) as caught:
        read(path, COLUMNS, DataFormat(columns={"label": "digit"}), labels=LABELS)
    assert caught.value.code == "shard-columns"


def test_every_file_that_is_read_is_stamped(tmp_path):
    """Catches: tokenised rows kept though the labels, or one of many pictures, have changed."""
    path = tmp_path / write_idx(tmp_path, "train", GREY, NUMBERS)
    assert images.files(path) == [path, tmp_path / "train-labels-idx1-ubyte"]
    assert images.files(packed(tmp_path, "test"))[1].name == "test-labels-idx1-ubyte.gz"
    folder = classes(tmp_path / "folder")
    stamped = images.files(folder)
    assert {file.name for file in stamped} == {"0", "1", "2", *(f"{PRIVATE} {row}.png" for row in range(5))}
    assert images.files(tmp_path / "rows.csv") == [tmp_path / "rows.csv"]
    name, size, time = images.stamp(path)
    assert (name, size) == (str(path), path.stat().st_size)
    assert time > 0
    assert images.stamp(tmp_path / "missing") == (str(tmp_path / "missing"), 0, 0)
    assert images.stamp(Path("a\0b")) == ("a\0b", 0, 0)


@pytest.mark.data
def test_mnist(real_data):
    """Catches: pictures on their side, labels of the other file, a copy for each row."""
    digits = tuple(str(digit) for digit in range(10))
    test = shard(real_data / "mnist" / "t10k-images-idx3-ubyte.gz", labels=digits)
    train = shard(real_data / "mnist" / "train-images-idx3-ubyte.gz", labels=digits)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.columns["image"].shape == (60_000, 28, 28)
    assert np.bincount(test.columns["label"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    ones = test.columns["image"][np.array(test.columns["label"]) == 1].mean(axis=0)
    assert ones.sum(axis=0).max() > 2 * ones.sum(axis=1).max()  # a one is tall
    assert len(train.take(range(0, 60_000, 2))) == 30_000
