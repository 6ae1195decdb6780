"""IDX files: read whole, or refused with what is wrong."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from metamom.tasks import fetch, images
from metamom.tasks.images import idx, labelled_images
from metamom.tasks.locate import DataError, locate


def packed(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3))
LABELS = np.array([3, 0, 9, 1, 1, 5])


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["packed", "plain"])
@pytest.mark.parametrize("array", [PIXELS, LABELS], ids=["images", "labels"])
def test_what_was_written_is_read(array, pack, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pack(packed(array)))
    read = idx(path, shape=array.shape, md5=hashlib.md5(packed(array), usedforsecurity=False).hexdigest())
    assert read.dtype is torch.uint8
    assert np.array_equal(read, array)
    read[0] = 0  # a copy of its own


WRONG = {
    "empty": (b"", "begins with nothing"),
    "a web page": (b"<html>404</html>", "is not an IDX file of images or labels: it begins with 3c68746d"),
    "another type": (struct.pack(">HBBI", 0, 9, 1, 6) + bytes(6), "is not an IDX file"),
    "two axes": (packed(PIXELS[0]), "is not an IDX file"),
    "half a header": (packed(PIXELS)[:9], "ends inside its header, after 9 bytes"),
    "cut short": (packed(PIXELS)[:-1], "has 71 entries, but its header says 6x4x3"),
    "too long": (packed(LABELS) + b"\0", "has 7 entries, but its header says 6"),
    "a label too large": (packed(np.array([0, 10])), "has the label 10 at place 1; labels go from 0 to 9"),
    "half an archive": (gzip.compress(packed(PIXELS))[:-20], "is damaged"),
    "a flipped bit": (gzip.compress(packed(PIXELS))[:-8] + bytes(8), "is damaged"),
    "too large an archive": (gzip.compress(bytes(images.MAX_BYTES + 1)), "more than any file of the data set"),
}


@pytest.mark.parametrize("what", WRONG)
def test_anything_else_is_refused(what, tmp_path):
    data, message = WRONG[what]
    path = tmp_path / "mnist" / "file.gz"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        idx(path)
    assert str(error.value).startswith(str(path))
    assert f"metamom data fetch mnist --root {tmp_path}" in str(error.value)


def test_another_shape_and_another_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(packed(PIXELS))
    with pytest.raises(DataError, match="has the shape 6x4x3 instead of 6x4x4"):
        idx(path, shape=(6, 4, 4))
    with pytest.raises(DataError, match=r"isn't the published file.*instead of 0123"):
        idx(path, md5="0123")
    with pytest.raises(FileNotFoundError):
        idx(tmp_path / "none")


def tiny(monkeypatch, root: Path, dataset: str = "mnist") -> dict[str, bytes]:
    """A data set of 6 training and 4 test images, as if it were the published one."""
    monkeypatch.setattr(images, "SIZES", {"train": 6, "t10k": 4})
    monkeypatch.setattr(images, "SIDE", 3)
    rng = np.random.default_rng(1)
    files = {
        name: packed(rng.integers(0, 256, (count, 3, 3)) if "images" in name else rng.integers(0, 10, count))
        for name in images.FILES
        for count in [6 if name.startswith("train") else 4]
    }
    digests = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in files.items()}
    monkeypatch.setitem(images.UNPACKED, dataset, digests)
    folder = root / {"mnist": "mnist", "fashion": "fashion_mnist"}[dataset]
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    return files


@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
def test_a_data_set(dataset, tmp_path, monkeypatch):
    files = tiny(monkeypatch, tmp_path, dataset)
    part = labelled_images(dataset, "test", tmp_path)
    assert part.images.shape == (4, 3, 3)
    assert part.labels.dtype is torch.int64
    held = [found.holds for found in fetch.check(dataset, tmp_path)]
    assert held == [{"images": 6}, {"labels": 6}, {"images": 4}, {"labels": 4}]
    assert len(fetch.fetch(dataset, tmp_path)) == 4
    name = images.FILES[0]
    archive = locate(dataset, name, tmp_path)
    plain = archive.with_name(name)
    archive.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {dataset} data: wanted .*{name}\.gz or the file .*{name} "):
        labelled_images(dataset, "train", tmp_path)
    plain.write_bytes(files[name])
    assert labelled_images(dataset, "train", tmp_path).images.shape == (6, 3, 3)
    plain.write_bytes(files[name][:-1] + b"!")
    with pytest.raises(DataError, match=f"isn't the published file.*metamom data fetch {dataset}"):
        fetch.check(dataset, tmp_path)


@pytest.mark.parametrize(("dataset", "part"), [("cifar", "train"), ("mnist", "validation")])
def test_unknown_names(dataset, part, tmp_path):
    with pytest.raises(ValueError, match=f"got part '{part}' of '{dataset}'"):
        labelled_images(dataset, part, tmp_path)


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "mnist"), ("fashion", "fashion_mnist")])
def test_the_published_files(dataset, folder, data_root):
    if not (data_root / folder).is_dir():
        pytest.skip(f"no {folder} in {data_root}")
    train, test = (labelled_images(dataset, part, data_root) for part in ("train", "test"))
    assert (len(train.labels), len(test.labels)) == (60_000, 10_000)
    if dataset == "mnist":
        assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert float(train.images.float().mean() / 255) == pytest.approx(0.1307, abs=1e-4)
