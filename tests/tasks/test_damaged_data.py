"""Data folders with anything in them: loaded to exactly what they hold, or refused by one error that names the file."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import run_forked, without_ranks
from fuzzing import bounded, campaign, damaged
from irregular import IRREGULAR, put_in_place
from tiny_omniglot import SIDE, TINY, in_place_of_omniglot, members, pixels, write_folder, write_zip
from tiny_png import chunk, picture

from metamom.tasks import Omniglot, fetch
from metamom.tasks.images import idx
from metamom.tasks.locate import DataError, locate
from metamom.tasks.omniglot_archive import read_characters

FIRST = "images_background/Alpha/character01/0001_01.png"
RIGHT = np.array([[255 * pixels(number, d) for d in range(4)] for number in (0, 2, 4, 1, 3, 5)], dtype=np.uint8)
every_kind = pytest.mark.parametrize("kind", IRREGULAR)


def tried(read: Callable[[], Any]) -> Any:
    """What it returns, or its `DataError`."""
    try:
        return read()
    except DataError as error:
        return error


def assert_right_or_refused(source: Path, seed: int) -> None:
    """Loads `RIGHT`, or says in one error what is wrong with which file; and leaves everything as it is."""
    before = contents(source.parent)
    with bounded(20, 256):
        found = tried(lambda: read_characters(source, "background", SIDE, TINY))
    if isinstance(found, DataError):
        assert str(found).startswith(str(source)), f"seed {seed}: {found}"
        assert "metamom data fetch omniglot" in str(found)
    else:
        assert len(found.names) == len(set(found.names)) == 6, f"seed {seed}"
        assert np.array_equal(found.images, RIGHT), f"seed {seed}"
    assert contents(source.parent) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Omniglot


@campaign(100, 1500)
def test_a_damaged_archive(tmp_path, seeds):
    source = tmp_path / "omniglot" / "images_background.zip"
    whole = write_zip(source, members()).read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for seed in seeds:
        rng = random.Random(seed)
        if seed % 2:  # in the directory and the end alone, which is where zipfile has most to believe
            source.write_bytes(whole[:directory] + damaged(whole[directory:], rng))
        else:
            source.write_bytes(damaged(whole, rng))
        assert_right_or_refused(source, seed)


@campaign(60, 1000)
def test_a_damaged_drawing_in_a_folder(tmp_path, seeds):
    """No checksum of an archive's stands around it: the picture's own must be checked."""
    source = write_folder(tmp_path / "omniglot", members()) / "images_background"
    first = tmp_path / "omniglot" / FIRST
    whole = first.read_bytes()
    for seed in seeds:
        first.write_bytes(damaged(whole, random.Random(seed)))
        assert_right_or_refused(source, seed)


@campaign(40, 500)
def test_a_folder_with_one_file_or_folder_too_many_too_few_or_renamed(tmp_path, seeds):
    original = write_folder(tmp_path / "original", members()) / "images_background"
    for seed in seeds:
        rng = random.Random(seed)
        source = shutil.copytree(original, tmp_path / "omniglot" / "images_background")
        path = rng.choice(sorted(source.rglob("*")))
        name = rng.choice(
            ["x", ".DS_Store", "0001_01.png", "0001_05.png", "1_1.png", "character01", "..png", "\udcff", "a\nb"]
        )
        change = rng.choice(["rename", "remove", "file", "folder", "link"])
        if change == "rename" and not path.with_name(name).exists():
            path.rename(path.with_name(name))
        elif change == "remove":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif change == "file" and not path.with_name(name).exists():
            path.with_name(name).write_bytes(b"x")
        elif change == "folder" and not path.with_name(name).exists():
            (path.with_name(name) / "x").mkdir(parents=True)
        elif change == "link" and not path.with_name(name).exists():
            path.with_name(name).symlink_to(rng.choice([source, path, "/", "/dev/zero", "nothing"]))
        assert_right_or_refused(source, seed)
        shutil.rmtree(source)


@every_kind
def test_something_else_in_the_place_of_a_drawing(tmp_path, kind):
    source = write_folder(tmp_path / "omniglot", members()) / "images_background"
    put_in_place(kind, tmp_path / "omniglot" / FIRST)
    wanted = "a folder, or a link to one" if kind == "a folder" else kind
    with bounded(10, 64), pytest.raises(DataError, match=rf"has {wanted},? .*Alpha/character01/0001_01.png"):
        read_characters(source, "background", SIDE, TINY)


@every_kind
def test_something_else_in_the_place_of_a_character(tmp_path, kind):
    source = write_folder(tmp_path / "omniglot", members()) / "images_background"
    shutil.rmtree(source / "Alpha" / "character01")
    put_in_place(kind, source / "Alpha" / "character01")
    message = "has 5 characters" if kind == "a folder" else f"has {kind} .*Alpha/character01"
    with bounded(10, 64), pytest.raises(DataError, match=message):
        read_characters(source, "background", SIDE, TINY)


@every_kind
@pytest.mark.parametrize(
    ("dataset", "name", "folder"),
    [
        ("omniglot", "images_background.zip", "omniglot"),
        ("omniglot", "images_background", "omniglot"),
        ("mnist", "train-images-idx3-ubyte.gz", "mnist"),
        ("fashion", "train-images-idx3-ubyte", "fashion_mnist"),
    ],
)
def test_something_else_in_the_place_of_a_file_of_the_data_set(tmp_path, kind, dataset, name, folder):
    path = tmp_path / folder / name
    put_in_place(kind, path)
    with bounded(10, 64):
        if kind == "a folder" and name == "images_background":
            with pytest.raises(DataError, match="has 0 characters"):
                fetch.check(dataset, tmp_path)
            return
        for ask in (fetch.check, fetch.fetch):
            with pytest.raises(DataError, match=f"{path} is {kind}, where {dataset} data should be"):
                ask(dataset, tmp_path)


@every_kind
def test_something_else_than_an_archive_or_an_idx_file(tmp_path, kind):
    """Also for those who read it without having looked for it."""
    path = tmp_path / "omniglot" / "x"
    put_in_place(kind, path)
    with bounded(10, 64), pytest.raises(DataError, match=f"{path} (is {kind}|has 0 characters)"):
        read_characters(path, "background", SIDE, TINY)
    with bounded(10, 64), pytest.raises(DataError, match=f"{path} is {kind}, not a file"):
        idx(path)


def test_a_link_to_a_file_is_followed(tmp_path):
    source = write_folder(tmp_path / "omniglot", members()) / "images_background"
    first = tmp_path / "omniglot" / FIRST
    first.rename(tmp_path / "elsewhere.png")
    first.symlink_to(tmp_path / "elsewhere.png")
    assert np.array_equal(read_characters(source, "background", SIDE, TINY).images, RIGHT)
    archive = write_zip(tmp_path / "elsewhere.zip", members())
    (tmp_path / "images_background.zip").symlink_to(archive)
    assert np.array_equal(read_characters(tmp_path / "images_background.zip", "background", SIDE, TINY).images, RIGHT)


def test_a_folder_that_cannot_be_read(tmp_path):
    source = write_folder(tmp_path / "omniglot", members()) / "images_background"
    (source / "Alpha" / "character01").chmod(0)
    try:
        if os.access(source / "Alpha" / "character01", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(DataError, match=r"has a folder .*character01 that can't be read \(Permission denied\)"):
            read_characters(source, "background", SIDE, TINY)
    finally:
        (source / "Alpha" / "character01").chmod(0o755)


def test_folders_in_folders(tmp_path):
    """As deep as a path may be."""
    source = tmp_path / "omniglot" / "images_background"
    deep = source / "/".join("a" * 400)
    deep.mkdir(parents=True)
    with bounded(10, 64), pytest.raises(DataError, match="has a folder"):
        read_characters(source, "background", SIDE, TINY)


def test_drawings_of_other_kinds_are_converted(tmp_path):
    """16 bits of grey at half intensity come out half as bright, and a palette gives its colours, not its numbers."""
    strokes = pixels(0, 0)
    grey = picture(np.where(strokes, 0x8000, 0xFFFF), 16, size=SIDE)
    palette = picture(strokes.astype(int), 1, 3, chunk(b"PLTE", bytes([255, 255, 255, 0, 0, 0])), size=SIDE)
    source = write_folder(tmp_path / "omniglot", members() | {FIRST: grey}) / "images_background"
    assert np.array_equal(read_characters(source, "background", SIDE, TINY).images[0, 0], 127 * strokes)
    write_folder(tmp_path / "omniglot", {FIRST: palette})
    assert np.array_equal(read_characters(source, "background", SIDE, TINY).images, RIGHT)
    write_folder(tmp_path / "omniglot", {FIRST: picture(np.zeros((SIDE, SIDE, 2), int), 8, 4, size=SIDE)})
    with pytest.raises(DataError, match=r"has a drawing .*0001_01.png with transparency\. Remove it"):
        read_characters(source, "background", SIDE, TINY)


@pytest.mark.parametrize("rows", [0, 5, SIDE - 1])
def test_a_drawing_that_lacks_rows(tmp_path, rows):
    """Its parts are whole and their checksums right, but the pixels end at the end of a row."""
    short = picture(pixels(0, 0).astype(int)[:rows], 1, size=SIDE)
    source = write_folder(tmp_path / "omniglot", members() | {FIRST: short}) / "images_background"
    with pytest.raises(DataError, match=r"damaged drawing .*0001_01\.png \(pixels missing"):
        read_characters(source, "background", SIDE, TINY)


def zipped(contents: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return file.getvalue()


def overlapping() -> bytes:
    """Every drawing is the first one's bytes."""
    data = bytearray(zipped(members()))
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<I", data, at + 42, 0)
        at = data.find(b"PK\x01\x02", at + 1)
    return bytes(data)


