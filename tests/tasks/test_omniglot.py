"""Omniglot: the real data where it is, and small archives with every fault."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_omniglot import SIDE, TINY, in_place_of_omniglot, members, pixels, png, write_folder, write_zip

from metamom.tasks import Episodes, FixedTasks, Omniglot, PerWorker, omniglot
from metamom.tasks.locate import DataError
from metamom.tasks.omniglot_archive import read_characters
from metamom.tasks.omniglot_splits import split_characters

# The reader


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_reads_archives_and_folders(tmp_path, write):
    path = tmp_path / "omniglot" / "images_background.zip" if write is write_zip else tmp_path
    source = write(path, members())
    source = source if write is write_zip else tmp_path / "images_background"
    names, images = read_characters(source, "background", SIDE, TINY)
    assert names == [f"{alphabet}/character0{n}" for alphabet in ("Alpha", "Beta_(b)") for n in (1, 2, 3)]
    assert images.dtype == np.uint8
    assert images.shape == (6, 4, SIDE, SIDE)
    for row, number in enumerate((0, 2, 4, 1, 3, 5)):
        for drawing in range(4):
            assert np.array_equal(images[row, drawing], 255 * pixels(number, drawing))  # strokes bright


def test_resamples(tmp_path):
    source = write_zip(tmp_path / "images_background.zip", members())
    _, images = read_characters(source, "background", 5, TINY)
    drawing = Image.fromarray(np.where(pixels(0, 0), 0, 255).astype(np.uint8))
    assert np.array_equal(images[0, 0], 255 - np.asarray(drawing.resize((5, 5), Image.Resampling.LANCZOS)))


def test_what_file_managers_leave_behind_is_passed_over(tmp_path):
    clutter = {"images_background/.DS_Store": b"x", "__MACOSX/images_background/._a": b"x"}
    source = write_zip(tmp_path / "images_background.zip", members() | clutter)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("images_background/", b"")
        archive.writestr("images_background/Alpha/", b"")
    assert len(read_characters(source, "background", SIDE, TINY).names) == 6


FIRST = "images_background/Alpha/character01/0001_01.png"


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in members().items() if key != name}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (without(FIRST), "lacks drawing 01 of Alpha/character01"),
        ({k: v for k, v in members().items() if "/Alpha/character01/" not in k}, "has 5 characters instead of 6"),
        (members() | {FIRST.replace("_01", "_05"): png(pixels(0, 0))}, "has drawing 05 of Alpha/character01; wanted 4"),
        (members() | {FIRST.replace("0001", "0009"): png(pixels(0, 0))}, "has drawing 01 of Alpha/character01 twice"),
        (members() | {FIRST: png(pixels(0, 0, 8))}, "of 8x8 pixels instead of 12x12"),
        (members() | {FIRST: png(pixels(0, 0))[:40]}, "damaged drawing .*0001_01.png"),
        (members() | {FIRST: b"not an image"}, "damaged drawing"),
        (members() | {FIRST: b"\0" * 70_000}, "of 70000 bytes"),
        (members() | {"images_background/../../evil.png": b""}, "evil.png', which isn't named like"),
        (members() | {"images_background/Alpha/readme.txt": b""}, "readme.txt', which isn't named like"),
        ({}, "has 0 characters instead of 6"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_other_contents_are_refused(tmp_path, write, contents, message):
    if write is write_folder:
        if any(".." in name for name in contents):
            pytest.skip("a folder can't have such a name")
        source = tmp_path / "root" / "images_background"
        source.mkdir(parents=True)
        write_folder(tmp_path / "root", contents)
    else:
        source = write_zip(tmp_path / "root" / "images_background.zip", contents)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message) as error:
        read_characters(source, "background", SIDE, TINY)
    assert str(source) in str(error.value)
    assert "metamom data fetch omniglot" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["/etc/passwd", "../evil.png", "C:\\evil.png", "images_evaluation/a.png"])
def test_members_elsewhere_are_refused(tmp_path, name):
    source = write_zip(tmp_path / "images_background.zip", members() | {name: b""})
    with pytest.raises(DataError, match="not a file or folder below images_background/"):
        read_characters(source, "background", SIDE, TINY)


def test_links_are_refused(tmp_path):
    source = write_zip(tmp_path / "images_background.zip", without(FIRST))
    with zipfile.ZipFile(source, "a") as archive:
        link = zipfile.ZipInfo(FIRST)
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="not a file or folder below"):
        read_characters(source, "background", SIDE, TINY)


def test_a_member_stored_twice_is_refused(tmp_path):
    source = write_zip(tmp_path / "images_background.zip", members())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(source, "a") as archive:
        archive.writestr(FIRST, b"another")
    with pytest.raises(DataError, match="twice"):
        read_characters(source, "background", SIDE, TINY)


def test_damaged_archives_are_refused(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", members()).read_bytes()
    with zipfile.ZipFile(BytesIO(whole)) as archive:
        offset = archive.getinfo(FIRST).header_offset + 30 + len(FIRST)
    flipped = bytearray(whole)
    flipped[offset + 20] ^= 0xFF
    encrypted = bytearray(whole)
    central = whole.index(b"PK\x01\x02")
    struct.pack_into("<H", encrypted, central + 8, 1)
    source = tmp_path / "images_background.zip"
    for damaged, message in (
        (whole[: len(whole) // 2], "is not a complete zip archive"),
        (b"", "is not a complete zip archive"),
        (b"<html>404</html>", "is not a complete zip archive"),
        (bytes(flipped), "damaged member"),
        (bytes(encrypted), "encrypted member"),
    ):
        source.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read_characters(source, "background", SIDE, TINY)


def test_archives_that_grow_are_refused(tmp_path):
    """A member that says 100 bytes and holds a gigabyte is read no further than it says; one of a gigabyte, not at
    all; and so is an archive too large to be Omniglot's."""
    source = write_zip(tmp_path / "images_background.zip", members() | {FIRST: b"\0" * 50_000_000})
    with pytest.raises(DataError, match="of 50000000 bytes"):
        read_characters(source, "background", SIDE, TINY)
    lying = bytearray(source.read_bytes())
    position = -1
    while (position := lying.find(struct.pack("<I", 50_000_000), position + 1)) >= 0:
        struct.pack_into("<I", lying, position, 100)
    source.write_bytes(lying)
    with pytest.raises(DataError, match="damaged member"):
        read_characters(source, "background", SIDE, TINY)
    with source.open("wb") as file:
        file.truncate(40 << 20)
    with pytest.raises(DataError, match="more than any Omniglot archive"):
        read_characters(source, "background", SIDE, TINY)


