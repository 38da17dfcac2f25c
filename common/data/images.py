"""Read pictures from idx files, the format of MNIST, or from folders with one subfolder per class.

Sizes are checked before anything is decoded. As in `common/data/table.py`, an error contains counts and positions,
never a picture or its name, and is not chained to a decoder's exception.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import DataError

Picture = npt.NDArray[np.uint8]
Images = Picture | list[Picture]
"""Grey pictures of shape (height, width), coloured ones of (height, width, 3): one array if all shapes are equal."""

Located = Callable[[Path], Path]
"""Follows a path to a file or folder that may be read, or raises a DataError."""

MAX_BYTES = 2**32
"""Limit for all decoded pictures of a shard together."""

MAX_PIXELS = 50_000_000
"""Limit for one picture as it is stored."""

KEPT_SIDE = 512
"""Pixels of the shorter side. Larger pictures of a folder are shrunk to this, so that photographs fit into memory."""

_IDX = re.compile(r"(?P<stem>.*)images(?P<joint>[-.])idx(?P<dimensions>[34])-ubyte(\.gz)?")
_ENDINGS = (".png", ".jpg", ".jpeg")
_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")
_MOST_INFLATED = 1032
"""The most bytes that one byte of gzip can become, by the design of deflate."""


def read(path: Path, located: Located, classes: Mapping[str, int], expected: str) -> tuple[Images, list[int]]:
    """Return the pictures at `path` and the class of each.

    A folder's pictures are sorted by the name of their subfolder, then by their own name. They are turned upright as
    their EXIF data say, and lose their transparency. Hidden entries (a dot before the name) are left out.

    Args:
        path: `...images-idx3-ubyte`, or `.gz`, beside `...labels-idx1-ubyte` (idx4: coloured pictures); or a folder
            with one subfolder per class, which contains PNG and JPEG files.
        located: decides which files may be read.
        classes: class number by label. The label is a number in an idx file, or a subfolder's name.
        expected: the known labels in words, for errors.

    Raises:
        DataError: with the code `shard-missing`, `shard-outside`, `shard-format`, `shard-label-range`,
            `shard-too-large`, `shard-image-broken` or `shard-image-mode`.
    """
    target = located(path)
    if target.is_dir():
        return _read_folder(path, target, located, classes, expected)
    if not (matched := _IDX.fullmatch(path.name)):
        raise DataError(
            f"no pictures can be read from {path}",
            "NAME-images-idx3-ubyte beside NAME-labels-idx1-ubyte (also .gz), or a folder with one subfolder a class",
            "rename or convert the data",
            code="shard-format",
        )
    images = _array(path, target, int(matched["dimensions"]))
    beside = _labels_beside(path, matched)
    numbers = _array(beside, located(beside), 1)
    if len(numbers) != len(images):
        raise DataError(
            f"{beside} has {len(numbers)} labels", f"{len(images)}, as many as there are pictures", code="shard-format"
        )
    # Labels are bytes, so a table of 256 entries covers them all; -1 marks an unknown one.
    known = np.array([classes.get(str(number), -1) for number in range(256)])
    found = known[numbers]
    _refuse_labels(path, int((found < 0).sum()), f"of {len(found)} pictures", expected)
    return images, [int(number) for number in found]


def files(path: Path) -> list[Path]:
    """Return every file that reading `path` may look at: the data have changed only if one of these has."""
    if matched := _IDX.fullmatch(path.name):
        return [path, _labels_beside(path, matched)]
    if not path.is_dir():
        return [path]
    top = _entries(path) or []
    inner = [one for folder in top if folder.is_dir() for one in _entries(folder) or []]
    return [Path(one) for one in (*top, *inner)]


def stamp(file: Path) -> tuple[str, int, int]:
    """Return path, size in bytes and modification time in nanoseconds; both are 0 if the file is missing."""
    with suppress(OSError, ValueError):
        found = file.stat()
        return str(file), found.st_size, found.st_mtime_ns
    return str(file), 0, 0


def write_idx(folder: Path, name: str, images: Picture, numbers: Sequence[int]) -> str:
    """Write pictures of one shape and their labels into a folder; return the name of the file to read."""
    beside = folder / f"{name}-labels-idx1-ubyte"
    written = folder / f"{name}-images-idx{images.ndim}-ubyte"
    for path, array in ((written, images), (beside, np.asarray(numbers, np.uint8))):
        header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
        path.write_bytes(header + array.tobytes())
    return written.name


def odd(images: Images) -> int:
    """Return how many pictures do not have the most common shape."""
    if isinstance(images, np.ndarray) or not images:
        return 0
    return len(images) - Counter(image.shape for image in images).most_common(1)[0][1]


def _labels_beside(path: Path, matched: re.Match[str]) -> Path:
    """Return the path of the labels: compressed like the pictures, unless only the other form exists."""
    plain = path.with_name(f"{matched['stem']}labels{matched['joint']}idx1-ubyte")
    packed = path.with_name(f"{plain.name}.gz")
    first, other = (packed, plain) if path.name.endswith(".gz") else (plain, packed)
    return other if other.is_file() and not first.is_file() else first


def _array(path: Path, target: Path, dimensions: int) -> Picture:
    """Return the array that an idx file contains."""
    found = None
    try:
        with gzip.open(target) if path.name.endswith(".gz") else target.open("rb") as file:
            found = _idx(path, file, dimensions, target.stat().st_size, path.name.endswith(".gz"))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        found = None  # raised below, not chained to these: they may repeat bytes of the file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "a readable file", code="shard-missing") from error
    if found is None:
        raise DataError(
            f"{path} is no idx file, or cut off or damaged",
            f"unsigned bytes in {dimensions} dimensions, as many as its first bytes say",
            "fetch the file again",
            code="shard-format",
        )
    return found


def _idx(path: Path, file: Any, dimensions: int, stored_bytes: int, packed: bool) -> Picture | None:
    """Return the array, or None if the file is invalid. Memory is allocated only for what the file can contain."""
    header = file.read(4 * (1 + dimensions))
    if len(header) < 4 * (1 + dimensions) or header[:4] != bytes((0, 0, 8, dimensions)):
        return None
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    possible = size <= stored_bytes * _MOST_INFLATED if packed else size == stored_bytes - len(header)
    if not possible or 0 in shape[1:] or (dimensions == 4 and shape[3] != 3):
        return None
    if size > MAX_BYTES:
        raise DataError(f"{path} holds {size:,} bytes", f"at most {MAX_BYTES:,}", "split it", code="shard-too-large")
    flat = np.empty(size, np.uint8)
    got = 0
    while got < size and (count := file.readinto(flat[got:])):
        got += count
    return flat.reshape(shape) if got == size and not file.read(1) else None


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]] | None:
    """Return the entries of a folder that are not hidden, sorted by name; None if it cannot be listed."""
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: one.name)
    return None


def _read_folder(
    path: Path, target: Path, located: Located, classes: Mapping[str, int], expected: str
) -> tuple[Images, list[int]]:
    # Names, links and file types of the whole folder are checked before anything is decoded.
    top = _listed(path, target)
    folders = [one for one in top if one.is_dir()]
    _refuse_links(path, folders, located)
    unknown = sum(folder.name not in classes for folder in folders)
    _refuse_labels(path, unknown, f"of {len(folders)} subfolders", expected)
    inner = [(one, classes[folder.name]) for folder in folders for one in _listed(path, folder)]
    _refuse_links(path, [one for one, _ in inner], located)
    loose = sum(_is_picture(one) for one in top)
    strange = sum(not _is_picture(one) for one, _ in inner)
    if loose or strange:
        raise DataError(
            f"{loose} files beside the subfolders of {path} are pictures, {strange} of {len(inner)} in them are none",
            "one subfolder a class, with .png and .jpg files and nothing else",
            "move or remove the others",
            code="shard-format",
        )
    pictures = decode(f"{path}, by the sorted names", [Path(one) for one, _ in inner])
    return pictures, [number for _, number in inner]


def _listed(path: Path, folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    entries = _entries(folder)
    if entries is None:
        raise DataError(f"cannot list {path} or a subfolder of it", "the right to read it", code="shard-missing")
    return entries


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(_ENDINGS) and entry.is_file()


def _refuse_links(path: Path, entries: Sequence[os.DirEntry[str]], located: Located) -> None:
    """Refuse links that lead outside or to nothing. Only links are resolved, because resolving is slow."""
    bad = 0
    for entry in entries:
        if entry.is_symlink():
            bad += 1
            with suppress(DataError):
                located(Path(entry))
                bad -= 1
    if bad:
        raise DataError(f"{bad} links in {path} lead out of the site's folder", "files in it", code="shard-outside")


def _refuse_labels(path: Path, unknown: int, of: str, expected: str) -> None:
    if unknown:
        hint = "correct the data, or list the classes under [task] labels"
        raise DataError(f"{unknown} {of} in {path} have an unknown label", expected, hint, code="shard-label-range")


def decode(place: str, names: Sequence[Path]) -> Images:
    """Decode picture files.

    Args:
        place: the folder and the order of the pictures, in words, for errors.
        names: the files.

    Raises:
        DataError: as in `read`; it contains the position of the picture, not its name.
    """
    images: list[Picture] = []
    room = MAX_BYTES
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of sizes, which are checked here, and of odd palettes
        for number, name in enumerate(names, 1):
            image = _picture(name, f"{place}: picture {number} of {len(names)}", room)
            if isinstance(image, DataError):
                raise image
            images.append(image)
            room -= image.size
    alike = len({image.shape for image in images}) == 1
    return np.stack(images) if alike else images


def _picture(name: Path, what: str, room: int) -> Picture | DataError:
    """Return a picture of at most `room` bytes decoded, or an error to raise outside the decoder's own exception."""
    from PIL import Image

    large = DataError(
        f"{what} is too large, or fills the room that is left",
        f"at most {MAX_PIXELS:,} pixels each, and {MAX_BYTES:,} bytes in all",
        "shrink them, or take fewer",
        code="shard-too-large",
    )
    try:
        with name.open("rb") as file, Image.open(file, formats=("PNG", "JPEG")) as picture:
            if picture.mode not in (*_GREY_MODES, *_COLOUR_MODES):
                return DataError(
                    f"{what} has the mode {picture.mode}", "8 bits a channel, grey or RGB", code="shard-image-mode"
                )
            shrunk = _shrunk(*picture.size)
            channels = 1 if picture.mode in _GREY_MODES else 3
            if math.prod(picture.size) > MAX_PIXELS or channels * math.prod(shrunk) > room:
                return large
            return _upright(picture, shrunk, "L" if channels == 1 else "RGB")
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # raised by Pillow as soon as it knows the size
        return large
    except Exception:  # noqa: BLE001  (decoders raise anything, with bytes of the file in it)
        return DataError(
            f"{what} cannot be decoded", "a whole PNG or JPEG", "save it again, or remove it", code="shard-image-broken"
        )


def _shrunk(width: int, height: int) -> tuple[int, int]:
    """Return the size at which a picture is kept."""
    scale = min(1.0, KEPT_SIDE / min(width, height))
    return round(width * scale), round(height * scale)


def _upright(picture: Any, size: tuple[int, int], mode: str) -> Picture:
    """Decode a picture in the given size and mode, and turn it as its EXIF data say."""
    from PIL import Image, ImageOps

    if size != picture.size:
        picture.draft(None, size)  # JPEG decodes to a half or a quarter much faster
    decoded = picture.convert("RGBA").convert(mode) if picture.mode == "P" else picture.convert(mode)
    if decoded.size != size:
        decoded = decoded.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.exif_transpose(decoded))