def of_many_members() -> bytes:
    """A directory of half a million entries, in 25 MB."""
    data = zipped({"a": b""})
    directory, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entries = data[directory:end] * 500_000
    closing = bytearray(data[end:])
    struct.pack_into("<II", closing, 12, len(entries), directory)
    return data[:directory] + entries + bytes(closing)


def of_size(size: int) -> bytes:
    """The first drawing's entry says that it unpacks to this many bytes."""
    data = bytearray(zipped(members()))
    struct.pack_into("<I", data, data.find(b"PK\x01\x02") + 24, size)
    return bytes(data)


BOMBS = {
    "overlapping members": (overlapping, "overlaps another"),
    "half a million members": (of_many_members, "has 500000 members"),
    "a member that says it is huge": (lambda: of_size(2**32 - 2), "of 4294967294 bytes"),
    "a drawing of 4 gigapixels": (
        lambda: zipped(members() | {FIRST: picture(pixels(0, 0).astype(int), 1, size=65536)}),
        "of 65536x65536 pixels instead of 12x12",
    ),
    "packed by another method": (lambda: zipped(members(), zipfile.ZIP_LZMA), "packed by method 14, not by deflate"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_refused_before_they_take_memory(tmp_path, what):
    make, message = BOMBS[what]
    source = tmp_path / "omniglot" / "images_background.zip"
    source.parent.mkdir()
    source.write_bytes(make())
    with bounded(10, 128), pytest.raises(DataError, match=message):
        read_characters(source, "background", SIDE, TINY)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data root with a folder of tiny drawings, in a cache of its own."""
    in_place_of_omniglot(monkeypatch, tmp_path / "cache")
    write_folder(tmp_path / "root" / "omniglot", members())
    return tmp_path / "root"


SMALL = {"split": "background", "ways": 6, "shots": 2, "queries": 2, "image_size": SIDE, "rotations": False}


@every_kind
def test_the_family_refuses_them_too(tiny, kind):
    put_in_place(kind, tiny / "omniglot" / FIRST)
    with bounded(10, 128), pytest.raises(DataError, match=r"Alpha/character01/0001_01\.png"):
        Omniglot(tiny, **SMALL)


def test_a_drawing_replaced_by_an_older_one_of_its_size_is_seen(tiny):
    """The cache is keyed by each file's size and time, not by their sum and the latest."""
    before = Omniglot(tiny, **SMALL).sample(0, 1)
    first, second = (tiny / "omniglot" / FIRST.replace("_01", number) for number in ("_01", "_02"))
    drawings = [first.read_bytes(), second.read_bytes()]
    for path, other, time in ((first, drawings[1], 1_000), (second, drawings[0], 2_000)):
        path.write_bytes(other.ljust(len(other)))
        os.utime(path, ns=(time, time))
    after = Omniglot(tiny, **SMALL).sample(0, 1)
    assert not np.array_equal(after.support_x, before.support_x)


def test_image_sizes_have_a_bound(tiny):
    with bounded(10, 64), pytest.raises(ValueError, match="image_size must be <= 512; got 1000000"):
        Omniglot(tiny, **SMALL | {"image_size": 10**6})


# IDX files

ENTRIES = {
    "images": np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8),
    "labels": np.array([3, 0, 9, 1, 1, 5], dtype=np.uint8),
}


def packed(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@campaign(100, 1500)
def test_a_damaged_idx_file(tmp_path, seeds):
    path = tmp_path / "mnist" / "file"
    path.parent.mkdir()
    for seed in seeds:
        rng = random.Random(seed)
        right = ENTRIES[rng.choice(["images", "labels"])]
        pack = rng.choice([bytes, gzip.compress])
        digest = hashlib.md5(packed(right), usedforsecurity=False).hexdigest()
        path.write_bytes(damaged(pack(packed(right)), rng))
        shape = rng.choice([None, right.shape])
        with bounded(10, 200):
            read = tried(lambda shape=shape, digest=digest: idx(path, shape=shape, md5=digest))
        if isinstance(read, DataError):
            assert str(read).startswith(str(path)), f"seed {seed}: {read}"
        else:
            assert np.array_equal(read, right), f"seed {seed}"
    assert [*tmp_path.rglob("*")] == [path.parent, path]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("lengths", [(10**4, 10**4, 10**4), (2**32 - 1,) * 3, (0, 2**32 - 1, 2**32 - 1)])
def test_a_header_that_tells_more_than_there_is(tmp_path, lengths, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(struct.pack(">HBB3I", 0, 8, 3, *lengths) + bytes(100)))
    with bounded(10, 200), pytest.raises(DataError, match="has 100 entries, but its header says"):
        idx(path)


def test_an_archive_of_gigabytes(tmp_path):
    """A gigabyte of zeros in a megabyte: no more is unpacked than the largest file has."""
    path = tmp_path / "file"
    one = gzip.compress(bytes(1 << 24))
    path.write_bytes(gzip.compress(packed(np.zeros((1, 1, 1), np.uint8))) + one * 64)
    with bounded(20, 200), pytest.raises(DataError, match="more than any file of the data set"):
        idx(path)


# Roots


@pytest.mark.parametrize(
    ("root", "error", "message"),
    [
        (5, TypeError, "root= must be the path of a folder; got 5"),
        (b"data", TypeError, "root= must be the path of a folder; got b'data'"),
        ("a\0b", ValueError, "contains a null character"),
        ("~nobody-of-this-name/data", ValueError, "that user's home folder is unknown"),
        (__file__, FileNotFoundError, "is not a folder. Name the folder that holds"),
    ],
)
def test_roots_that_are_no_folders(root, error, message):
    with pytest.raises(error, match=message):
        locate("mnist", "train-images-idx3-ubyte", root)


def test_the_command_refuses_them_in_one_line(tmp_path):
    put_in_place("a named pipe", tmp_path / "mnist" / "train-images-idx3-ubyte.gz")
    words = ["data", "check", "mnist", "--root", str(tmp_path)]
    ((status, said),) = run_forked(without_ranks, 1, tmp_path / "said", *words)
    assert status != 0
    assert "is a named pipe, where mnist data should be" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_real_archive_damaged(tmp_path, data_root, seed):
    """Of the published size, in bounded time: damage in it is found, or harmless."""
    source = tmp_path / "omniglot" / "images_background.zip"
    source.parent.mkdir()
    whole = (data_root / "omniglot" / "images_background.zip").read_bytes()
    source.write_bytes(damaged(whole, random.Random(seed)))
    with bounded(300, 1024):
        found = tried(lambda: read_characters(source, "background", 28))
    if isinstance(found, DataError):
        assert str(source) in str(found)
    else:
        archive = data_root / "omniglot" / "images_background.zip"
        assert np.array_equal(found.images, read_characters(archive, "background", 28).images)