# The sampler, on a small data set in the place of the published one


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data root with a tiny background set, in a cache of its own."""
    in_place_of_omniglot(monkeypatch, tmp_path / "cache")
    root = tmp_path / "root"
    write_zip(root / "omniglot" / "images_background.zip", members())
    return root


SMALL = {"split": "background", "ways": 3, "queries": 2, "image_size": SIDE}


def test_equals_episodes_of_the_same_images(tiny):
    _, images = read_characters(tiny / "omniglot" / "images_background.zip", "background", SIDE, TINY)
    images, labels = torch.from_numpy(images).reshape(24, 1, SIDE, SIDE), torch.arange(24) // 4
    slow = Episodes(images, labels, ways=3, shots=1, queries=2, rotations=True).with_stream("background")
    for a, b in zip(Omniglot(tiny, **SMALL).sample(3, 8)[:4], slow.sample(3, 8)[:4], strict=True):
        assert torch.equal(a, b)


def test_folder_and_archive_give_the_same(tiny):
    from_archive = Omniglot(tiny, **SMALL).sample(0, 4)
    (tiny / "omniglot" / "images_background.zip").unlink()
    write_folder(tiny / "omniglot", members())
    assert torch.equal(Omniglot(tiny, **SMALL).sample(0, 4).query_x, from_archive.query_x)


@pytest.mark.parametrize(
    ("split", "rotations", "times"),
    [("background", True, 4), ("train", True, 4), ("test", True, 1), ("test", "all", 4), ("background", False, 1)],
)
def test_which_splits_are_rotated(tiny, split, rotations, times):
    tasks = Omniglot(tiny, **SMALL | {"split": split}, rotations=rotations)
    assert tasks.num_classes == 6 * times
    assert tasks.stream == split
    assert tasks.describe()["rotations"] == rotations


def test_alphabets(tiny):
    tasks = Omniglot(tiny, **SMALL, alphabets=["Beta_(b)"])
    assert tasks.characters == tuple(f"background/Beta_(b)/character0{n}" for n in (1, 2, 3))
    assert tasks.num_classes == 12
    with pytest.raises(ValueError, match=r"no alphabet 'Gamma'. It has: Alpha, Beta_\(b\)"):
        Omniglot(tiny, **SMALL, alphabets=["Gamma"])
    for bad in ([], "Alpha"):
        with pytest.raises(ValueError, match="alphabets must be a list of names"):
            Omniglot(tiny, **SMALL, alphabets=bad)
    pair = PerWorker([Omniglot(tiny, **SMALL, alphabets=[name]) for name in ("Alpha", "Beta_(b)")])
    assert torch.equal(pair.sample(0, 4).query_x[2:], tasks.sample(0, 4).query_x[2:])


def test_the_cache_is_used_and_follows_the_archive(tiny, tmp_path, monkeypatch):
    first = Omniglot(tiny, **SMALL).sample(0, 4)
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert sorted(path.name for path in tiny.rglob("*")) == ["images_background.zip", "omniglot"]
    with monkeypatch.context() as patch:
        patch.setattr(omniglot, "read_characters", None)  # not called again
        assert torch.equal(Omniglot(tiny, **SMALL).sample(0, 4).query_x, first.query_x)
    archive = tiny / "omniglot" / "images_background.zip"
    write_zip(archive, {name: png(~pixels(0, 0)) for name in members()})
    os.utime(archive, ns=(1, 1))
    assert not torch.equal(Omniglot(tiny, **SMALL).sample(0, 4).query_x, first.query_x)


def test_a_named_root_without_data_is_an_error(tiny, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    monkeypatch.setenv("METAMOM_DATA", str(tiny))
    assert Omniglot(**SMALL).num_classes == 24
    with pytest.raises(FileNotFoundError, match=f"data fetch omniglot --root {empty}") as error:
        Omniglot(empty, **SMALL)
    assert str(empty / "omniglot" / "images_background.zip") in str(error.value)
    assert isinstance(error.value, ValueError)
    monkeypatch.setenv("METAMOM_DATA", str(empty))
    with pytest.raises(FileNotFoundError, match=r"\$METAMOM_DATA"):
        Omniglot(**SMALL)
    monkeypatch.delenv("METAMOM_DATA")
    monkeypatch.setattr("metamom.tasks.locate.user_data_dir", lambda *_, **__: str(tmp_path / "user"))
    with pytest.raises(FileNotFoundError, match="Run `metamom data fetch omniglot`, or name"):
        Omniglot(**SMALL)
    shutil.copytree(tiny, tmp_path / "user")
    assert Omniglot(**SMALL).num_classes == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 25}, "ways=25 different classes; the data has 24"),
        ({"shots": 3}, r"shots \+ queries = 3 \+ 2 images of each class; class 0 has 4"),
        ({"rotations": "some"}, "rotations must be True, False or 'all'"),
        ({"image_size": 0}, "image_size must be >= 1"),
    ],
)
def test_bad_arguments(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        Omniglot(tiny, **SMALL | change)


def test_an_unknown_split():
    with pytest.raises(ValueError, match="train, validation, test, background, evaluation; got 'dev'"):
        Omniglot(split="dev")


# The stored lists and the real data


def test_splits():
    lists = {split: split_characters(split) for split in ("train", "validation", "test", "background", "evaluation")}
    assert {split: len(names) for split, names in lists.items()} == {
        "train": 1100,
        "validation": 100,
        "test": 423,
        "background": 964,
        "evaluation": 659,
    }
    assert all(list(names) == sorted(set(names)) for names in lists.values())
    stored = {*lists["train"], *lists["validation"], *lists["test"]}
    assert stored == {*lists["background"], *lists["evaluation"]}
    assert len(stored) == 1623
    alphabets = [{name.split("/")[1] for name in lists[part]} for part in ("background", "evaluation")]
    assert [len(a) for a in alphabets] == [30, 20]
    assert not alphabets[0] & alphabets[1]


@pytest.mark.parametrize("split", ["train", "validation", "test", "background", "evaluation"])
def test_the_real_data_has_every_character_listed(data_root, split):
    tasks = Omniglot(data_root, split=split, shots=10, queries=10, rotations=False)
    assert tasks.characters == split_characters(split)
    assert tasks.num_classes == len(tasks.characters)
    assert len(tasks._images) == 20 * tasks.num_classes


def test_the_real_tasks_of_every_platform(data_root):
    tasks = Omniglot(data_root, split="test")
    batch = tasks.sample(0, 2)
    assert tasks.num_classes == 423
    assert batch.support_x.shape == (2, 5, 1, 28, 28)
    assert 0 <= batch.support_x.min() < batch.support_x.mean() < 0.25 < batch.support_x.max() <= 1
    pixels = (batch.support_x * 255).round().to(torch.uint8).contiguous().numpy()
    assert hashlib.sha256(pixels).hexdigest() == "bf5944e35e0d6ff74a96acbbb7c21f3c35bdc2dcdf2990c6e44c1c5723e8c783"


def test_real_characters_rotated_in_training(data_root):
    tasks = Omniglot(data_root, seed=1)
    assert tasks.num_classes == 4400
    fixed = FixedTasks(tasks, 3)
    assert fixed.sample(0, 3).support_x.shape == (3, 5, 1, 28, 28)
