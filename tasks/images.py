"""MNIST and Fashion-MNIST as published: eight IDX files, gzipped or not, which are checked whenever they are read.

An IDX file has a magic number (two zero bytes, 8 for unsigned bytes, the number of axes), the length of each axis, and
the entries. Numbers have 4 bytes, big-endian. torchvision reads it too, but it is a large dependency, and it unpacks
archives of any size.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metamom.common.checks import is_word
from metamom.common.reading import NotAFileError, regular_file
from metamom.tasks.locate import DataError, PathLike, locate

CLASSES = 10
SIDE = 28  # pixels
MAX_BYTES = 64 << 20  # of an unpacked file; the published ones have under 48 MB
SIZES = {"train": 60_000, "t10k": 10_000}
FILES = tuple(f"{part}-{kind}" for part in SIZES for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))

# MD5 of the unpacked files, which does not depend on how they were packed (fetch.py has those of the packed files)
UNPACKED = {
    "mnist": dict(
        zip(
            FILES,
            (
                "6bbc9ace898e44ae57da46a324031adb",
                "a25bea736e30d166cdddb491f175f624",
                "2646ac647ad5339dbf082846283269ea",
                "27ae3e4e09519cfbb04c329615203637",
            ),
            strict=True,
        )
    ),
    "fashion": dict(
        zip(
            FILES,
            (
                "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "9018921c3c673c538a1fc5bad174d6f9",
                "8181f5470baa50b63fa0f6fddb340f0a",
                "15d484375f8d13e6eb1aabb0c3f46965",
            ),
            strict=True,
        )
    ),
}


class LabelledImages(NamedTuple):
    """Images ``[N, H, W]`` uint8, with bright strokes, and labels ``[N]`` int64, both in file order."""

    images: Tensor
    labels: Tensor


def labelled_images(dataset: str, part: str, root: PathLike | None = None) -> LabelledImages:
    """Load the published images of one part of MNIST or Fashion-MNIST.

    Args:
        dataset: ``"mnist"`` or ``"fashion"``.
        part: ``"train"`` (60,000 images) or ``"test"`` (10,000).
        root: data root; else ``$METAMOM_DATA``, else the per-user data folder.

    Returns:
        Images ``[N, 28, 28]`` and labels ``[N]`` from 0 to 9.

    Raises:
        DataNotFoundError: if a file is missing.
        DataError: if a file isn't the published one.
    """
    if not is_word(dataset, UNPACKED) or not is_word(part, ("train", "test")):
        raise ValueError(f"wanted part train or test of {' or '.join(UNPACKED)}; got part {part!r} of {dataset!r}.")
    prefix = "train" if part == "train" else "t10k"
    images, labels = (
        published(locate(dataset, name, root), dataset, name) for name in FILES if name.startswith(prefix)
    )
    return LabelledImages(images, labels.long())


def published(path: Path, dataset: str, name: str) -> Tensor:
    """Read a published file after checking its identity.

    Args:
        path: of the file, packed or not.
        dataset: ``"mnist"`` or ``"fashion"``.
        name: which of `FILES` it must be.

    Returns:
        uint8, images ``[N, 28, 28]`` or labels ``[N]``.

    Raises:
        DataError: if it is damaged or another file.
    """
    part, kind = name.split("-", 1)
    shape = (SIZES[part], SIDE, SIDE) if kind.startswith("images") else (SIZES[part],)
    return idx(path, shape=shape, md5=UNPACKED[dataset][name], dataset=dataset)


def idx(
    path: PathLike, *, shape: tuple[int, ...] | None = None, md5: str | None = None, dataset: str = "mnist"
) -> Tensor:
    """Read an IDX file of unsigned bytes: images (three axes) or labels (one).

    Args:
        path: gzipped or not, detected from the contents.
        shape: the required shape; any if ``None``.
        md5: the required digest of the unpacked file, in hexadecimal; any if ``None``.
        dataset: the name for messages.

    Returns:
        uint8, images ``[N, H, W]`` or labels ``[N]``.

    Raises:
        FileNotFoundError: if the file doesn't exist.
        DataError: for anything else: a pipe or a folder, damage, another kind of file, another shape, a label above 9.
            At most `MAX_BYTES` are read or unpacked.
    """
    path = Path(path)
    data = _unpacked(path, dataset)
    axes = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}.get(data[:4])
    if axes is None:
        raise _bad(
            path, dataset, f"is not an IDX file of images or labels: it begins with {data[:4].hex() or 'nothing'}"
        )
    head = 4 + 4 * axes
    if len(data) < head:
        raise _bad(path, dataset, f"ends inside its header, after {len(data)} bytes")
    found = struct.unpack(f">{axes}I", data[4:head])
    if shape is not None and found != shape:
        raise _bad(path, dataset, f"has the shape {_times(found)} instead of {_times(shape)}")
    if len(data) != head + math.prod(found):
        raise _bad(path, dataset, f"has {len(data) - head} entries, but its header says {_times(found)}")
    if md5 is not None and (digest := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
        raise _bad(path, dataset, f"isn't the published file: unpacked, its MD5 is {digest} instead of {md5}")
    entries = np.frombuffer(data, dtype=np.uint8, offset=head)
    if axes == 1 and entries.size and entries.max() >= CLASSES:
        at = int((entries >= CLASSES).argmax())
        raise _bad(path, dataset, f"has the label {entries[at]} at place {at}; labels go from 0 to {CLASSES - 1}")
    return torch.from_numpy(entries.reshape(found).copy())


def _unpacked(path: Path, dataset: str) -> bytes:
    try:
        with regular_file(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if packed else file as stream:
                data = stream.read(MAX_BYTES + 1)  # no more, since a small archive may unpack to any size
    except NotAFileError as error:
        raise _bad(path, dataset, str(error.strerror)) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _bad(path, dataset, f"is damaged ({error})") from error
    if len(data) > MAX_BYTES:
        raise _bad(path, dataset, f"has more than {MAX_BYTES} bytes, more than any file of the data set")
    return data


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _bad(path: Path, dataset: str, what: str) -> DataError:
    return DataError(
        f"{path} {what}. Remove it and get it again: `metamom data fetch {dataset} --root {path.parent.parent}`."
    )
